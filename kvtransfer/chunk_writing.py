"""The receiver's end of chunks: into the transfer's blocks, some of them before they have come."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvtransfer.frames import Chunk
from kvtransfer.host import KvHost
from kvtransfer.pool import KvSpan, MappedPool, span_of
from kvtransfer.session import WriteChunk

logger = logging.getLogger(__name__)

#: Chunks that wait to be copied before they have come; what is announced beyond them is copied when it comes.
MAX_ANNOUNCED = 64


class ChunkWriter:
    """Writes the chunks of one transfer. Made and used in the loop.

    wants: whether the machine would take this chunk now. What is copied before it has come is compared when it does: the
    checksum of what was read is kept until then, and forgotten when any of the same place is written again.
    """

    def __init__(self, host: KvHost, wants: Callable[[Chunk], bool]) -> None:
        self._host = host
        self._wants = wants
        self._loop = asyncio.get_running_loop()
        #: The sender's pool, where it can be read from here.
        self.mapped: MappedPool | None = None
        #: The transfer's blocks; none before there are any, and none when it has ended.
        self.block_ids: tuple[int, ...] = ()
        self._to_copy: deque[Chunk] = deque()
        #: Copied and not yet come, by number: no two of them overlap.
        self._copied: dict[int, tuple[Chunk, int]] = {}

    def write(self, action: WriteChunk) -> int:
        """Copy a chunk that has come, unless it was; its checksum as it is here. Raises what the pools raise."""
        chunk = action.chunk
        announced, checksum = self._copied.pop(chunk.sequence_number, (None, 0))
        is_there = announced is not None and replace(chunk, checksum=0) == announced
        # A GPU's memory may not have held all of it yet when it was announced: then it is read again.
        if is_there and checksum == chunk.checksum:
            return checksum
        if chunk.is_in_place:
            return self._pull(chunk, action.block_ids)
        return self._host.pool.write(self._span_of(chunk, action.block_ids), chunk.payload, action.dtype)

    def announce(self, chunk: Chunk) -> None:
        """It will come, and what it names is ready: copy it when nothing else is to be done."""
        if len(self._to_copy) < MAX_ANNOUNCED:
            self._to_copy.append(chunk)
            if len(self._to_copy) == 1:
                self._loop.call_soon(self._copy_next)

    def forget_announced(self) -> None:
        """What was announced may not come any more."""
        self._to_copy.clear()
        self._copied.clear()

    def _copy_next(self) -> None:
        """One chunk; what has come meanwhile is heard before the next."""
        if not self._to_copy:
            return
        chunk = self._to_copy.popleft()
        # The machine judges it as if it had come: what it would not take is not written.
        if self.mapped is not None and self.block_ids and chunk.is_in_place and self._wants(chunk):
            try:
                self._copied[chunk.sequence_number] = chunk, self._pull(chunk, self.block_ids)
            except Exception as error:  # noqa: BLE001 - the chunk itself is tried again, and then it is an event
                logger.info("announced_chunk_not_copied number=%d reason=%s", chunk.sequence_number, error)
        if self._to_copy:
            self._loop.call_soon(self._copy_next)

    def _pull(self, chunk: Chunk, block_ids: Sequence[int]) -> int:
        assert self.mapped is not None
        where = chunk.kv_range
        for number in [n for n, (one, _) in self._copied.items() if one.kv_range.overlaps(where)]:
            del self._copied[number]
        source = KvSpan(
            chunk.source_block_ids,
            chunk.source_first_token,
            where.num_tokens,
            where.layer_lo,
            where.layer_hi,
            *chunk.heads,
        )
        return self.mapped.pull(source, self._host.pool, self._span_of(chunk, block_ids))

    def _span_of(self, chunk: Chunk, block_ids: Sequence[int]) -> KvSpan:
        where = chunk.kv_range
        return span_of(
            block_ids,
            self._host.pool.layout.block_size,
            tokens=(where.token_lo, where.token_hi),
            layers=(where.layer_lo, where.layer_hi),
            heads=chunk.heads,
        )
