"""A codec is taken when it makes a transfer a fifth faster, and not otherwise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.codecs.choice import CHUNK_BYTES, MIN_SAVING, CodecRates, choose_codec, transfer_s
from kvtransfer.codecs.codec import CodecId
from kvtransfer.codecs.names import CODEC_NAMES

FP8 = CodecRates(ratio=0.5, pack_bytes_per_s=1e9, unpack_bytes_per_s=2e9)
INT4 = CodecRates(ratio=0.28, pack_bytes_per_s=4e8, unpack_bytes_per_s=5e8)
RATES = {CodecId.FP8: FP8, CodecId.INT4_HADAMARD: INT4}
BOTH = (CodecId.FP8, CodecId.INT4_HADAMARD)
HAND_OFF_BYTES = 47_000_000

positive = st.floats(1e3, 1e12)
codec_rates = st.builds(CodecRates, st.floats(0.01, 1.5), positive, positive)


def chosen(link_bytes_per_s: float, num_bytes: int = HAND_OFF_BYTES) -> CodecId:
    codec, reason = choose_codec(BOTH, num_bytes=num_bytes, link_bytes_per_s=link_bytes_per_s, rates=RATES)
    assert reason
    return codec


def test_a_fast_link_never_packs() -> None:
    assert chosen(10e9) is CodecId.NONE


def test_the_slower_the_link_the_smaller_the_codec() -> None:
    assert chosen(500e6) is CodecId.FP8
    assert chosen(20e6) is CodecId.INT4_HADAMARD


def test_the_break_even_is_where_the_formula_says() -> None:
    # In a long transfer packing is the slowest stage here: 1e9 bytes/s must be a fifth less time than the link takes.
    num_bytes, break_even = 10**13, 0.8e9
    only_fp8 = {CodecId.FP8: FP8}
    for link, expected in ((break_even * 1.01, CodecId.NONE), (break_even * 0.99, CodecId.FP8)):
        codec, _ = choose_codec(BOTH, num_bytes=num_bytes, link_bytes_per_s=link, rates=only_fp8)
        assert codec is expected


def test_one_chunk_goes_through_all_stages_one_after_the_other() -> None:
    assert transfer_s(CHUNK_BYTES, 1e8, FP8) == pytest.approx(CHUNK_BYTES * (1e-9 + 0.5e-8 + 0.5e-9))
    three = transfer_s(3 * CHUNK_BYTES, 1e8, FP8)
    assert three == pytest.approx(transfer_s(CHUNK_BYTES, 1e8, FP8) + 2 * CHUNK_BYTES * 0.5e-8)


def test_a_short_transfer_cannot_overlap_and_is_sent_as_it_is() -> None:
    link = 0.7e9
    assert chosen(link, num_bytes=10**12) is CodecId.FP8
    assert chosen(link, num_bytes=1000) is CodecId.NONE
    assert chosen(link, num_bytes=0) is CodecId.NONE


def test_an_unknown_link_or_codec_is_a_reason_to_send_kv_as_it_is() -> None:
    for link in (0.0, None):
        assert choose_codec(BOTH, num_bytes=1, link_bytes_per_s=link, rates=RATES) == (
            CodecId.NONE,
            "the rate of the link is not known yet",
        )
    assert choose_codec(BOTH, num_bytes=1, link_bytes_per_s=1, rates={}) == (
        CodecId.NONE,
        "no codec's rates are known yet",
    )
    assert choose_codec((CodecId.NONE,), num_bytes=1, link_bytes_per_s=1, rates=RATES)[0] is CodecId.NONE


def test_the_reason_names_both_times() -> None:
    _, reason = choose_codec(BOTH, num_bytes=HAND_OFF_BYTES, link_bytes_per_s=100e6, rates=RATES)
    assert reason == "47.0 MB over 100 MB/s: 169.3 ms with int4_hadamard, 470.0 ms without"


def test_of_equally_fast_codecs_the_first_candidate_is_taken() -> None:
    rates = dict.fromkeys(BOTH, FP8)
    for candidates in (BOTH, BOTH[::-1]):
        found = choose_codec(candidates, num_bytes=HAND_OFF_BYTES, link_bytes_per_s=1e8, rates=rates)
        assert found[0] is candidates[0]


@given(st.integers(0, 10**12), positive, st.dictionaries(st.sampled_from(BOTH), codec_rates))
def test_what_is_chosen_saves_enough_and_nothing_else_is_faster(
    num_bytes: int, link: float, rates: dict[CodecId, CodecRates]
) -> None:
    codec, _ = choose_codec(BOTH, num_bytes=num_bytes, link_bytes_per_s=link, rates=rates)
    limit_s = transfer_s(num_bytes, link, None) * (1 - MIN_SAVING)
    times = {found: transfer_s(num_bytes, link, each) for found, each in rates.items()}
    if codec is CodecId.NONE:
        assert num_bytes == 0 or all(time_s > limit_s for time_s in times.values())
    else:
        assert times[codec] <= limit_s
        assert times[codec] == min(times.values())


def test_every_codec_has_one_name() -> None:
    assert {name: codec for codec, name in CODEC_NAMES.items()} == {
        "none": CodecId.NONE,
        "fp8": CodecId.FP8,
        "int4_hadamard": CodecId.INT4_HADAMARD,
        "gear": CodecId.GEAR,
        "gear_l": CodecId.GEAR_L,
    }
    assert set(CODEC_NAMES) == set(CodecId)
