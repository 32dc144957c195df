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
from collections.abc import Callable
from typing import Any

import google_crc32c
from google.protobuf.message import DecodeError

from kvtransfer.codecs.codec import CodecId
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
from phasewise_kernels.kv_int4.rows import MIN_HEAD_DIM, is_supported
from protos import kvtransfer_pb2 as pb

KIND_CONTROL = 0
KIND_CHUNK = 1
KIND_CHUNK_IN_PLACE = 2
#: 3 is `bundle.KIND_BUNDLE`.
KIND_ANNOUNCE = 4
#: A control frame longer than this is not looked at.
MAX_CONTROL_BYTES = 2**16
#: A longer reason is cut.
MAX_REASON_CHARS = 1000
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
    body = bytes([KIND_CONTROL]) + _to_pb(frame).SerializeToString()
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
        frame = _FROM_PB[kind](getattr(envelope, kind))
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


def _reason(text: str) -> str:
    return text[:MAX_REASON_CHARS]


def _layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        model_digest=layout.model_digest,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        position_encoding=layout.position_encoding,
        head_lo=layout.head_lo,
        head_hi=layout.head_hi,
        weight_dtype=layout.weight_dtype,
    )


def _layout_from_pb(layout: pb.KvLayout) -> KvLayout:
    return KvLayout(
        model_digest=layout.model_digest,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        position_encoding=layout.position_encoding,
        head_lo=layout.head_lo,
        head_hi=layout.head_hi,
        weight_dtype=layout.weight_dtype,
    )


def _reserve_to_pb(frame: Reserve) -> pb.Reserve:
    return pb.Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_to_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
        token_digest=frame.token_digest,
        offers=[pb.PoolOffer(transport=one.transport, descriptor=one.descriptor) for one in frame.offers],
        codec=frame.codec,
        part=frame.part,
        num_parts=frame.num_parts,
    )


def _reserve_from_pb(frame: pb.Reserve) -> Reserve:
    return Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_from_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
        token_digest=frame.token_digest,
        offers=tuple(PoolOffer(one.transport, one.descriptor) for one in frame.offers),
        codec=CodecId(frame.codec),
        part=frame.part,
        # Absent in what knows of one sender only.
        num_parts=frame.num_parts or 1,
    )


def _resume_from_pb(frame: pb.Resume) -> Resume:
    return Resume(frame.transfer_id, frame.part, frame.lease_id, frame.incarnation)


def _attach_from_pb(frame: pb.Resume) -> Attach:
    return Attach(frame.transfer_id, frame.part, frame.lease_id, frame.incarnation)


def _resume_to_pb(frame: Resume | Attach) -> pb.Resume:
    return pb.Resume(
        transfer_id=frame.transfer_id,
        part=frame.part,
        lease_id=frame.lease_id,
        incarnation=frame.incarnation,
    )


def _fetch_to_pb(frame: Fetch) -> pb.Fetch:
    return pb.Fetch(
        transfer_id=frame.transfer_id,
        layout=_layout_to_pb(frame.layout),
        incarnation=frame.incarnation,
        block_hashes=frame.block_hashes,
        min_tokens=frame.min_tokens,
        timeout_s=frame.timeout_s,
        address=frame.address,
    )


def _fetch_from_pb(frame: pb.Fetch) -> Fetch:
    return Fetch(
        frame.transfer_id,
        _layout_from_pb(frame.layout),
        frame.incarnation,
        tuple(frame.block_hashes),
        frame.min_tokens,
        frame.timeout_s,
        frame.address,
    )


def _granted_to_pb(frame: Granted) -> pb.Granted:
    return pb.Granted(
        lease_id=frame.lease_id,
        incarnation=frame.incarnation,
        credits=frame.credits,
        lease_s=frame.lease_s,
        transport=frame.transport,
        transport_reason=_reason(frame.transport_reason),
        head_lo=frame.heads[0],
        head_hi=frame.heads[1],
    )


def _granted_from_pb(frame: pb.Granted) -> Granted:
    return Granted(
        frame.lease_id,
        frame.incarnation,
        frame.credits,
        frame.lease_s,
        frame.transport,
        frame.transport_reason,
        (frame.head_lo, frame.head_hi),
    )


def _to_pb(frame: Frame) -> pb.ControlFrame:
    match frame:
        case Reserve():
            return pb.ControlFrame(reserve=_reserve_to_pb(frame))
        case Renew():
            return pb.ControlFrame(renew=pb.Renew())
        case Finish():
            return pb.ControlFrame(finish=pb.Finish(num_chunks=frame.num_chunks, digest=frame.digest))
        case Resume():
            return pb.ControlFrame(resume=_resume_to_pb(frame))
        case Attach():
            return pb.ControlFrame(attach=_resume_to_pb(frame))
        case Fetch():
            return pb.ControlFrame(fetch=_fetch_to_pb(frame))
        case Resumed():
            resumed = pb.Resumed(first_missing=frame.first_missing, received=frame.received)
            return pb.ControlFrame(resumed=resumed)
        case Commit():
            return pb.ControlFrame(commit=pb.Commit(token_ids=frame.token_ids))
        case Abort():
            return pb.ControlFrame(abort=pb.Abort(reason=_reason(frame.reason)))
        case Granted():
            return pb.ControlFrame(granted=_granted_to_pb(frame))
        case Refused():
            return pb.ControlFrame(
                refused=pb.Refused(reason=_reason(frame.reason), retryable=frame.retryable)
            )
        case Ack():
            return pb.ControlFrame(ack=pb.Ack(sequence_number=frame.sequence_number))
        case Nack():
            return pb.ControlFrame(
                nack=pb.Nack(sequence_number=frame.sequence_number, reason=_reason(frame.reason))
            )
        case Verified():
            return pb.ControlFrame(verified=pb.Verified())
        case Committed():
            return pb.ControlFrame(committed=pb.Committed())
        case Ended():
            return pb.ControlFrame(ended=pb.Ended(reason=_reason(frame.reason)))
        case Chunk() | Announce():
            raise AssertionError("a chunk is no control frame")


# Field of ControlFrame -> how its message becomes a frame.
_FROM_PB: dict[str, Callable[[Any], Frame]] = {
    "reserve": _reserve_from_pb,
    "renew": lambda _: Renew(),
    "resume": _resume_from_pb,
    "attach": _attach_from_pb,
    "fetch": _fetch_from_pb,
    "resumed": lambda m: Resumed(m.first_missing, tuple(m.received)),
    "finish": lambda m: Finish(m.num_chunks, m.digest),
    "commit": lambda m: Commit(tuple(m.token_ids)),
    "abort": lambda m: Abort(m.reason),
    "granted": _granted_from_pb,
    "refused": lambda m: Refused(m.reason, m.retryable),
    "ack": lambda m: Ack(m.sequence_number),
    "nack": lambda m: Nack(m.sequence_number, m.reason),
    "verified": lambda _: Verified(),
    "committed": lambda _: Committed(),
    "ended": lambda m: Ended(m.reason),
}
