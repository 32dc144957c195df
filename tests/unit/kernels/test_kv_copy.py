"""Copies with a CRC32C: by our kernel, and by numpy and google_crc32c, against the specification."""

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels import jit
from phasewise_kernels.kv_copy import kernel, op
from phasewise_kernels.kv_copy.reference import copy_pieces_reference, crc32c_reference

KERNEL = "phasewise_kernels.kv_copy.kernel"


@pytest.fixture(params=["kernel", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "numpy":
        monkeypatch.setitem(jit._loaded, KERNEL, None)
    assert op.has_kernel() == (name == "kernel")
    return name


def random_bytes(size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def aligned_zeros(size: int) -> npt.NDArray[np.uint8]:
    room = np.zeros(size + 64, np.uint8)
    begin = -room.__array_interface__["data"][0] % 64
    return room[begin : begin + size]


def offsets(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


def test_the_reference_is_crc32c() -> None:
    assert crc32c_reference(b"123456789") == 0xE3069283
    assert crc32c_reference(b"") == 0
    data = random_bytes(300).tobytes()
    assert crc32c_reference(data[100:], crc32c_reference(data[:100])) == google_crc32c.value(data)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("begin", [0, 1, 8, 37])
def test_every_length_around_words_lines_and_tiles_has_its_checksum(begin: int) -> None:
    data = random_bytes(3 * 2048 + 200)
    lengths = {*range(80), *(k * 2048 + d for k in (1, 2, 3) for d in (-65, -8, -1, 0, 1, 7, 8, 63, 64, 65))}
    for length in lengths:
        piece = data[begin : begin + length]
        assert op.crc32c(piece) == google_crc32c.value(piece.tobytes()), length


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("target_begin", [0, 1, 8, 32, 64])
@pytest.mark.parametrize("source_begin", [0, 3, 64])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 200, 2047, 2048, 2049, 6144, 10_000])
def test_a_copy_is_whole_and_touches_nothing_else(source_begin: int, target_begin: int, length: int) -> None:
    source, target = random_bytes(source_begin + length), aligned_zeros(length + 200)
    place = offsets(source_begin), target, offsets(target_begin), offsets(length)
    checksum = op.copy_pieces(source, *place)
    expected = np.zeros_like(target)
    expected[target_begin : target_begin + length] = source[source_begin:]
    assert np.array_equal(target, expected)
    assert checksum == google_crc32c.value(source[source_begin:].tobytes())


@pytest.mark.parametrize("is_kernel", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 1000), st.integers(0, 40)), min_size=0, max_size=12
    ),
    start=st.integers(0, 2**32 - 1),
)
def test_pieces_of_any_place_and_length_are_as_specified(
    pieces: list[tuple[int, int, int]], start: int, is_kernel: bool
) -> None:
    # (place in the source, length, gap before it in the target)
    source = random_bytes(1900)
    ends = np.cumsum([length + gap for _, length, gap in pieces], dtype=np.int64)
    lengths = offsets(*(length for _, length, _ in pieces))
    places = offsets(*(place for place, _, _ in pieces)), ends - lengths
    target = np.zeros(int(ends[-1]) if pieces else 0, np.uint8)
    expected = bytearray(target.size)
    columns = source.tobytes(), places[0].tolist(), expected, places[1].tolist(), lengths.tolist()
    expected_checksum = copy_pieces_reference(*columns, start)
    with pytest.MonkeyPatch.context() as patch:
        if not is_kernel:
            patch.setitem(jit._loaded, KERNEL, None)
        assert op.checksum_pieces(source, places[0], lengths, start) == expected_checksum
        assert op.copy_pieces(source, places[0], target, places[1], lengths, start) == expected_checksum
    assert target.tobytes() == bytes(expected)


@pytest.mark.usefixtures("way")
def test_read_only_memory_can_be_the_source() -> None:
    source = np.frombuffer(random_bytes(5000).tobytes(), np.uint8)
    target = np.zeros(5000, np.uint8)
    assert op.copy_pieces(source, offsets(0), target, offsets(0), offsets(5000)) == op.crc32c(source)
    assert np.array_equal(source, target)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("place", "length"), [(-1, 5), (96, 5), (0, 101), (101, 0), (5, -1), (2**63 - 1, 5), (5, 2**63 - 1)]
)
def test_a_piece_outside_of_its_memory_is_refused_before_anything_is_copied(place: int, length: int) -> None:
    inside, outside = offsets(0, 0), offsets(0, place)
    lengths, room = offsets(1, length), np.zeros(100, np.uint8)
    data = random_bytes(100)
    for at, to in ((outside, inside), (inside, outside)):
        if at is inside and 0 <= length <= 100 and 0 <= place <= 95:
            continue
        with pytest.raises(ValueError, match="not within the 100 bytes"):
            op.copy_pieces(data, at, room, to, lengths)
    with pytest.raises(ValueError, match="not within the 100 bytes"):
        op.checksum_pieces(data, outside, lengths)
    assert not room.any()


@pytest.mark.usefixtures("way")
def test_what_is_no_row_of_bytes_and_what_cannot_be_written_is_refused() -> None:
    data, one = random_bytes(100), offsets(0)
    with pytest.raises(ValueError, match="no row of bytes"):
        op.crc32c(data[::2])
    with pytest.raises(ValueError, match="offsets"):
        op.checksum_pieces(data, offsets(0, 1), offsets(1))
    frozen = np.frombuffer(data.tobytes(), np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        op.copy_pieces(data, one, frozen, one, offsets(10))


@pytest.mark.parametrize("features", ["", "+avx2"])
def test_without_the_instruction_nothing_is_compiled_and_results_are_the_same(
    features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert op.has_kernel()
    monkeypatch.setattr("numba.core.config.CPU_FEATURES", features)
    monkeypatch.setattr(kernel, "has_instruction", kernel.has_instruction.__wrapped__)
    assert not op.has_kernel()
    data = random_bytes(10_000)
    assert op.crc32c(data) == google_crc32c.value(data.tobytes())


@pytest.mark.usefixtures("way")
def test_every_flipped_bit_changes_the_checksum() -> None:
    data = random_bytes(4096)
    right = op.crc32c(data)
    for bit in range(0, 4096 * 8, 97):
        data[bit // 8] ^= 1 << bit % 8
        assert op.crc32c(data) != right, bit
        data[bit // 8] ^= 1 << bit % 8
