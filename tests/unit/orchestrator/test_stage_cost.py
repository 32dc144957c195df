"""What stages cost: the rules that any schedule obeys, and the stages of text and diffusion models."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.stage_cost import (
    Device,
    Pass,
    StageCost,
    Work,
    causal,
    decode,
    full,
    spatial,
    temporal,
    transformer,
)

AMOUNTS = st.floats(0, 1e9)
WORKS = st.builds(Work, AMOUNTS, AMOUNTS)
STAGES = st.builds(StageCost, WORKS, WORKS, WORKS)
PASSES = st.builds(Pass, st.integers(0, 10_000), st.integers(0, 10**8), st.integers(0, 50))
SCHEDULES = st.lists(PASSES, max_size=6)
DEVICES = st.builds(Device, st.floats(1e6, 1e15), st.floats(1e6, 1e13))
#: Of an H100's size: 1e15 FLOP/s, 3.3 TB/s.
LARGE = Device(1e15, 3.3e12)
#: Of a language model of 7 billion weights, 2 bytes each, 32 layers; KV of 128 KiB a token.
SHAPE = {"num_weights": 7 * 10**9, "weight_bytes": 2, "num_layers": 32, "hidden_size": 4096}
PREFILL, DECODE = transformer(**SHAPE), transformer(**SHAPE, pair_bytes=128 * 1024)


@settings(max_examples=100)
@given(stage=STAGES, device=DEVICES, first=SCHEDULES, second=SCHEDULES)
def test_schedules_add_up(stage: StageCost, device: Device, first: list[Pass], second: list[Pass]) -> None:
    both = stage.seconds(device, first) + stage.seconds(device, second)
    assert stage.seconds(device, [*first, *second]) == pytest.approx(both)


@settings(max_examples=100)
@given(stage=STAGES, device=DEVICES, schedule=SCHEDULES)
def test_no_stage_is_faster_than_either_roof_or_slower_than_both(
    stage: StageCost, device: Device, schedule: list[Pass]
) -> None:
    work, seconds = stage.work(schedule), stage.seconds(device, schedule)
    compute_s, move_s = work.flops / device.flops_per_s, work.num_bytes / device.bytes_per_s
    assert max(compute_s, move_s) <= seconds * (1 + 1e-9)
    assert seconds <= (compute_s + move_s) * (1 + 1e-9)


@settings(max_examples=100)
@given(stage=STAGES, device=DEVICES, one=PASSES, times=st.integers(0, 20))
def test_a_repeat_is_the_pass_once_more(stage: StageCost, device: Device, one: Pass, times: int) -> None:
    repeated = stage.seconds(device, [replace(one, repeats=times)])
    assert repeated == pytest.approx(stage.seconds(device, [replace(one, repeats=1)] * times))


@settings(max_examples=100)
@given(stage=STAGES, device=DEVICES, one=PASSES, more=PASSES)
def test_more_tokens_pairs_or_repeats_are_never_faster(
    stage: StageCost, device: Device, one: Pass, more: Pass
) -> None:
    larger = Pass(
        one.num_tokens + more.num_tokens, one.num_pairs + more.num_pairs, one.repeats + more.repeats
    )
    assert stage.seconds(device, [larger]) >= stage.seconds(device, [one])


@settings(max_examples=100)
@given(chunks=st.lists(st.integers(1, 500), min_size=1, max_size=8))
def test_a_prompt_in_chunks_has_the_same_tokens_and_pairs_and_reads_weights_for_each(
    chunks: list[int],
) -> None:
    parts = [causal(num, sum(chunks[:i])) for i, num in enumerate(chunks)]
    whole = causal(sum(chunks))
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert sum(part.num_pairs for part in parts) == whole.num_pairs
    assert PREFILL.work(parts).flops == pytest.approx(PREFILL.work([whole]).flops)
    assert PREFILL.work(parts).num_bytes == len(chunks) * PREFILL.work([whole]).num_bytes


def test_prefill_is_bound_by_computing_and_decode_by_memory() -> None:
    prompt, answer = [causal(2048)], decode(2048, 64)
    assert PREFILL.seconds(LARGE, prompt) == PREFILL.work(prompt).flops / LARGE.flops_per_s
    assert DECODE.seconds(LARGE, answer) == pytest.approx(DECODE.work(answer).num_bytes / LARGE.bytes_per_s)


def test_decode_reads_the_weights_and_the_kv_before_it_for_each_token() -> None:
    weights, kv = 2 * SHAPE["num_weights"], 128 * 1024
    assert DECODE.work(decode(100, 3)).num_bytes == 3 * weights + (101 + 102 + 103) * kv


def test_encoding_a_picture_in_two_tiles_needs_half_the_pairs() -> None:
    assert full(512, num_sequences=2).num_tokens == full(1024).num_tokens
    assert full(512, num_sequences=2).num_pairs == full(1024).num_pairs // 2


def test_steps_of_a_diffusion_model_are_bound_by_computing_as_prefill_is() -> None:
    # A U-Net's resolutions: the sequence is 4 times shorter at each, and back again; 50 steps with guidance, as two sequences.
    num_steps, lengths = 50, (4096, 1024, 256, 1024, 4096)
    schedule = [full(num, num_sequences=2, repeats=num_steps) for num in lengths]
    level = transformer(num_weights=20 * 10**6, weight_bytes=2, num_layers=4, hidden_size=640)
    work = level.work(schedule)
    assert level.seconds(LARGE, schedule) == pytest.approx(work.flops / LARGE.flops_per_s, rel=0.05)
    # Its mean length is no measure of it: attention grows with the square.
    mean = sum(lengths) // len(lengths)
    flat = [full(mean, num_sequences=2, repeats=num_steps)] * len(lengths)
    assert level.work(flat).flops < 0.95 * work.flops


def test_attention_over_time_grows_with_the_frames_and_attention_over_space_with_their_size() -> None:
    assert temporal(16, 1024).num_tokens == spatial(16, 1024).num_tokens
    assert temporal(32, 1024).num_pairs == 4 * temporal(16, 1024).num_pairs
    assert spatial(32, 1024).num_pairs == 2 * spatial(16, 1024).num_pairs
    assert temporal(16, 4096).num_pairs == 4 * temporal(16, 1024).num_pairs
    assert spatial(16, 4096).num_pairs == 16 * spatial(16, 1024).num_pairs
