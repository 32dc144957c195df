"""Predictions of step times: the roofline against what an H100 was measured to take, and what learning makes of it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers.latency_model import LatencyModel, roofline
from workers.step_shape import StepShape, chunk, decodes

LLAMA, H100 = MODELS["llama-3-8b"], DEVICES["h100"]
#: docs/simulation.md: what was measured, in seconds.
MEASURED = {
    "prefill of 2,048": (chunk(2048), 0.051),
    "decode, 64 of 2,048": (decodes(64, 64 * 2048), 0.0119),
    "decode, 16 of 16,384": (decodes(16, 16 * 16384), 0.0173),
    "decode, 256 of 768": (decodes(256, 256 * 768), 0.0166),
    "512 tokens, 64 of 2,048": (decodes(64, 64 * 2048) + chunk(448), 0.0188),
    "1,024 tokens, 64 of 2,048": (decodes(64, 64 * 2048) + chunk(960), 0.0310),
    "2,048 tokens, 64 of 2,048": (decodes(64, 64 * 2048) + chunk(1984), 0.0563),
    "512 tokens, 16 of 16,384": (decodes(16, 16 * 16384) + chunk(496), 0.0244),
    "512 tokens, 256 of 768": (decodes(256, 256 * 768) + chunk(256), 0.0218),
}

shapes = st.builds(
    StepShape,
    num_decodes=st.integers(0, 256),
    decode_context=st.integers(0, 10**6),
    num_prefill_tokens=st.integers(0, 8192),
    prefill_pairs=st.integers(0, 10**8),
)


@pytest.mark.parametrize("name", MEASURED)
def test_the_roofline_is_near_what_an_h100_was_measured_to_take(name: str) -> None:
    shape, measured_s = MEASURED[name]
    assert LatencyModel(LLAMA, H100).step_s(shape) == pytest.approx(measured_s, rel=0.12)


@given(shapes, shapes, st.sampled_from([1.0, 0.7, 0.5, 0.2]))
def test_more_work_and_fewer_sms_never_take_less_time(one: StepShape, more: StepShape, share: float) -> None:
    model = LatencyModel(LLAMA, H100)
    assert model.step_s(one + more, share) >= model.step_s(one, share)
    assert model.step_s(one, share) >= model.step_s(one)


def test_no_step_takes_no_time() -> None:
    assert LatencyModel(LLAMA, H100).step_s(StepShape()) == 0.0


def test_a_chunk_attends_to_what_is_before_it() -> None:
    assert chunk(2, 3).prefill_pairs == 2 * 3 + 2 + 1
    halves = chunk(1024) + chunk(1024, 1024)
    assert halves == StepShape(num_prefill_tokens=2048, prefill_pairs=chunk(2048).prefill_pairs)


def test_a_prompt_in_chunks_costs_the_overhead_of_each() -> None:
    model = LatencyModel(LLAMA, H100)
    assert model.prefill_s(2048, chunk_tokens=2048) == pytest.approx(model.step_s(chunk(2048)))
    assert model.prefill_s(2048, chunk_tokens=512) == pytest.approx(
        sum(model.step_s(chunk(512, done)) for done in range(0, 2048, 512))
    )


@pytest.mark.parametrize("seed", range(5))
def test_steps_teach_it_what_the_roofline_does_not_know(seed: int) -> None:
    rng = random.Random(seed)
    truth = [rng.uniform(0.5, 2.0) for _ in range(4)]
    model = LatencyModel(LLAMA, H100)
    for _ in range(400):
        shape = decodes(rng.randint(0, 128), rng.randint(0, 300_000)) + chunk(
            rng.randint(1, 2048), rng.randint(0, 8192)
        )
        row = roofline(shape, LLAMA, H100)
        model.observe(shape, float(row @ truth) * rng.lognormvariate(0, 0.02))
    assert model.mean_error is not None
    assert model.mean_error < 0.03
    for shape, _ in MEASURED.values():
        assert model.step_s(shape) == pytest.approx(float(roofline(shape, LLAMA, H100) @ truth), rel=0.06)


def test_what_no_step_was_told_of_stays_the_roofline() -> None:
    model = LatencyModel(LLAMA, H100)
    for _ in range(200):
        model.observe(decodes(64, 64 * 2048), 0.0119 * 1.5)
    assert model.step_s(decodes(64, 64 * 2048)) == pytest.approx(0.0119 * 1.5, rel=0.01)
    assert model.factors[3] == pytest.approx(1.0, abs=1e-9)


def test_a_machine_that_was_suspended_is_soon_forgotten() -> None:
    model = LatencyModel(LLAMA, H100)
    shape = decodes(64, 64 * 2048)
    for _ in range(500):
        model.observe(shape, 0.0119)
    model.observe(shape, 3600.0)
    assert model.step_s(shape) < 0.0119 * 1.5
    for _ in range(500):
        model.observe(shape, 0.0119)
    assert model.step_s(shape) == pytest.approx(0.0119, rel=0.02)


def test_a_model_that_does_not_learn_still_knows_its_error() -> None:
    model = LatencyModel(LLAMA, H100, is_learning=False)
    shape = chunk(2048)
    before_s = model.step_s(shape)
    for _ in range(50):
        model.observe(shape, before_s * 2)
    assert model.step_s(shape) == before_s
    assert model.mean_error == pytest.approx(0.5)


def test_about_a_tenth_of_all_steps_takes_longer_than_the_upper_ratio_says() -> None:
    rng = random.Random(1)
    model = LatencyModel(LLAMA, H100, is_learning=False)
    shape, ratios = chunk(2048), []
    expected_s = model.step_s(shape)
    for _ in range(6000):
        ratio = rng.lognormvariate(0, 0.1)
        ratios.append(ratio > model.upper_ratio)
        model.observe(shape, expected_s * ratio)
    assert sum(ratios[2000:]) / 4000 == pytest.approx(0.1, abs=0.03)


@given(st.lists(st.tuples(shapes, st.floats(-1.0, 1e6)), max_size=60))
def test_whatever_is_observed_predictions_stay_numbers(steps: list[tuple[StepShape, float]]) -> None:
    model = LatencyModel(LLAMA, H100)
    for shape, measured_s in steps:
        model.observe(shape, measured_s)
    for shape, _ in MEASURED.values():
        assert 0.0 <= model.step_s(shape) < float("inf")
