"""Frames to bytes and back; damage of any kind is seen and typed."""

import google_crc32c
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from kvtransfer.errors import CorruptFrame, MalformedFrame
from kvtransfer.frames import (
    Abort,
    Ack,
    Chunk,
    Codec,
    Commit,
    Committed,
    Ended,
    Finish,
    Frame,
    Granted,
    Nack,
    Refused,
    Renew,
    Reserve,
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import DTYPE_BYTES, KvLayout
from kvtransfer.wire import CHUNK_HEADER_BYTES, MAX_CONTROL_BYTES, MAX_REASON_CHARS, decode, encode
from protos import kvtransfer_pb2 as pb

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
COUNTS = st.integers(1, 2**32 - 1)
DURATIONS = st.floats(1e-6, 1e9)
REASONS = st.text(max_size=50)
LAYOUTS = st.builds(
    KvLayout, REASONS, st.sampled_from(sorted(DTYPE_BYTES)), COUNTS, COUNTS, COUNTS, COUNTS, REASONS
)
TOKENS = st.tuples(COUNTS, COUNTS).map(sorted)
RESERVES = st.builds(
    lambda transfer_id, layout, tokens, incarnation, timeout_s: Reserve(
        transfer_id, layout, *tokens, incarnation, timeout_s
    ),
    st.text(min_size=1, max_size=50),
    LAYOUTS,
    TOKENS,
    U64,
    DURATIONS,
)
RANGES = st.builds(
    lambda layers, blocks: KvRange(*sorted(layers), *sorted(blocks)),
    st.sets(U16, min_size=2, max_size=2),
    st.sets(U32, min_size=2, max_size=2),
)
CHUNKS = st.builds(
    Chunk, U64, U64, U32, RANGES, st.just(Codec.NONE), st.binary(min_size=1, max_size=200).map(memoryview)
)
CONTROL_FRAMES = st.one_of(
    RESERVES,
    st.just(Renew()),
    st.builds(Finish, U32),
    st.builds(Commit, st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8).map(tuple)),
    st.builds(Abort, REASONS),
    st.builds(Granted, U64, U64, COUNTS, DURATIONS),
    st.builds(Refused, REASONS, st.booleans()),
    st.builds(Ack, U32),
    st.builds(Nack, U32, REASONS),
    st.just(Verified()),
    st.just(Committed()),
    st.builds(Ended, REASONS),
)
FRAMES = st.one_of(CONTROL_FRAMES, CHUNKS)
CHUNK = Chunk(5, 9, 3, KvRange(1, 2, 3, 4), Codec.NONE, memoryview(bytes(range(64))))


def sealed(body: bytes) -> bytes:
    """A message whose checksum is right, whatever it holds."""
    return google_crc32c.value(body).to_bytes(4, "little") + body


@given(FRAMES)
def test_what_is_encoded_is_decoded(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(FRAMES, st.data())
def test_a_flipped_bit_is_seen(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode(frame))
    bit = data.draw(st.integers(0, len(message) * 8 - 1))
    message[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CorruptFrame):
        decode(bytes(message))


@given(FRAMES, st.data())
def test_a_burst_of_up_to_four_bytes_is_seen(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode(frame))
    start = data.draw(st.integers(0, len(message) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=4))[: len(message) - start]
    if not any(burst):
        return
    for offset, byte in enumerate(burst):
        message[start + offset] ^= byte
    with pytest.raises(CorruptFrame):
        decode(bytes(message))


@given(FRAMES, st.data())
def test_a_cut_message_is_seen(frame: Frame, data: st.DataObject) -> None:
    message = encode(frame)
    with pytest.raises(MalformedFrame):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])


@given(FRAMES, st.binary(min_size=1, max_size=8))
def test_bytes_too_many_are_seen(frame: Frame, tail: bytes) -> None:
    with pytest.raises(CorruptFrame):
        decode(encode(frame) + tail)


@given(st.binary(max_size=200))
@example(b"")
@example(bytes(5))
def test_random_bytes_are_no_frame(message: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode(message)


@given(st.binary(max_size=200))
def test_random_bytes_with_a_right_checksum_are_a_frame_or_malformed(body: bytes) -> None:
    try:
        frame = decode(sealed(body))
    except MalformedFrame as error:
        event(error.problem)
        return
    assert decode(encode(frame)) == frame


@given(st.binary(max_size=100))
def test_a_random_control_frame_is_a_frame_or_malformed(body: bytes) -> None:
    try:
        frame = decode(sealed(b"\0" + body))
    except MalformedFrame as error:
        event(error.problem)
        return
    assert not isinstance(frame, Chunk)


def test_a_damaged_chunk_says_which_it_was() -> None:
    message = bytearray(encode(CHUNK))
    message[-1] ^= 1
    with pytest.raises(CorruptFrame) as caught:
        decode(bytes(message))
    assert caught.value.sequence_number == 3


def test_a_damaged_control_frame_says_that_it_was_no_chunk() -> None:
    message = bytearray(encode(Ack(7)))
    message[-1] ^= 1
    with pytest.raises(CorruptFrame) as caught:
        decode(bytes(message))
    assert caught.value.sequence_number is None


def test_the_payload_is_a_view_of_the_message() -> None:
    message = encode(CHUNK)
    chunk = decode(message)
    assert isinstance(chunk, Chunk)
    assert chunk.payload.obj is message
    assert chunk.payload == CHUNK.payload
    assert CHUNK_HEADER_BYTES % 8 == 0


def test_a_long_reason_is_cut_not_refused() -> None:
    frame = decode(encode(Ended("x" * 10_000)))
    assert frame == Ended("x" * MAX_REASON_CHARS)


LAYOUT = KvLayout("d", "float16", 16, 30, 3, 64, "rope")
MALFORMED: list[tuple[str, bytes]] = [
    ("kind 9", b"\x09abc"),
    ("kind 1", b"\x01short"),
    ("without content", b"\0"),
    ("cannot be parsed", b"\0\xff\xff"),
    ("at most", b"\0" + pb.ControlFrame(abort=pb.Abort(reason="x" * MAX_CONTROL_BYTES)).SerializeToString()),
]


@pytest.mark.parametrize(("problem", "body"), MALFORMED, ids=[problem for problem, _ in MALFORMED])
def test_bytes_of_no_frame_are_refused_with_the_reason(problem: str, body: bytes) -> None:
    with pytest.raises(MalformedFrame, match=problem):
        decode(sealed(body))


IMPOSSIBLE: list[tuple[str, Frame]] = [
    ("transfer id", Reserve("", LAYOUT, 1, 1, 0, 1.0)),
    ("transfer id", Reserve("x" * 257, LAYOUT, 1, 1, 0, 1.0)),
    ("0 tokens", Reserve("t", LAYOUT, 0, 1, 0, 1.0)),
    ("may grow to 4", Reserve("t", LAYOUT, 5, 4, 0, 1.0)),
    ("timeout", Reserve("t", LAYOUT, 1, 1, 0, float("nan"))),
    ("timeout", Reserve("t", LAYOUT, 1, 1, 0, float("inf"))),
    ("timeout", Reserve("t", LAYOUT, 1, 1, 0, 0.0)),
    ("dtype 'int3'", Reserve("t", KvLayout("d", "int3", 1, 1, 1, 1, ""), 1, 1, 0, 1.0)),
    ("zero dimension", Reserve("t", KvLayout("d", "float16", 0, 1, 1, 1, ""), 1, 1, 0, 1.0)),
    ("token ids", Commit(())),
    ("token ids", Commit((1, -1))),
    ("0 credits", Granted(1, 1, 0, 1.0)),
    ("-1.0 s", Granted(1, 1, 1, -1.0)),
    ("hold nothing", Chunk(1, 1, 0, KvRange(2, 2, 0, 1), Codec.NONE, memoryview(b"x"))),
    ("hold nothing", Chunk(1, 1, 0, KvRange(0, 1, 5, 1), Codec.NONE, memoryview(b"x"))),
]


@pytest.mark.parametrize(("problem", "frame"), IMPOSSIBLE, ids=[problem for problem, _ in IMPOSSIBLE])
def test_frames_that_no_honest_peer_sends_are_refused(problem: str, frame: Frame) -> None:
    with pytest.raises(MalformedFrame, match=problem):
        decode(encode(frame))


def test_an_unknown_codec_is_refused() -> None:
    body = bytearray(encode(CHUNK)[4:])
    body[1] = 200
    with pytest.raises(MalformedFrame, match="codec 200"):
        decode(sealed(bytes(body)))


def test_a_field_of_a_newer_version_is_ignored() -> None:
    newer = pb.ControlFrame(ack=pb.Ack(sequence_number=7)).SerializeToString() + b"\xfa\x01\x02hi"
    assert decode(sealed(b"\0" + newer)) == Ack(7)
