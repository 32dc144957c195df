"""What `driver.Session` does with chunks and messages, on a `TinyPool`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import MalformedFrame
from kvtransfer.frames import Chunk
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.session import ChunkDamaged, ChunkWritten, FrameDamaged, HostBroke, SendChunk, WriteChunk
from kvtransfer.wire import decode, encode
from tests.support.kvtransfer_sides import Side
from tests.support.kvtransfer_tiny_pool import Kv, crc_of


def is_whole(chunk: Chunk, checksum: int) -> bool:
    """As the driver finds out, which compares what was copied with what was named."""
    return checksum == chunk.checksum


def write_chunk(
    side: Side, action: WriteChunk, flip: Callable[[bytearray], None]
) -> ChunkWritten | ChunkDamaged | HostBroke:
    """A chunk into the blocks of this side. flip: what may happen to the bytes on their way."""
    chunk, pool, transfer = action.chunk, side.pool, side.transfer
    assert isinstance(side.machine, ReceiverMachine)
    named = (chunk.lease_id, chunk.incarnation)
    assert named == (side.machine.lease_id, side.incarnation), "a chunk of another lease is written"
    into = pool.span(action.block_ids, chunk.kv_range, chunk.heads)
    if chunk.is_in_place:
        source = transfer.sender
        if source is None or source.is_dead:
            return HostBroke("the other side's memory is gone")
        where = replace(into, block_ids=chunk.source_block_ids, first_token=chunk.source_first_token)
        content = bytearray(source.pool.read(where).tobytes())
    else:
        content = bytearray(chunk.payload)
    # What was packed has been checked before it was unpacked; memory that fails after that is beyond us.
    if chunk.codec is CodecId.NONE:
        flip(content)
    dtype = np.dtype(action.dtype)
    kv = np.frombuffer(content, dtype).reshape(chunk.kv_range.num_layers, 2, into.num_tokens, -1, 1)
    with np.errstate(all="ignore"):
        pool.write(into, kv.astype(np.float16), transfer)
    if chunk.codec is CodecId.NONE and not is_whole(chunk, crc_of(content)):
        return ChunkDamaged(chunk.sequence_number, "its checksum is another")
    return ChunkWritten(chunk.sequence_number)


def read_chunk(side: Side, item: SendChunk) -> tuple[bytes, int]:
    """The message of a chunk, and its checksum."""
    transfer, number = side.transfer, item.sequence_number
    transfer.ranges_read[number] = item.kv_range
    span = side.pool.span(side.blocks, item.kv_range, item.heads)
    content = side.pool.read(span).tobytes()
    is_in_place = item.transport != "grpc"
    chunk = Chunk(
        item.lease_id,
        item.incarnation,
        number,
        transfer.misnamed.pop(number, item.kv_range),
        item.heads,
        item.codec,
        crc_of(content),
        memoryview(b"" if is_in_place else content),
        span.block_ids if is_in_place else (),
        span.first_token if is_in_place else 0,
    )
    return encode(chunk), chunk.checksum


def event_of(message: bytes) -> object:
    """As the driver makes it, which leaves a stream by which a CorruptFrame came; what a codec packed is checked and unpacked here."""
    try:
        frame = decode(message)
    except MalformedFrame as error:
        return FrameDamaged(error)
    if isinstance(frame, Chunk) and frame.codec is not CodecId.NONE and not frame.is_in_place:
        if not is_whole(frame, crc_of(frame.payload)):
            return FrameDamaged(
                MalformedFrame("its checksum is another", len(message)), frame.sequence_number
            )
        unpacked: Kv = np.frombuffer(frame.payload, np.float16)
        return replace(frame, payload=memoryview(unpacked.astype(np.float32).tobytes()))
    return frame
