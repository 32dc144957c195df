"""Frames as bytes. Pure.

Every message starts with the CRC32C of all that follows it, then a kind byte:

    0        4      5
    | crc32c | kind | serialised ControlFrame                                              kind 0

    0        4      5       6          8          10   12                16
    | crc32c | kind | codec | layer_lo | layer_hi | 0 0 | sequence_number | lease_id ...   kind 1
             24            32         36         40
      ...    | incarnation | block_lo | block_hi | payload ...

all little-endian. The payload starts at a multiple of 8, so its elements are aligned in memory.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

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
from protos import kvtransfer_pb2 as pb

KIND_CONTROL = 0
KIND_CHUNK = 1
#: A control frame longer than this is not looked at.
MAX_CONTROL_BYTES = 2**16
#: A longer reason is cut.
MAX_REASON_CHARS = 1000
MAX_TRANSFER_ID_CHARS = 256

_CRC = struct.Struct("<I")
# What follows the checksum: kind, codec, layers, sequence number, lease, incarnation, blocks.
_CHUNK_HEADER = struct.Struct("<BBHH2xIQQII")
_SEQUENCE_NUMBER_OFFSET = 12
#: Bytes of a chunk before its payload.
CHUNK_HEADER_BYTES = _CRC.size + _CHUNK_HEADER.size


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Of a chunk's payload exactly one copy is made."""
    if isinstance(frame, Chunk):
        return _encode_chunk(frame)
    body = bytes([KIND_CONTROL]) + _to_pb(frame).SerializeToString()
    return _CRC.pack(google_crc32c.value(body)) + body


def decode(message: bytes) -> Frame:
    """The frame that these bytes are. A chunk's payload is a view of `message`, not a copy.

    Raises:
        CorruptFrame: the checksum does not fit.
        MalformedFrame: it does, but no frame looks like this.
    """
    if len(message) <= _CRC.size:
        raise MalformedFrame("too short", len(message))
    is_chunk = message[_CRC.size] == KIND_CHUNK and len(message) > CHUNK_HEADER_BYTES
    if (
        google_crc32c.value(np.frombuffer(message, np.uint8, offset=_CRC.size))
        != _CRC.unpack_from(message)[0]
    ):
        claimed = int.from_bytes(message[_SEQUENCE_NUMBER_OFFSET:][:4], "little") if is_chunk else None
        raise CorruptFrame(len(message), claimed)
    if is_chunk:
        return _decode_chunk(message)
    if message[_CRC.size] != KIND_CONTROL:
        raise MalformedFrame(f"kind {message[_CRC.size]} with {len(message)} bytes", len(message))
    return _decode_control(message)


def _encode_chunk(chunk: Chunk) -> bytes:
    header = _CHUNK_HEADER.pack(
        KIND_CHUNK,
        chunk.codec,
        chunk.kv_range.layer_lo,
        chunk.kv_range.layer_hi,
        chunk.sequence_number,
        chunk.lease_id,
        chunk.incarnation,
        chunk.kv_range.block_lo,
        chunk.kv_range.block_hi,
    )
    # The library takes no memoryview; an array over the same memory it does take.
    crc = google_crc32c.extend(google_crc32c.value(header), np.frombuffer(chunk.payload, np.uint8))
    return b"".join((_CRC.pack(crc), header, chunk.payload))


def _decode_chunk(message: bytes) -> Chunk:
    (_, codec, layer_lo, layer_hi, sequence_number, lease_id, incarnation, block_lo, block_hi) = (
        _CHUNK_HEADER.unpack_from(message, _CRC.size)
    )
    if codec not in tuple(Codec):
        raise MalformedFrame(f"codec {codec} is unknown", len(message))
    kv_range = KvRange(layer_lo, layer_hi, block_lo, block_hi)
    if kv_range.is_empty:
        raise MalformedFrame(f"{kv_range} hold nothing", len(message))
    return Chunk(
        lease_id=lease_id,
        incarnation=incarnation,
        sequence_number=sequence_number,
        kv_range=kv_range,
        codec=Codec(codec),
        payload=memoryview(message)[CHUNK_HEADER_BYTES:],
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
    frame = _FROM_PB[kind](getattr(envelope, kind))
    problem = _problem(frame)
    if problem is not None:
        raise MalformedFrame(problem, len(message))
    return frame


def _problem(frame: Frame) -> str | None:
    """Why no honest peer sends this; None when one may."""
    match frame:
        case Reserve():
            return _reserve_problem(frame)
        case Commit() if not frame.token_ids or min(frame.token_ids) < 0:
            return "Commit needs token ids, none negative"
        case Granted() if frame.credits < 1 or not _is_duration(frame.lease_s):
            return f"Granted with {frame.credits} credits for {frame.lease_s} s"
        case _:
            return None


def _reserve_problem(reserve: Reserve) -> str | None:
    if not 0 < len(reserve.transfer_id) <= MAX_TRANSFER_ID_CHARS:
        return f"a transfer id has 1 to {MAX_TRANSFER_ID_CHARS} characters"
    if not 1 <= reserve.num_tokens <= reserve.max_tokens:
        return f"Reserve for {reserve.num_tokens} tokens that may grow to {reserve.max_tokens}"
    if not _is_duration(reserve.timeout_s):
        return f"Reserve with a timeout of {reserve.timeout_s} s"
    layout = reserve.layout
    if layout.dtype not in DTYPE_BYTES:
        return f"dtype {layout.dtype!r} is none of {', '.join(DTYPE_BYTES)}"
    if min(layout.block_size, layout.num_layers, layout.num_kv_heads, layout.head_dim) < 1:
        return "a layout with a zero dimension"
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
    )


def _reserve_to_pb(frame: Reserve) -> pb.Reserve:
    return pb.Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_to_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
    )


def _reserve_from_pb(frame: pb.Reserve) -> Reserve:
    return Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_from_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
    )


def _granted_to_pb(frame: Granted) -> pb.Granted:
    return pb.Granted(
        lease_id=frame.lease_id,
        incarnation=frame.incarnation,
        credits=frame.credits,
        lease_s=frame.lease_s,
    )


def _to_pb(frame: Frame) -> pb.ControlFrame:
    match frame:
        case Reserve():
            return pb.ControlFrame(reserve=_reserve_to_pb(frame))
        case Renew():
            return pb.ControlFrame(renew=pb.Renew())
        case Finish():
            return pb.ControlFrame(finish=pb.Finish(num_chunks=frame.num_chunks))
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
        case Chunk():
            raise AssertionError("a chunk is no control frame")


# Field of ControlFrame -> how its message becomes a frame.
_FROM_PB: dict[str, Callable[[Any], Frame]] = {
    "reserve": _reserve_from_pb,
    "renew": lambda _: Renew(),
    "finish": lambda m: Finish(m.num_chunks),
    "commit": lambda m: Commit(tuple(m.token_ids)),
    "abort": lambda m: Abort(m.reason),
    "granted": lambda m: Granted(m.lease_id, m.incarnation, m.credits, m.lease_s),
    "refused": lambda m: Refused(m.reason, m.retryable),
    "ack": lambda m: Ack(m.sequence_number),
    "nack": lambda m: Nack(m.sequence_number, m.reason),
    "verified": lambda _: Verified(),
    "committed": lambda _: Committed(),
    "ended": lambda m: Ended(m.reason),
}
