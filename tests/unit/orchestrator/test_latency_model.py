"""Predictions of step times: the roofline against what an H100 was measured to take, and what learning makes of it."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers.latency_model import EncodeModel, LatencyModel, rate_at, roofline
from workers.loaded_shapes import cpu_shape
from workers.step_cost import StepCost
from workers.step_shape import DeviceShape, StepCosts, StepShape, chunk, decodes

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

#: Reading a token of context takes as long as attending to it, and much less than that.
AS_LONG = replace(H100, bytes_per_s=H100.attention_flops_per_s * LLAMA.kv_token_bytes / LLAMA.pair_flops)
FAST_MEMORY = replace(H100, bytes_per_s=1e15)

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


@given(
    st.tuples(*[st.floats(0, 5)] * 4),
    st.integers(1, 300),
    st.integers(0, 10**7),
    st.sampled_from([AS_LONG, FAST_MEMORY, *DEVICES.values()]),
)
def test_steps_of_decodes_alone_take_the_same_to_the_last_bit(
    factors: tuple[float, float, float, float], num_decodes: int, context: int, device: DeviceShape
) -> None:
    model = LatencyModel.fitted(StepCosts(LLAMA, device, factors, 1000, 0.1, 1.0))
    assert model.decode_steps(num_decodes).step_s(context) == model.step_s(decodes(num_decodes, context))


def seconds(shape: StepShape, factors: list[float]) -> float:
    parts = roofline(shape, LLAMA, H100)
    return sum(factor * part for factor, part in zip(factors, parts, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_steps_teach_it_what_the_roofline_does_not_know(seed: int) -> None:
    rng = random.Random(seed)
    truth = [rng.uniform(0.5, 2.0) for _ in range(4)]
    model = LatencyModel(LLAMA, H100)
    for _ in range(400):
        shape = decodes(rng.randint(0, 128), rng.randint(0, 300_000)) + chunk(
            rng.randint(1, 2048), rng.randint(0, 8192)
        )
        model.observe(shape, seconds(shape, truth) * rng.lognormvariate(0, 0.02))
    assert model.mean_error is not None
    assert model.mean_error < 0.03
    for shape, _ in MEASURED.values():
        assert model.step_s(shape) == pytest.approx(seconds(shape, truth), rel=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_predictions_are_the_mean_of_noisy_steps(seed: int) -> None:
    """Not their harmonic mean, which least squares of predicted / measured would give: 12 % less here."""
    rng, model, times_s = random.Random(seed), LatencyModel(LLAMA, H100), []
    shape = chunk(2048)
    for _ in range(3000):
        times_s.append(0.05 * rng.lognormvariate(0.0, 0.25))
        model.observe(shape, times_s[-1])
    assert model.step_s(shape) == pytest.approx(sum(times_s) / len(times_s), rel=0.04)


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


#: docs/simulation.md: steps of decodes on so many SMs, in seconds, beside prefills of 2,048 on the others, and the rate of both
#: together, each as a part of its rate alone.
BESIDE = {
    "64 of 2,048": (
        decodes(64, 64 * 2048),
        0.0119,
        {24: (0.0366, 0.99), 40: (0.0247, 1.06), 56: (0.0199, 1.09), 72: (0.0165, 1.05), 132: (0.0235, 1.06)},
    ),
    "16 of 16,384": (
        decodes(16, 16 * 16384),
        0.0173,
        {24: (0.0553, 0.94), 40: (0.0390, 1.00), 56: (0.0308, 1.02), 72: (0.0236, 1.03), 132: (0.0311, 1.05)},
    ),
    "256 of 768": (
        decodes(256, 256 * 768),
        0.0166,
        {24: (0.0722, 0.88), 40: (0.0466, 0.94), 56: (0.0357, 0.97), 72: (0.0275, 0.97), 132: (0.0307, 1.02)},
    ),
}
PREFILL_S = 0.051


def streams() -> list[tuple[str, float, float, float]]:
    """(name, predicted, upper, measured) of each stream of each pair. 132 SMs: both on all of them."""
    model, prefill, found = LatencyModel(LLAMA, H100), chunk(2048), []
    for name, (decode, alone_s, rows) in BESIDE.items():
        for sms, (decode_s, combined) in rows.items():
            share, rest = (sms / 132, 1 - sms / 132) if sms < 132 else (1.0, 1.0)
            prefill_s = PREFILL_S / (combined - alone_s / decode_s)
            for what, shape, part, beside, measured_s in (
                ("decode", decode, share, prefill, decode_s),
                ("prefill", prefill, rest, decode, prefill_s),
            ):
                predicted_s = model.stream_s(shape, part, beside)
                upper_s = model.upper_stream_s(shape, part, beside)
                found.append((f"{what}, {name}, {sms} SMs", predicted_s, upper_s, measured_s))
    return found


def test_streams_beside_each_other_take_what_an_h100_was_measured_to_take() -> None:
    off = {name: abs(predicted_s / measured_s - 1) for name, predicted_s, _, measured_s in streams()}
    assert max(off.values()) < 0.22, off
    assert sum(off.values()) / len(off) < 0.06
    num_over = sum(measured_s > upper_s for _, _, upper_s, measured_s in streams())
    assert num_over <= len(off) / 10


@given(shapes, shapes, st.floats(0.05, 0.95), st.floats(0.0, 0.05))
def test_company_and_fewer_sms_never_take_less_time(
    shape: StepShape, beside: StepShape, share: float, less: float
) -> None:
    model = LatencyModel(LLAMA, H100)
    together_s = model.stream_s(shape, share, beside)
    assert together_s >= model.stream_s(shape, share, None) >= model.step_s(shape)
    assert model.stream_s(shape, max(0.01, share - less), beside) >= together_s
    assert model.stream_s(shape, 1.0, beside) >= model.step_s(shape)
    assert model.upper_stream_s(shape, share, beside) >= together_s


def test_rates_are_on_lines_through_the_curve() -> None:
    curve = ((0.2, 0.4), (0.6, 0.8))
    assert rate_at(0.1, curve) == pytest.approx(0.2)
    assert rate_at(0.4, curve) == pytest.approx(0.6)
    assert rate_at(0.8, curve) == pytest.approx(0.9)
    assert rate_at(0.25, ()) == 0.25
    assert rate_at(1.0, curve) == 1.0


def test_kv_takes_what_the_way_to_a_peer_was_measured_to_carry() -> None:
    model = LatencyModel(LLAMA, H100)
    assert model.transfer_s(1000) == pytest.approx(1000 * 131_072 / 160e9)
    assert model.transfer_s(1000, bytes_per_s=1e9) == pytest.approx(0.131072)


@given(st.lists(st.tuples(shapes, st.floats(1e-4, 10.0)), max_size=30), shapes)
def test_what_a_model_tells_of_itself_predicts_as_it_does(
    steps: list[tuple[StepShape, float]], shape: StepShape
) -> None:
    model = LatencyModel(LLAMA, H100)
    for seen, measured_s in steps:
        model.observe(seen, measured_s)
    told = LatencyModel.fitted(model.costs())
    assert told.costs() == model.costs()
    assert told.step_s(shape) == model.step_s(shape)
    told.observe(chunk(512), 1e3)
    assert told.step_s(shape) == model.step_s(shape)


@pytest.mark.parametrize("num_threads", [1, 8])
def test_a_cpu_that_nobody_measured_is_learned_from_its_steps(num_threads: int) -> None:
    """Times of SmolLM2-135M on one core (benchmarks/results/decode_step.json): one token, four, 16, and two chunks."""
    measured = {
        decodes(1, 100): 0.032,
        decodes(4, 4 * 560): 0.041,
        decodes(16, 16 * 100): 0.073,
        chunk(256): 0.607,
        chunk(512): 1.290,
    }
    model = LatencyModel(MODELS["smollm2-135m"], cpu_shape(num_threads, 2**34))
    for _ in range(20):
        for shape, measured_s in measured.items():
            model.observe(shape, measured_s)
    for shape, measured_s in measured.items():
        assert model.step_s(shape) == pytest.approx(measured_s, rel=0.16)


def test_batches_of_pictures_are_a_line_through_their_patches() -> None:
    model, rng = EncodeModel(), random.Random(3)
    assert model.costs().mean_error is None
    for _ in range(200):
        num_patches = rng.randint(64, 4096)
        model.observe(num_patches, 0.02 + 0.0004 * num_patches)
    costs = model.costs()
    assert costs.batch_s == pytest.approx(0.02, rel=0.02)
    assert costs.patch_s == pytest.approx(0.0004, rel=0.02)
    assert costs.num_batches == 200
    assert model.encode_s(1000) == pytest.approx(0.42, rel=0.01)


@given(st.lists(st.tuples(shapes, st.floats(-1.0, 1e6)), max_size=60))
def test_whatever_is_observed_predictions_stay_numbers(steps: list[tuple[StepShape, float]]) -> None:
    model = LatencyModel(LLAMA, H100)
    for shape, measured_s in steps:
        model.observe(shape, measured_s)
    for shape, _ in MEASURED.values():
        assert 0.0 <= model.step_s(shape) < float("inf")


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_are_much_alike_do_not_make_it_forget_how_their_parts_differ(seed: int) -> None:
    """An engine that fills each step up to the same length computes such steps for hours."""
    rng = random.Random(seed)
    real = LatencyModel.fitted(
        StepCosts(MODELS["llama-3-8b"], DEVICES["h100"], (2.3, 0.9, 1.2, 1.7), 100, 0.05, 1.1)
    )
    model = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"])

    def compute(shape: StepShape) -> None:
        # Products are computed in tiles of 128 rows.
        padding_s = 22e-6 * (-shape.num_tokens % 128) if shape.num_prefill_tokens else 0.0
        model.observe(shape, (real.step_s(shape) + padding_s) * rng.gauss(1.0, 0.05))

    for i in range(400):
        num = rng.randrange(5, 60)
        compute(
            decodes(num, num * 1100) + (chunk(rng.choice([300, 1000, 1900])) if i % 5 == 0 else StepShape())
        )
    num = 60
    for i in range(6000):
        num = min(250, max(20, num + rng.choice((-1, 0, 1))))
        context = int(num * (1000 + 100 * math.sin(i / 300)))
        num_tokens = StepCost.of(model).tokens_within(num, context, 0, 0.0285)
        compute(decodes(num, context) + (chunk(num_tokens) if num_tokens else StepShape()))
    for shape in (decodes(16, 16 * 16384), decodes(200, 200_000), chunk(2048), decodes(1, 1000)):
        assert model.step_s(shape) == pytest.approx(real.step_s(shape), rel=0.15)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_it_follows_a_machine_that_gets_slower_or_faster(factor: float) -> None:
    """Within 5,000 steps that are much alike, a few minutes of an H100."""
    rng = random.Random(1)
    real = LatencyModel.fitted(StepCosts(LLAMA, H100, (2.3, 0.9, 1.2, 1.7), 100, 0.05, 1.1))
    model, speed = LatencyModel(LLAMA, H100), 1.0
    for i in range(8000):
        speed = factor if i >= 3000 else 1.0
        num = 80 + 60 * (i // 50 % 2)
        num_tokens = rng.randrange(300, 900) if i % 3 else 0
        shape = decodes(num, num * 1000) + (chunk(num_tokens) if num_tokens else StepShape())
        model.observe(shape, speed * real.step_s(shape) * rng.gauss(1.0, 0.03))
    for shape in (decodes(100, 100_000), decodes(100, 100_000) + chunk(600), chunk(2048)):
        assert model.step_s(shape) == pytest.approx(factor * real.step_s(shape), rel=0.1)
