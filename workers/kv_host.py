"""The worker as its transfers see it: bridges the engine, in its thread, and the transfers, in the loop.

To the engine go messages, by `post`, which may be called from any thread. From the engine come outputs;
whoever gets them from its thread into the loop hands those of transfers to `handle`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import torch

from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import ReservationRefused as Refusal
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.server import KvTransferServer
from kvtransfer.staging import CacheBytes
from workers.engine.messages import (
    BlocksReserved,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    Message,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
)
from workers.kv_sending import KvSending

#: What the engine says to transfers; its other outputs are events of requests.
TransferOutput = BlocksReserved | ReservationRefused | StartTransfer | KvReady | FinishTransfer | EndTransfer


class EngineKvHost:
    """KvHost over one engine, with the transfers that it receives and sends. Made and used in the loop.

    kv_cache: see CacheBytes. post: hands a message to the engine. clock: the engine's.
    """

    def __init__(
        self,
        layout: KvLayout,
        incarnation: int,
        kv_cache: torch.Tensor,
        post: Callable[[Message], None],
        config: KvTransferConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.incarnation = incarnation
        self._cache = CacheBytes(kv_cache)
        self._post = post
        self._clock = clock
        #: Who waits for blocks. Bounded by the streams of senders, each of which asks once.
        self._waiting: dict[str, asyncio.Future[Sequence[int]]] = {}
        self.receiving = KvTransferServer(self, config)
        self._sending = KvSending(self, post, config)

    # KvHost.

    async def reserve(
        self, transfer_id: str, *, num_tokens: int, max_tokens: int, timeout_s: float
    ) -> Sequence[int]:
        """See KvHost. The engine answers, or refuses when `timeout_s` is over."""
        if transfer_id in self._waiting:
            raise Refusal(transfer_id, "this transfer has asked already", retryable=False)
        answer: asyncio.Future[Sequence[int]] = asyncio.get_running_loop().create_future()
        self._waiting[transfer_id] = answer
        self._post(ReserveBlocks(transfer_id, num_tokens, max_tokens, self._clock() + timeout_s))
        try:
            block_ids = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.release(transfer_id, answer.result(), "cancelled while its blocks came")
            else:
                self._post(CancelReservation(transfer_id))
            raise
        finally:
            self._waiting.pop(transfer_id, None)
        if len(block_ids) < blocks_needed(max_tokens, self.layout.block_size):
            # They answer an earlier request of this id, one that was given up and asked for fewer.
            self.release(transfer_id, block_ids, "the transfer id was used again")
            raise Refusal(transfer_id, "its transfer id was used again too soon", retryable=True)
        return block_ids

    def write(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int, payload: memoryview) -> None:
        """See KvHost."""
        self._cache.write(block_ids, layer_lo, layer_hi, payload)

    def read(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> memoryview:
        """See KvHost."""
        return self._cache.read(block_ids, layer_lo, layer_hi)

    def commit(self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """See KvHost."""
        self._post(CommitTransfer(transfer_id, tuple(block_ids), tuple(token_ids)))

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """See KvHost."""
        self._post(ReleaseTransfer(transfer_id, tuple(block_ids), reason))

    # The engine.

    def handle(self, output: TransferOutput) -> None:
        """Do what the engine says to a transfer."""
        match output:
            case BlocksReserved():
                self._blocks_reserved(output)
            case ReservationRefused():
                answer = self._waiting.get(output.transfer_id)
                if answer is not None and not answer.done():
                    answer.set_exception(Refusal(output.transfer_id, output.reason, output.is_retryable))
            case EndTransfer():
                # A transfer is sent from here or received here, and unknown to the other side.
                self._sending.abort(output.transfer_id, output.reason)
                self.receiving.abort(output.transfer_id, output.reason)
            case StartTransfer():
                self._sending.start(output)
            case KvReady():
                self._sending.kv_ready(output)
            case FinishTransfer():
                self._sending.finish(output)

    def _blocks_reserved(self, reserved: BlocksReserved) -> None:
        answer = self._waiting.get(reserved.transfer_id)
        if answer is None or answer.done():
            # The request was cancelled; the engine had granted it before it heard of that.
            self.release(reserved.transfer_id, reserved.block_ids, "nobody waits for these blocks any more")
        else:
            answer.set_result(reserved.block_ids)

    async def close(self, reason: str) -> None:
        """Give up every transfer, and each that comes from now on; returns when none is left."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sending.close(reason))
            group.create_task(self.receiving.close(reason))

    def check_invariants(self) -> None:
        """Every lease is of a transfer that lives."""
        self.receiving.check_invariants()
