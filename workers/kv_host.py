"""The worker as its transfers see it: bridges the engine, in its thread, and the transfers, in the loop.

To the engine go messages, by `post`, which may be called from any thread. From the engine come outputs;
whoever gets them from its thread into the loop hands those of transfers to `handle`.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import ReservationRefused as Refusal
from kvtransfer.host import CachedKv
from kvtransfer.layout import blocks_needed
from kvtransfer.pool import KvPool
from kvtransfer.server import KvTransferServer
from kvtransfer.session import TransferReport
from kvtransfer.transports.choice import TransportOpener
from workers.api import KvDirection, KvPeer, KvReuseCounts, KvTransferCounts
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FetchPrefix,
    FindCached,
    FinishTransfer,
    KvReady,
    Message,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
)
from workers.kv_channels import MAX_IDLE_CHANNELS, PeerChannels
from workers.kv_fetching import KvFetching
from workers.kv_sending import KvSending

#: What the engine says to transfers; its other outputs are events of requests.
TransferOutput = (
    BlocksReserved
    | ReservationRefused
    | StartTransfer
    | KvReady
    | FinishTransfer
    | EndTransfer
    | CachedFound
    | FetchPrefix
)


class EngineKvHost:
    """KvHost over one engine, with the transfers that it receives and sends. Made and used in the loop.

    pool: the memory of the engine's blocks. post: hands a message to the engine. clock: the engine's. address: of this
    worker, as others know it (host:port).
    """

    def __init__(
        self,
        pool: KvPool,
        incarnation: int,
        post: Callable[[Message], None],
        config: KvTransferConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        address: str = "",
    ) -> None:
        self.pool = pool
        self.incarnation = incarnation
        self._post = post
        self._clock = clock
        #: What others fetch is sent as it is: they keep it, and lend it to others.
        sending_exactly = replace(config, codec=CodecId.NONE)
        #: Who waits for blocks. Bounded by the streams of senders, each of which asks once.
        self._waiting: dict[str, asyncio.Future[Sequence[int]]] = {}
        #: Who waits to hear what is cached here. Bounded likewise.
        self._looking: dict[str, asyncio.Future[CachedKv]] = {}
        # One for what comes and for what is fetched: a peer's pool is mapped once.
        self._pools = pools = TransportOpener(config.transport)
        self.receiving = KvTransferServer(self, sending_exactly, pools, on_sent=self._note_sent)
        self._channels = PeerChannels(MAX_IDLE_CHANNELS, num_data_channels=config.num_streams)
        self._sending = KvSending(self, self._channels, post, config)
        self._fetching = KvFetching(
            self, self._channels, self._sending.peers, pools, post, config, address=address
        )

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
        if len(block_ids) < blocks_needed(max_tokens, self.pool.layout.block_size):
            # They answer an earlier request of this id, one that was given up and asked for fewer.
            self.release(transfer_id, block_ids, "the transfer id was used again")
            raise Refusal(transfer_id, "its transfer id was used again too soon", retryable=True)
        return block_ids

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """See KvHost."""
        if transfer_id in self._looking:
            raise Refusal(transfer_id, "this transfer has asked already", retryable=False)
        answer: asyncio.Future[CachedKv] = asyncio.get_running_loop().create_future()
        self._looking[transfer_id] = answer
        self._post(FindCached(transfer_id, tuple(block_hashes), min_tokens))
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.release(transfer_id, answer.result().block_ids, "cancelled while it was looked for")
            raise
        finally:
            self._looking.pop(transfer_id, None)

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """See KvHost."""
        is_lossy = self.receiving.is_lossy(transfer_id)
        self._post(CommitTransfer(transfer_id, tuple(block_ids), tuple(token_ids), token_digest, is_lossy))

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
                answer = self._waiting.get(output.transfer_id) or self._looking.get(output.transfer_id)
                if answer is not None and not answer.done():
                    answer.set_exception(Refusal(output.transfer_id, output.reason, output.is_retryable))
            case EndTransfer():
                # A transfer is sent from here or received here, and unknown to the other side.
                self._sending.abort(output.transfer_id, output.reason)
                self._fetching.abort(output.transfer_id, output.reason)
                self.receiving.abort(output.transfer_id, output.reason)
            case StartTransfer():
                self._sending.start(output)
            case KvReady():
                self._sending.kv_ready(output)
            case FinishTransfer():
                self._sending.finish(output)
            case CachedFound():
                self._cached_found(output)
            case FetchPrefix():
                self._fetching.start(output)

    def _blocks_reserved(self, reserved: BlocksReserved) -> None:
        answer = self._waiting.get(reserved.transfer_id)
        if answer is None or answer.done():
            # The request was cancelled; the engine had granted it before it heard of that.
            self.release(reserved.transfer_id, reserved.block_ids, "nobody waits for these blocks any more")
        else:
            answer.set_result(reserved.block_ids)

    def _cached_found(self, found: CachedFound) -> None:
        answer = self._looking.get(found.transfer_id)
        if answer is None or answer.done():
            self.release(found.transfer_id, found.block_ids, "nobody looks for these blocks any more")
        else:
            answer.set_result(CachedKv(found.block_ids, found.num_tokens, found.block_hash))

    async def close(self, reason: str) -> None:
        """Give up every transfer, and each that comes from now on; returns when none is left."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sending.close(reason))
            group.create_task(self._fetching.close(reason))
            group.create_task(self.receiving.close(reason))
        self._pools.close_all()
        await self._channels.close()

    # What is told of transfers.

    def lease_ids(self) -> Mapping[str, int]:
        """The lease of each transfer that receives, by transfer id."""
        return {lease.owner: lease.lease_id for lease in self.receiving.leases()}

    def counts(self) -> KvTransferCounts:
        """Of all transfers so far."""
        all_counts = (self._sending.counts, self.receiving.counts, self._fetching.transfer_counts)
        tables = [asdict(counts) for counts in all_counts]
        return KvTransferCounts(**{name: sum(table[name] for table in tables) for name in tables[0]})

    def _note_sent(self, address: str, report: TransferReport) -> None:
        """What another worker fetched from here has come there: so fast is the way."""
        self._sending.peers.note(
            address,
            is_sending=True,
            transport=report.transport,
            reason=report.transport_reason,
            codec=report.codec.name.lower(),
            num_bytes=report.num_bytes,
            num_wire_bytes=report.num_wire_bytes,
            busy_s=report.busy_s,
        )

    def with_fetches(self, reuse: KvReuseCounts) -> KvReuseCounts:
        """With what was fetched."""
        counts = self._fetching.counts
        return replace(
            reuse,
            num_prefixes_asked=counts.num_asked,
            num_prefixes_fetched=counts.num_fetched,
            num_prefixes_refused=counts.num_refused,
            num_fetched_tokens=counts.num_tokens,
            fetch_s=counts.fetch_s,
        )

    def link_bytes_per_s(self, address: str) -> float | None:
        """What the way to another worker carries, as last measured by sending; None before that."""
        return self._sending.peers.link_bytes_per_s(address)

    def peers(self) -> tuple[KvPeer, ...]:
        """One for each worker and direction that there were transfers with."""
        return tuple(
            KvPeer(
                address=one.address,
                direction=KvDirection.SENDING if one.is_sending else KvDirection.RECEIVING,
                transport=one.transport,
                reason=one.reason,
                codec=one.codec,
                num_transfers=one.num_transfers,
                num_bytes=one.num_bytes,
                bytes_per_s=one.bytes_per_s,
                last_problem=one.last_problem,
            )
            for one in self._sending.peers.all()
        )

    def check_invariants(self) -> None:
        """Every lease is of a transfer that lives."""
        self.receiving.check_invariants()
