"""Frames as bytes. Pure.

Every message starts with the CRC32C of what follows it, up to the payload of a chunk, then a kind byte:

    0        4      5
    | crc32c | kind | serialised ControlFrame                                            kind 0

    0        4      5       6          8          10        12        14      16
    | crc32c | kind | codec | layer_lo | layer_hi | head_lo | head_hi | 0 0 | sequence_number ...   kinds 1, 2, 4
             20         24         28         32            40            48         56
      ...    | token_lo | token_hi | 0 0 0 0 | lease_id ... | incarnation | checksum | payload ...

all little-endian. Kind 1 carries its payload, whose checksum stands in the header and is compared when the payload is
written to where it belongs. Kind 2 names where the KV lies in the sender's pool: the place of the first token in its
block, then the ids of the blocks, 4 bytes each, which the CRC32C covers too. Kind 4 is the same of a chunk whose checksum
is not known yet. The payload starts at a multiple of 8, so that its elements are aligned in memory.
"""

import math
import struct
from array import array

import google_crc32c
from google.protobuf.message import DecodeError

from kvtransfer.codecs.codec import CodecId
from kvtransfer.control_wire import FROM_PB, to_pb
from kvtransfer.digest import DIGEST_BYTES
from kvtransfer.errors import CorruptFrame, MalformedFrame
from kvtransfer.frames import Announce, Attach, Chunk, Commit, Fetch, Frame, Granted, Reserve, Resume, Resumed
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import DTYPE_BITS, INT4, KvLayout
from phasewise_kernels.kv_int4.rows import MIN_HEAD_DIM, is_supported
from protos import kvtransfer_pb2 as pb

KIND_CONTROL = 0
KIND_CHUNK = 1
KIND_CHUNK_IN_PLACE = 2
#: 3 is `bundle.KIND_BUNDLE`.
KIND_ANNOUNCE = 4
#: A control frame longer than this is not looked at.
MAX_CONTROL_BYTES = 2**16
MAX_TRANSFER_ID_CHARS = 256
MAX_ADDRESS_CHARS = 512
MAX_OFFERS = 8
MAX_OFFER_BYTES = 2**13
#: Senders of one transfer at most.
MAX_PARTS = 64

_CHUNK_KINDS = (KIND_CHUNK, KIND_CHUNK_IN_PLACE, KIND_ANNOUNCE)
_CRC = struct.Struct("<I")
# What follows the checksum: kind, codec, layers, heads, number, tokens, lease, incarnation, checksum of the content.
_CHUNK_HEADER = struct.Struct("<BBHHHH2xIII4xQQQ")
#: Bytes of a chunk before its payload.
CHUNK_HEADER_BYTES = _CRC.size + _CHUNK_HEADER.size


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Of a chunk's payload exactly one copy is made."""
    if isinstance(frame, Chunk):
        return b"".join((chunk_header(frame), frame.payload))
    if isinstance(frame, Announce):
        return chunk_header(frame.chunk, KIND_ANNOUNCE)
    body = bytes([KIND_CONTROL]) + to_pb(frame).SerializeToString()
    return _CRC.pack(google_crc32c.value(body)) + body


def chunk_header(chunk: Chunk, in_place_kind: int = KIND_CHUNK_IN_PLACE) -> bytes:
    """All of a chunk but its payload: CHUNK_HEADER_BYTES, or more when it is copied in place."""
    where = chunk.kv_range
    header = _CHUNK_HEADER.pack(
        in_place_kind if chunk.is_in_place else KIND_CHUNK,
        chunk.codec,
        where.layer_lo,
        where.layer_hi,
        *chunk.heads,
        chunk.sequence_number,
        where.token_lo,
        where.token_hi,
        chunk.lease_id,
        chunk.incarnation,
        chunk.checksum,
    )
    if chunk.is_in_place:
        header += array("I", (chunk.source_first_token, *chunk.source_block_ids)).tobytes()
    return _CRC.pack(google_crc32c.value(header)) + header


def decode(message: bytes) -> Frame:
    """The frame that these bytes are. A chunk's payload is a view of `message`, not a copy, and not looked at.

    Raises:
        CorruptFrame: the checksum does not fit.
        MalformedFrame: it does, but no frame looks like this.
    """
    if len(message) <= _CRC.size:
        raise MalformedFrame("too short", len(message))
    kind = message[_CRC.size]
    is_chunk = kind in _CHUNK_KINDS and len(message) >= CHUNK_HEADER_BYTES
    end = CHUNK_HEADER_BYTES if is_chunk and kind == KIND_CHUNK else len(message)
    if google_crc32c.value(message[_CRC.size : end]) != _CRC.unpack_from(message)[0]:
        raise CorruptFrame(len(message))
    if is_chunk:
        chunk = _decode_chunk(message)
        return Announce(chunk) if kind == KIND_ANNOUNCE else chunk
    if kind != KIND_CONTROL:
        raise MalformedFrame(f"kind {kind} with {len(message)} bytes", len(message))
    return _decode_control(message)


def _decode_chunk(message: bytes) -> Chunk:
    (
        kind,
        codec,
        layer_lo,
        layer_hi,
        head_lo,
        head_hi,
        number,
        token_lo,
        token_hi,
        lease_id,
        incarnation,
        checksum,
    ) = _CHUNK_HEADER.unpack_from(message, _CRC.size)
    if codec not in tuple(CodecId):
        raise MalformedFrame(f"codec {codec} is unknown", len(message))
    kv_range = KvRange(layer_lo, layer_hi, token_lo, token_hi)
    if kv_range.is_empty or head_lo >= head_hi:
        raise MalformedFrame(f"{kv_range} and heads [{head_lo}, {head_hi}) hold nothing", len(message))
    payload = memoryview(message)[CHUNK_HEADER_BYTES:]
    block_ids: tuple[int, ...] = ()
    first_token = 0
    if kind != KIND_CHUNK:
        if len(payload) < 8 or len(payload) % 4:
            raise MalformedFrame(f"{len(payload)} bytes do not name blocks", len(message))
        first_token, *ids = array("I", payload.tobytes())
        block_ids, payload = tuple(ids), payload[:0]
    return Chunk(
        lease_id=lease_id,
        incarnation=incarnation,
        sequence_number=number,
        kv_range=kv_range,
        heads=(head_lo, head_hi),
        codec=CodecId(codec),
        checksum=checksum,
        payload=payload,
        source_block_ids=block_ids,
        source_first_token=first_token,
    )


def _decode_control(message: bytes) -> Frame:
    if len(message) > MAX_CONTROL_BYTES:
        raise MalformedFrame(f"a control frame has at most {MAX_CONTROL_BYTES} bytes", len(message))
    try:
        envelope = pb.ControlFrame.FromString(message[_CRC.size + 1 :])
    except DecodeError as error:
        raise MalformedFrame("the control frame cannot be parsed", len(message)) from error
    kind = envelope.WhichOneof("frame")
    if kind is None:
        raise MalformedFrame("a control frame without content, or of an unknown kind", len(message))
    try:
        frame = FROM_PB[kind](getattr(envelope, kind))
    except ValueError as error:
        raise MalformedFrame(f"{kind}: {error}", len(message)) from error
    problem = _problem(frame)
    if problem is not None:
        raise MalformedFrame(problem, len(message))
    return frame


def _problem(frame: Frame) -> str | None:
    """Why no honest peer sends this; None when one may."""
    match frame:
        case Reserve():
            return _reserve_problem(frame)
        case Resume() | Attach():
            return _id_problem(frame.transfer_id)
        case Fetch():
            return _fetch_problem(frame)
        case Commit() if min(frame.token_ids, default=0) < 0:
            return "Commit needs token ids, none negative"
        case Granted() if frame.credits < 1 or not _is_duration(frame.lease_s):
            return f"Granted with {frame.credits} credits for {frame.lease_s} s"
        case Granted() if not 0 <= frame.heads[0] < frame.heads[1]:
            return f"Granted for KV heads {list(frame.heads)}"
        case Resumed() if min(frame.received, default=frame.first_missing + 1) <= frame.first_missing:
            return f"Resumed at {frame.first_missing} that has {min(frame.received)} beyond it"
        case _:
            return None


def _reserve_problem(reserve: Reserve) -> str | None:
    if not 1 <= reserve.num_tokens <= reserve.max_tokens:
        return f"Reserve for {reserve.num_tokens} tokens that may grow to {reserve.max_tokens}"
    if not _is_duration(reserve.timeout_s):
        return f"Reserve with a timeout of {reserve.timeout_s} s"
    if len(reserve.token_digest) not in (0, DIGEST_BYTES):
        return f"a digest of tokens has {DIGEST_BYTES} bytes"
    if len(reserve.offers) > MAX_OFFERS or any(
        len(one.descriptor) > MAX_OFFER_BYTES for one in reserve.offers
    ):
        return f"at most {MAX_OFFERS} ways to read a pool, each of {MAX_OFFER_BYTES} bytes"
    if not 0 <= reserve.part < reserve.num_parts <= MAX_PARTS:
        return f"part {reserve.part} of {reserve.num_parts}; there are at most {MAX_PARTS}"
    return _id_problem(reserve.transfer_id) or _layout_problem(reserve.layout)


def _fetch_problem(fetch: Fetch) -> str | None:
    if not fetch.block_hashes or fetch.min_tokens < 1:
        return f"Fetch of {len(fetch.block_hashes)} blocks and at least {fetch.min_tokens} tokens"
    if not _is_duration(fetch.timeout_s):
        return f"Fetch with a timeout of {fetch.timeout_s} s"
    if len(fetch.address) > MAX_ADDRESS_CHARS:
        return f"Fetch with an address of more than {MAX_ADDRESS_CHARS} characters"
    return _id_problem(fetch.transfer_id) or _layout_problem(fetch.layout)


def _id_problem(transfer_id: str) -> str | None:
    if 0 < len(transfer_id) <= MAX_TRANSFER_ID_CHARS:
        return None
    return f"a transfer id has 1 to {MAX_TRANSFER_ID_CHARS} characters"


def _layout_problem(layout: KvLayout) -> str | None:
    if layout.dtype not in DTYPE_BITS:
        return f"dtype {layout.dtype!r} is none of {', '.join(DTYPE_BITS)}"
    if min(layout.block_size, layout.num_layers, layout.num_kv_heads, layout.head_dim) < 1:
        return "a layout with a zero dimension"
    if layout.dtype == INT4 and not is_supported(layout.head_dim):
        return f"heads of {layout.head_dim} in int4, which are a power of two from {MIN_HEAD_DIM} on"
    lo, hi = layout.heads
    if not 0 <= lo < hi <= layout.num_kv_heads:
        return f"KV heads {[lo, hi]} of {layout.num_kv_heads}"
    return None


def _is_duration(value_s: float) -> bool:
    return math.isfinite(value_s) and value_s > 0
