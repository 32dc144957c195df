"""Frames to bytes and back; damage of any kind is seen and typed."""

from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from kvtransfer.codecs.codec import CodecId
from kvtransfer.control_wire import MAX_REASON_CHARS
from kvtransfer.digest import DIGEST_BYTES
from kvtransfer.errors import CorruptFrame, MalformedFrame
from kvtransfer.frames import (
    Abort,
    Ack,
    Announce,
    Attach,
    Chunk,
    Commit,
    Committed,
    Ended,
    Fetch,
    Finish,
    Frame,
    Granted,
    Nack,
    Refused,
    Renew,
    Reserve,
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import DTYPE_BITS, INT4, KvLayout
from kvtransfer.pool import PoolOffer
from kvtransfer.wire import (
    CHUNK_HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_OFFER_BYTES,
    MAX_OFFERS,
    MAX_PARTS,
    chunk_header,
    decode,
    encode,
)
from protos import kvtransfer_pb2 as pb

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
COUNTS = st.integers(1, 2**32 - 1)
DURATIONS = st.floats(1e-6, 1e9)
REASONS = st.text(max_size=50)
HEADS = st.sets(U16, min_size=2, max_size=2).map(lambda ends: tuple(sorted(ends)))
LAYOUTS = st.builds(
    lambda model, dtype, sizes, position_encoding, heads, weights: KvLayout(
        model,
        dtype,
        *sizes[:2],
        max(sizes[2], heads[1]),
        64 if dtype == INT4 else sizes[3],
        position_encoding,
        *heads,
        weights,
    ),
    REASONS,
    st.sampled_from(sorted(DTYPE_BITS)),
    st.tuples(COUNTS, COUNTS, COUNTS, COUNTS),
    REASONS,
    st.one_of(st.just((0, 0)), HEADS),
    REASONS,
)
TOKENS = st.tuples(COUNTS, COUNTS).map(sorted)
IDS = st.text(min_size=1, max_size=50)
DIGESTS = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
PARTS = st.tuples(st.integers(1, MAX_PARTS), st.integers(0, MAX_PARTS)).map(
    lambda two: (two[1] % two[0], two[0])
)
RESERVES = st.builds(
    lambda transfer_id, layout, tokens, incarnation, timeout_s, digest, offers, codec, parts: Reserve(
        transfer_id, layout, *tokens, incarnation, timeout_s, digest, tuple(offers), codec, *parts
    ),
    IDS,
    LAYOUTS,
    TOKENS,
    U64,
    DURATIONS,
    st.one_of(st.just(b""), DIGESTS),
    st.lists(st.builds(PoolOffer, REASONS, st.binary(max_size=99)), max_size=MAX_OFFERS),
    st.sampled_from(CodecId),
    PARTS,
)
RANGES = st.builds(
    lambda layers, tokens: KvRange(*sorted(layers), *sorted(tokens)),
    st.sets(U16, min_size=2, max_size=2),
    st.sets(U32, min_size=2, max_size=2),
)
CHUNKS = st.builds(
    Chunk,
    U64,
    U64,
    U32,
    RANGES,
    HEADS,
    st.sampled_from(CodecId),
    U64,
    st.binary(min_size=1, max_size=200).map(memoryview),
)
CHUNKS_IN_PLACE = st.builds(
    lambda chunk, block_ids, first_token: replace(
        chunk,
        payload=memoryview(b""),
        codec=CodecId.NONE,
        source_block_ids=tuple(block_ids),
        source_first_token=first_token,
    ),
    CHUNKS,
    st.lists(U32, min_size=1, max_size=20),
    U32,
)
GRANTS = st.builds(Granted, U64, U64, COUNTS, DURATIONS, REASONS, REASONS, HEADS)
RESUMES = [st.builds(kind, IDS, U32, U64, U64) for kind in (Resume, Attach)]
CONTROL_FRAMES = st.one_of(
    RESERVES,
    *RESUMES,
    st.builds(
        Fetch,
        IDS,
        LAYOUTS,
        U64,
        st.lists(st.binary(max_size=40), min_size=1, max_size=9).map(tuple),
        COUNTS,
        DURATIONS,
    ),
    st.just(Renew()),
    st.builds(Finish, U32, DIGESTS),
    st.builds(Commit, st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)),
    st.builds(Abort, REASONS),
    GRANTS,
    st.builds(Refused, REASONS, st.booleans()),
    st.builds(
        lambda first, more: Resumed(first, tuple(first + one for one in sorted(more))),
        st.integers(0, 2**31),
        st.sets(st.integers(1, 2**31), max_size=5),
    ),
    st.builds(Ack, U32),
    st.builds(Nack, U32, REASONS),
    st.just(Verified()),
    st.just(Committed()),
    st.builds(Ended, REASONS),
)
FRAMES = st.one_of(CONTROL_FRAMES, CHUNKS, CHUNKS_IN_PLACE, CHUNKS_IN_PLACE.map(Announce))
CHUNK = Chunk(5, 9, 3, KvRange(1, 2, 3, 4), (0, 2), CodecId.NONE, 77, memoryview(bytes(range(64))))
IN_PLACE = replace(CHUNK, payload=memoryview(b""), source_block_ids=(7, 8), source_first_token=3)


def num_checked_bytes(frame: Frame, message: bytes) -> int:
    """What the frame's own checksum covers: all but the payload of a chunk, which has one of its own."""
    return CHUNK_HEADER_BYTES if isinstance(frame, Chunk) and not frame.is_in_place else len(message)


def sealed(body: bytes) -> bytes:
    """A message whose checksum is right, whatever it holds."""
    return google_crc32c.value(body).to_bytes(4, "little") + body


@given(FRAMES)
def test_what_is_encoded_is_decoded(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(FRAMES, st.data())
def test_a_flipped_bit_is_seen(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode(frame))
    bit = data.draw(st.integers(0, num_checked_bytes(frame, message) * 8 - 1))
    message[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CorruptFrame):
        decode(bytes(message))


@given(FRAMES, st.data())
def test_a_burst_of_up_to_four_bytes_is_seen(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode(frame))
    num_bytes = num_checked_bytes(frame, message)
    start = data.draw(st.integers(0, num_bytes - 1))
    burst = data.draw(st.binary(min_size=1, max_size=4))[: num_bytes - start]
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
        decode(message[: data.draw(st.integers(0, num_checked_bytes(frame, message) - 1))])


@given(st.one_of(CONTROL_FRAMES, CHUNKS_IN_PLACE), st.binary(min_size=1, max_size=8))
def test_bytes_too_many_are_seen(frame: Frame, tail: bytes) -> None:
    with pytest.raises(CorruptFrame):
        decode(encode(frame) + tail)


@given(CHUNKS, st.data())
def test_the_payload_is_left_to_its_own_checksum(chunk: Chunk, data: st.DataObject) -> None:
    message = encode(chunk)
    changed = data.draw(st.binary(max_size=200))
    frame = decode(message[:CHUNK_HEADER_BYTES] + changed)
    assert frame == replace(chunk, payload=memoryview(changed))


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


@pytest.mark.parametrize("chunk", [CHUNK, IN_PLACE], ids=["payload", "in place"])
def test_no_bit_of_a_header_may_flip(chunk: Chunk) -> None:
    message = encode(chunk)
    for bit in range(CHUNK_HEADER_BYTES * 8):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptFrame):
            decode(bytes(damaged))


def test_the_payload_is_a_view_of_the_message() -> None:
    message = encode(CHUNK)
    chunk = decode(message)
    assert isinstance(chunk, Chunk)
    assert chunk.payload.obj is message
    assert chunk.payload == CHUNK.payload
    assert CHUNK_HEADER_BYTES % 8 == 0
    assert chunk_header(CHUNK) + CHUNK.payload == message


def test_a_long_reason_is_cut_not_refused() -> None:
    frame = decode(encode(Ended("x" * 10_000)))
    assert frame == Ended("x" * MAX_REASON_CHARS)


LAYOUT = KvLayout("d", "float16", 16, 30, 3, 64, "rope")
MALFORMED: list[tuple[str, bytes]] = [
    ("kind 9", b"\x09abc"),
    ("do not name blocks", encode(IN_PLACE)[4:CHUNK_HEADER_BYTES]),
    ("do not name blocks", encode(IN_PLACE)[4 : CHUNK_HEADER_BYTES + 4]),
    ("do not name blocks", encode(IN_PLACE)[4:] + b"x"),
    ("kind 1", b"\x01short"),
    ("without content", b"\0"),
    ("cannot be parsed", b"\0\xff\xff"),
    ("at most", b"\0" + pb.ControlFrame(abort=pb.Abort(reason="x" * MAX_CONTROL_BYTES)).SerializeToString()),
]


@pytest.mark.parametrize(("problem", "body"), MALFORMED, ids=range(len(MALFORMED)))
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
    ("heads of 80 in int4", Reserve("t", KvLayout("d", "int4", 1, 1, 1, 80, ""), 1, 1, 0, 1.0)),
    ("zero dimension", Reserve("t", KvLayout("d", "float16", 0, 1, 1, 1, ""), 1, 1, 0, 1.0)),
    ("KV heads", Reserve("t", replace(LAYOUT, head_lo=2, head_hi=2), 1, 1, 0, 1.0)),
    ("KV heads", Reserve("t", replace(LAYOUT, head_lo=1, head_hi=4), 1, 1, 0, 1.0)),
    ("digest of tokens", Reserve("t", LAYOUT, 1, 1, 0, 1.0, token_digest=b"short")),
    ("at most 8 ways", Reserve("t", LAYOUT, 1, 1, 0, 1.0, offers=(PoolOffer("shm", b""),) * 9)),
    (
        "at most 8 ways",
        Reserve("t", LAYOUT, 1, 1, 0, 1.0, offers=(PoolOffer("shm", bytes(MAX_OFFER_BYTES + 1)),)),
    ),
    ("part 2 of 2", Reserve("t", LAYOUT, 1, 1, 0, 1.0, part=2, num_parts=2)),
    ("at most 64", Reserve("t", LAYOUT, 1, 1, 0, 1.0, num_parts=65)),
    ("transfer id", Resume("", 0, 1, 1)),
    ("transfer id", Attach("", 0, 1, 1)),
    ("Fetch of 0 blocks", Fetch("t", LAYOUT, 0, (), 1, 1.0)),
    ("at least 0 tokens", Fetch("t", LAYOUT, 0, (b"h",), 0, 1.0)),
    ("timeout", Fetch("t", LAYOUT, 0, (b"h",), 1, float("inf"))),
    ("transfer id", Fetch("", LAYOUT, 0, (b"h",), 1, 1.0)),
    ("dtype", Fetch("t", replace(LAYOUT, dtype="int3"), 0, (b"h",), 1, 1.0)),
    ("token ids", Commit((1, -1))),
    ("0 credits", Granted(1, 1, 0, 1.0, heads=(0, 1))),
    ("-1.0 s", Granted(1, 1, 1, -1.0, heads=(0, 1))),
    ("KV heads", Granted(1, 1, 1, 1.0, heads=(2, 2))),
    ("Resumed at 3", Resumed(3, (3,))),
    ("hold nothing", replace(CHUNK, kv_range=KvRange(2, 2, 0, 1))),
    ("hold nothing", replace(CHUNK, kv_range=KvRange(0, 1, 5, 1))),
    ("hold nothing", replace(CHUNK, heads=(2, 2))),
]


@pytest.mark.parametrize(("problem", "frame"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_frames_that_no_honest_peer_sends_are_refused(problem: str, frame: Frame) -> None:
    with pytest.raises(MalformedFrame, match=problem):
        decode(encode(frame))


def test_an_unknown_codec_is_refused() -> None:
    body = bytearray(encode(CHUNK)[4:CHUNK_HEADER_BYTES])
    body[1] = 200
    with pytest.raises(MalformedFrame, match="codec 200"):
        decode(sealed(bytes(body)))


def test_an_unknown_codec_in_a_request_is_refused() -> None:
    message = pb.ControlFrame.FromString(encode(Reserve("t", LAYOUT, 1, 1, 0, 1.0))[5:])
    message.reserve.codec = 99
    with pytest.raises(MalformedFrame, match="99 is not a valid CodecId"):
        decode(sealed(b"\0" + message.SerializeToString()))


def test_a_request_that_knows_of_one_sender_only_is_one_of_one_part() -> None:
    message = pb.ControlFrame.FromString(encode(Reserve("t", LAYOUT, 1, 1, 0, 1.0))[5:])
    message.reserve.num_parts = 0
    assert decode(sealed(b"\0" + message.SerializeToString())) == Reserve("t", LAYOUT, 1, 1, 0, 1.0)


def test_a_field_of_a_newer_version_is_ignored() -> None:
    newer = pb.ControlFrame(ack=pb.Ack(sequence_number=7)).SerializeToString() + b"\xfa\x01\x02hi"
    assert decode(sealed(b"\0" + newer)) == Ack(7)
