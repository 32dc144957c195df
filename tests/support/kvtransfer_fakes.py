"""Both ends of a KV transfer without an engine, and a way between them that can be made to misbehave."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.errors import ReservationRefused
from kvtransfer.host import CachedKv
from kvtransfer.host_memory import HostMemory
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.pool import KvPool, KvSpan, PoolOffer
from kvtransfer.pool_tensor import pool_shape, torch_dtype
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.stream import MessageStream

LAYOUT = KvLayout(
    model_digest="d1",
    dtype="float32",
    block_size=4,
    num_layers=3,
    num_kv_heads=2,
    head_dim=2,
    position_encoding="rope:theta=10000",
)
FREE = "free"
ADOPTED = "adopted"


class WatchedPool:
    """A pool that may be read and written only where blocks belong to a transfer, and that can be made to fail.

    hides_from: transports that it does not offer.
    """

    def __init__(self, pool: HostPool, host: "FakeKvHost") -> None:
        self._pool = pool
        self._host = host
        self.hides_from: tuple[str, ...] = ()

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        return tuple(one for one in self._pool.offers if one.transport not in self.hides_from)

    @property
    def host_memory(self) -> HostMemory:
        """Whoever asks is about to write to it."""
        if self._host.failure is not None:
            raise self._host.failure
        self._host.num_writes += 1
        return self._pool.host_memory

    def checksum(self, span: KvSpan, transport: str) -> int:
        self._check(span)
        self._host.num_reads += 1
        return self._pool.checksum(span, transport)

    def read(self, span: KvSpan, out: memoryview) -> int:
        self._check(span)
        self._host.num_reads += 1
        return self._pool.read(span, out)

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        self._check(span)
        self._host.num_writes += 1
        return self._pool.write(span, payload, dtype)

    def _check(self, span: KvSpan) -> None:
        if self._host.failure is not None:
            raise self._host.failure
        assert all(self._host.owners[block_id] not in (FREE, ADOPTED) for block_id in span.block_ids)


class FakeKvHost:
    """A worker with a cache and a block pool that says at once when a block is given back twice.

    A block is FREE, ADOPTED by a sequence, or owned by the transfer whose id is its state. is_shared: its cache lies
    in shared memory. is_in_nixl: it is offered by this process's agent.
    """

    def __init__(
        self,
        layout: KvLayout = LAYOUT,
        *,
        num_blocks: int = 16,
        incarnation: int = 1,
        is_shared: bool = False,
        is_in_nixl: bool = False,
    ) -> None:
        self.incarnation = incarnation
        self.owners = [FREE] * num_blocks
        shape, dtype = pool_shape(layout, num_blocks), torch_dtype(layout.dtype)
        self._memory = SharedMemory.create(num_blocks * layout.block_bytes) if is_shared else None
        self.kv_cache = (
            self._memory.tensor(shape, dtype) if self._memory is not None else torch.zeros(shape, dtype=dtype)
        )
        pool = HostPool(self.kv_cache, layout, self._memory, is_in_nixl=is_in_nixl)
        self._watched = WatchedPool(pool, self)
        self.committed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.digests: dict[str, bytes] = {}
        self.releases: list[tuple[str, tuple[int, ...], str]] = []
        #: Hash of a block -> where it is kept.
        self.cached: dict[bytes, int] = {}
        self.num_reads = 0
        self.num_writes = 0
        self.failure: Exception | None = None
        self._waiting: deque[tuple[str, int, asyncio.Future[tuple[int, ...]]]] = deque()

    # KvHost.

    @property
    def pool(self) -> KvPool:
        return self._watched

    @property
    def watched(self) -> WatchedPool:
        return self._watched

    @property
    def layout(self) -> KvLayout:
        return self._watched.layout

    async def reserve(
        self, transfer_id: str, *, num_tokens: int, max_tokens: int, timeout_s: float
    ) -> Sequence[int]:
        num_blocks = blocks_needed(max_tokens, self.layout.block_size)
        if num_blocks > len(self.owners):
            reason = f"{num_blocks} blocks of {len(self.owners)}"
            raise ReservationRefused(transfer_id, reason, retryable=False)
        future: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        entry = (transfer_id, num_blocks, future)
        self._waiting.append(entry)
        self._grant()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            raise ReservationRefused(transfer_id, "no blocks came free in time", retryable=True) from None
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._grant()
            elif (task := asyncio.current_task()) is not None and task.cancelling():
                self._free(future.result(), transfer_id)

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        found: list[int] = []
        for name in block_hashes:
            if name not in self.cached:
                break
            found.append(self.cached[name])
        num_tokens = len(found) * self.layout.block_size
        if num_tokens < min_tokens:
            raise ReservationRefused(transfer_id, f"{num_tokens} tokens are cached", retryable=False)
        self._move(found, FREE, transfer_id)
        return CachedKv(tuple(found), num_tokens, block_hashes[len(found) - 1])

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        self._move(block_ids, transfer_id, ADOPTED)
        assert transfer_id not in self.committed
        self.committed[transfer_id] = (tuple(block_ids), tuple(token_ids))
        self.digests[transfer_id] = token_digest

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        assert reason
        self.releases.append((transfer_id, tuple(block_ids), reason))
        self._free(block_ids, transfer_id)

    # What tests do.

    def take(self, transfer_id: str, num_tokens: int) -> tuple[int, ...]:
        """Blocks for a sequence that is about to be prefilled here and sent under this id."""
        block_ids = self._take(transfer_id, blocks_needed(num_tokens, self.layout.block_size))
        assert block_ids is not None
        return block_ids

    def fill(self, block_ids: Sequence[int], seed: int) -> None:
        """Random KV in these blocks."""
        generator = torch.Generator().manual_seed(seed)
        part = self.kv_cache[:, :, list(block_ids)]
        noise = torch.randn(part.shape, generator=generator)
        self.kv_cache[:, :, list(block_ids)] = noise.to(self.kv_cache.dtype)

    def content(self, block_ids: Sequence[int], num_tokens: int | None = None) -> NDArray[np.uint8]:
        """[layer, K/V, token, byte] of the tokens in these blocks; all of them, or the first `num_tokens`."""
        part = self.kv_cache[:, :, list(block_ids)].flatten(2, 3)[:, :, :num_tokens]
        return part.contiguous().flatten(3).view(torch.uint8).numpy()

    def close(self) -> None:
        """Give shared memory back."""
        if self._memory is not None:
            self._memory.close()

    def end_sequence(self, transfer_id: str) -> None:
        """The sequence that adopted the blocks of this transfer is over."""
        self._move(self.committed.pop(transfer_id)[0], ADOPTED, FREE)
        self._grant()

    @property
    def num_free(self) -> int:
        return self.owners.count(FREE)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_all_returned(self) -> None:
        """Every block is free or belongs to a sequence, and nobody waits."""
        adopted = sum(len(block_ids) for block_ids, _ in self.committed.values())
        assert self.owners.count(ADOPTED) == adopted
        assert self.num_free + adopted == len(self.owners), self.owners
        assert not self._waiting

    def _grant(self) -> None:
        while self._waiting:
            transfer_id, num_blocks, future = self._waiting[0]
            block_ids = self._take(transfer_id, num_blocks)
            if block_ids is None:
                return
            self._waiting.popleft()
            future.set_result(block_ids)

    def _take(self, owner: str, num_blocks: int) -> tuple[int, ...] | None:
        free = [block_id for block_id, held_by in enumerate(self.owners) if held_by == FREE]
        if len(free) < num_blocks:
            return None
        # Not in order: a block's place in the pool says nothing of its place in the sequence.
        block_ids = tuple(reversed(free))[:num_blocks]
        self._move(block_ids, FREE, owner)
        return block_ids

    def _free(self, block_ids: Sequence[int], owner: str) -> None:
        self._move(block_ids, owner, FREE)
        self._grant()

    def _move(self, block_ids: Sequence[int], source: str, target: str) -> None:
        for block_id in block_ids:
            assert self.owners[block_id] == source, (block_id, self.owners[block_id], source, target)
            self.owners[block_id] = target


#: Sees a message on its way and says what arrives instead, in order.
Hook = Callable[[bytes], list[bytes]]


def unchanged(message: bytes) -> list[bytes]:
    """The hook of a way that does nothing wrong."""
    return [message]


class QueueStream:
    """One end of a stream in this process."""

    def __init__(
        self, incoming: "asyncio.Queue[bytes | None]", pair: "QueuePair", *, is_sender: bool
    ) -> None:
        self._incoming = incoming
        self._pair = pair
        self._is_sender = is_sender
        self._is_over = False

    async def read(self) -> bytes | None:
        if self._is_over:
            return None
        with self._broken_by_cancelling():
            message = await self._incoming.get()
        self._is_over = message is None
        if message is None and self._pair.is_cut:
            raise ConnectionError("cut")
        return message

    async def write(self, *messages: bytes) -> None:
        for message in messages:
            if self._pair.is_cut:
                raise ConnectionError("cut")
            with self._broken_by_cancelling():
                await self._pair.deliver(message, from_sender=self._is_sender)

    async def close(self) -> None:
        if not self._pair.is_cut:
            await self._pair.finish(from_sender=self._is_sender)

    def cut(self) -> None:
        """See QueuePair."""
        self._pair.cut()

    @contextmanager
    def _broken_by_cancelling(self) -> Iterator[None]:
        """As a call is that its client cancels; a server's end lives until its handler returns."""
        try:
            yield
        except asyncio.CancelledError:
            if self._is_sender:
                self._pair.cut()
            raise


class QueuePair:
    """Both ends of a stream, and what happens between them.

    capacity: messages that one direction holds before `write` waits.
    """

    def __init__(self, to_receiver: Hook, to_sender: Hook, capacity: int = 4) -> None:
        self._queues: dict[bool, asyncio.Queue[bytes | None]] = {
            True: asyncio.Queue(capacity),
            False: asyncio.Queue(capacity),
        }
        self._hooks = {True: to_receiver, False: to_sender}
        self.is_cut = False
        self.sender_end = QueueStream(self._queues[False], self, is_sender=True)
        self.receiver_end = QueueStream(self._queues[True], self, is_sender=False)

    async def deliver(self, message: bytes, *, from_sender: bool) -> None:
        for arriving in self._hooks[from_sender](message):
            await self._queues[from_sender].put(arriving)

    async def finish(self, *, from_sender: bool) -> None:
        await self._queues[from_sender].put(None)

    def cut(self) -> None:
        """Both ends lose the stream; what was on its way is gone."""
        self.is_cut = True
        for queue in self._queues.values():
            while not queue.empty():
                queue.get_nowait()
            queue.put_nowait(None)


class QueueChannel:
    """A way to a receiver in this process. The hooks act on every stream opened after they were set."""

    def __init__(self, serve: Callable[[MessageStream], "asyncio.Future[None] | object"]) -> None:
        self._serve = serve
        self.to_receiver: Hook = unchanged
        self.to_sender: Hook = unchanged
        self.pairs: list[QueuePair] = []
        self.served: list[asyncio.Task[None]] = []
        self.is_gone = False

    def open(self) -> MessageStream:
        if self.is_gone:
            raise ConnectionError("nobody answers")
        pair = QueuePair(lambda message: self.to_receiver(message), lambda message: self.to_sender(message))
        self.pairs.append(pair)
        self.served.append(asyncio.create_task(self._run(pair)))
        return pair.sender_end

    def cut(self) -> None:
        """Every open stream breaks."""
        for pair in self.pairs:
            pair.cut()

    async def _run(self, pair: QueuePair) -> None:
        try:
            await self._serve(pair.receiver_end)  # type: ignore[misc]
        finally:
            if not pair.is_cut:
                await pair.finish(from_sender=False)

    async def close(self) -> None:
        """Wait for every stream that was served."""
        await asyncio.gather(*self.served)
