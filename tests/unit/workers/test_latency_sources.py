"""Where a latency model's factors come from: its own steps, before them a profile, before that the roofline."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers.engine.sharing import layouts_of
from workers.errors import ProfileError
from workers.latency_model import LatencyModel
from workers.loaded_shapes import first_latency
from workers.step_shape import ENOUGH_STEPS, FactorSource, StepCosts, StepShape, chunk, decodes

LLAMA, H100 = MODELS["llama-3-8b"], DEVICES["h100"]
#: What `phasewise calibrate` may find, decode attention as cheap as nothing included.
PROFILE = StepCosts(LLAMA, H100, (2.3, 0.9, 0.0, 1.7), 105, 0.06, 1.2)
shapes = st.builds(
    StepShape, st.integers(0, 256), st.integers(0, 10**6), st.integers(0, 4096), st.integers(0, 10**8)
).filter(lambda shape: shape.num_tokens > 0)


@given(st.lists(st.tuples(shapes, st.floats(1e-4, 1.0)), max_size=ENOUGH_STEPS + 5))
def test_own_steps_come_before_a_profile_and_a_profile_before_the_roofline(
    steps: list[tuple[StepShape, float]],
) -> None:
    profiled, plain = LatencyModel.profiled(PROFILE), LatencyModel(LLAMA, H100)
    for shape, measured_s in steps:
        profiled.observe(shape, measured_s)
        plain.observe(shape, measured_s)
    is_fitted = len(steps) >= ENOUGH_STEPS
    assert profiled.source is (FactorSource.FITTED if is_fitted else FactorSource.PROFILE)
    assert plain.source is (FactorSource.FITTED if is_fitted else FactorSource.ROOFLINE)
    for model in (profiled, plain):
        assert model.costs().source is model.source
        assert LatencyModel.fitted(model.costs()).costs() == model.costs()
        assert all(0.0 <= factor < float("inf") for factor in model.factors)


def test_before_the_first_step_all_is_the_profiles() -> None:
    model, told = LatencyModel.profiled(PROFILE), LatencyModel.fitted(PROFILE)
    assert model.costs() == replace(PROFILE, num_steps=0, source=FactorSource.PROFILE)
    for shape in (decodes(1, 100), decodes(64, 64 * 2048), chunk(2048), chunk(128, 8000)):
        assert model.step_s(shape) == told.step_s(shape) != LatencyModel(LLAMA, H100).step_s(shape)


def test_the_first_step_of_its_own_says_how_far_off_it_is() -> None:
    model = LatencyModel.profiled(PROFILE)
    model.observe(chunk(2048), 2 * model.step_s(chunk(2048)))
    assert model.mean_error == pytest.approx(0.5)


def test_what_no_step_was_told_of_stays_the_profiles() -> None:
    model = LatencyModel.profiled(PROFILE)
    shape = decodes(64, 64 * 2048)
    before_s = model.step_s(shape)
    for _ in range(200):
        model.observe(shape, before_s * 1.5)
    assert model.step_s(shape) == pytest.approx(before_s * 1.5, rel=0.01)
    assert model.factors[3] == pytest.approx(PROFILE.factors[3], abs=1e-9)


def test_prompts_are_known_after_enough_steps_that_computed_some() -> None:
    model = LatencyModel(LLAMA, H100)
    for _ in range(ENOUGH_STEPS):
        model.observe(decodes(8, 800), 0.01)
    assert (model.costs().source, model.costs().knows_prompts) == (FactorSource.FITTED, False)
    for _ in range(ENOUGH_STEPS - 1):
        model.observe(decodes(8, 800) + chunk(100), 0.01)
    assert not model.costs().knows_prompts
    model.observe(chunk(100), 0.01)
    assert model.costs().knows_prompts
    assert LatencyModel.fitted(model.costs()).costs() == model.costs()
    assert PROFILE.source is FactorSource.FITTED
    assert replace(PROFILE, source=FactorSource.PROFILE).knows_prompts


def test_a_profile_that_is_far_off_is_soon_overruled() -> None:
    """Of another machine, or of this one with other work on it: also what it had as nothing."""
    truth = LatencyModel.fitted(replace(PROFILE, factors=(1.0, 2.0, 1.5, 0.8)))
    model = LatencyModel.profiled(PROFILE)
    kinds = (
        decodes(4, 4 * 500),
        decodes(64, 64 * 2048),
        chunk(512),
        chunk(1024, 6000),
        decodes(200, 200_000),
    )
    for i in range(100):
        model.observe(kinds[i % 5], truth.step_s(kinds[i % 5]))
    for shape in kinds:
        assert model.step_s(shape) == pytest.approx(truth.step_s(shape), rel=0.03)


def test_a_worker_begins_with_a_profile_of_its_model_and_device() -> None:
    here, named = replace(H100, memory_bytes=1e9, flops_per_s=1.0), replace(LLAMA, name="other-name")
    latency, problem = first_latency(PROFILE, named, here)
    assert problem is None
    # Speeds are the profile's, and the memory is the worker's.
    device = replace(H100, memory_bytes=1e9)
    expected = replace(PROFILE, model=named, device=device, num_steps=0, source=FactorSource.PROFILE)
    assert latency.costs() == expected
    latency, problem = first_latency(None, LLAMA, H100)
    assert (latency.source, problem) == (FactorSource.ROOFLINE, None)


def test_a_profile_of_another_device_leaves_the_roofline_and_one_of_another_model_is_refused() -> None:
    latency, problem = first_latency(PROFILE, LLAMA, replace(H100, name="h200"))
    assert latency.costs() == LatencyModel(LLAMA, replace(H100, name="h200")).costs()
    assert problem == "it is of h100, and this is h200"
    for key, value in (("num_layers", 31), ("weight_bytes", 1.0), ("kv_token_bytes", 65536)):
        with pytest.raises(ProfileError, match=f"{key} .* and not {value}; `phasewise calibrate`"):
            first_latency(PROFILE, replace(LLAMA, **{key: value}), H100)


@given(st.lists(st.tuples(shapes, st.floats(1e-4, 1.0)), max_size=40))
def test_shares_of_the_sms_are_those_of_the_profile_whatever_is_learnt(
    steps: list[tuple[StepShape, float]],
) -> None:
    other = replace(H100, compute_curve=((0.5, 0.9),), memory_curve=((0.5, 0.95),))
    model = LatencyModel.profiled(replace(PROFILE, device=other))
    plain = LatencyModel.profiled(PROFILE)
    (layout,), (known,) = layouts_of(model.device, [0.5]), layouts_of(plain.device, [0.5])
    assert layout.prefill_rate > known.prefill_rate
    for shape, measured_s in steps:
        model.observe(shape, measured_s)
        plain.observe(shape, measured_s)
    # Steps on the whole device say nothing of its parts.
    assert model.factors == plain.factors
    assert model.device == other
    assert model.step_s(chunk(2048), 0.5) <= plain.step_s(chunk(2048), 0.5)
