"""Cached prefixes that this worker gets from others instead of computing them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc.aio

from kvtransfer.client import fetch
from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import PeerCounts, TransferCounts
from kvtransfer.errors import DigestMismatch, PhasewiseTransferError
from kvtransfer.grpc_stream import GrpcChannel
from kvtransfer.host import KvHost
from kvtransfer.layout import DTYPE_BITS, inexactness
from kvtransfer.transports.choice import TransportOpener
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from workers.api import PrefixPeer
from workers.engine.messages import FetchPrefix, Message, PrefixFetched
from workers.kv_channels import Peer, PeerChannels
from workers.prefix_rule import CachedAt, best_source, min_fetch_tokens

logger = logging.getLogger(__name__)

#: Of a fetch, before the first one was measured: its round trips, in seconds.
ASSUMED_OVERHEAD_S = 0.01
#: Rate of the way to a worker that nothing was sent to yet, in bytes per second.
ASSUMED_BYTES_PER_S = 1e9
#: Rate at which a worker puts blocks from its host memory back into its pool.
ASSUMED_HOST_BYTES_PER_S = 1e9
#: Times that a fetch waits as long for the other's engine as the question who has it did.
ROUND_TRIPS = 1.0
#: Peers answer who has it within this part of the time that computing would take, and between these seconds.
LOOK_FRACTION, MIN_LOOK_S, MAX_LOOK_S = 0.1, 0.02, 1.0
#: Of the rate that a fetch did not reach before it was given up: what is expected of the next one. All that is known
#: is that the way carries less.
LATE_FRACTION = 0.5
#: A prefix is asked for this part of the time that computing it would take, and is computed then.
TIMEOUT_FRACTION = 0.5


@dataclass(slots=True)
class PrefixFetchCounts:
    """Of all prefixes that might have been fetched so far.

    num_refused: those that were faster computed, by the rule, whether or not others were asked. fetch_s: from the first
    question to the last byte, of those that came.
    """

    num_asked: int = 0
    num_fetched: int = 0
    num_refused: int = 0
    num_tokens: int = 0
    fetch_s: float = 0.0


class KvFetching:
    """All prefixes that are being fetched. Made and used in the loop.

    rates: what is known of the ways to other workers, where what is fetched is noted too. Every `start` ends in one PrefixFetched.
    """

    def __init__(
        self,
        host: KvHost,
        channels: PeerChannels,
        rates: PeerCounts,
        pools: TransportOpener,
        post: Callable[[Message], None],
        config: KvTransferConfig,
        *,
        address: str = "",
    ) -> None:
        """address: of this worker, as others know it (host:port)."""
        self.counts = PrefixFetchCounts()
        #: The transfers by which prefixes came, or did not.
        self.transfer_counts = TransferCounts()
        self._address = address
        self._host = host
        self._channels = channels
        self._rates = rates
        self._post = post
        self._config = config
        self._pools = pools
        #: By transfer id. Bounded by the requests that wait in the engine.
        self._tasks: dict[str, asyncio.Task[int]] = {}
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    def start(self, wanted: FetchPrefix) -> None:
        """Ask its peers who has what the engine wants, and get it from the best of them."""
        task = asyncio.create_task(self._fetch(wanted))
        self._tasks[wanted.transfer_id] = task
        # Also of one that is cancelled before it has begun.
        task.add_done_callback(lambda done: self._ended(wanted.transfer_id, done))

    def abort(self, transfer_id: str, reason: str) -> None:
        """Its request is over. Nothing happens when nothing is fetched under this id."""
        task = self._tasks.get(transfer_id)
        if task is not None:
            task.cancel(reason)

    async def close(self, reason: str) -> None:
        """Give up all, and each that is started from now on; returns when none is left."""
        self._is_closed = True
        while self._tasks:
            for task in self._tasks.values():
                task.cancel(reason)
            await asyncio.wait(self._tasks.values())

    def _ended(self, transfer_id: str, task: "asyncio.Task[int]") -> None:
        del self._tasks[transfer_id]
        num_tokens = 0
        if not task.cancelled():
            error = task.exception()
            if error is None:
                num_tokens = task.result()
            else:
                logger.error("prefix_fetch_broke transfer_id=%s", transfer_id, exc_info=error)
        self._post(PrefixFetched(transfer_id, num_tokens))

    async def _fetch(self, wanted: FetchPrefix) -> int:
        """Tokens that came from the worker from which that saves most; 0 when none saves anything."""
        if self._is_closed or not self._config.is_prefix_fetched:
            return 0
        num_tokens = len(wanted.block_hashes) * self._host.pool.layout.block_size
        compute_s = num_tokens / wanted.prefill_tokens_per_s
        sources = [one for one in wanted.peers if self._may_pay(wanted, one.address, num_tokens)]
        if not sources:
            self.counts.num_refused += 1
            return 0
        self.counts.num_asked += 1
        begin_s = self._loop.time()
        timeout_s = min(wanted.timeout_s, TIMEOUT_FRACTION * compute_s)
        #: Address, bytes and begin of the fetch.
        running: tuple[str, int, float] | None = None
        try:
            async with asyncio.timeout(timeout_s):
                look_s = min(max(MIN_LOOK_S, LOOK_FRACTION * compute_s), MAX_LOOK_S)
                found = await self._look(wanted, sources, min(look_s, timeout_s))
                address = best_source(
                    found,
                    prefill_tokens_per_s=wanted.prefill_tokens_per_s,
                    token_bytes=self._token_bytes,
                )
                if address is None:
                    # What nobody has was not refused.
                    self.counts.num_refused += bool(found)
                    return 0
                running = address, found[address].num_tokens * self._token_bytes, self._loop.time()
                num_fetched = await self._fetch_from(wanted, address, found[address], timeout_s)
        except TimeoutError:
            logger.info("prefix_fetch_late transfer_id=%s timeout_s=%.3f", wanted.transfer_id, timeout_s)
            if running is not None:
                self._note_late(*running)
            return 0
        if num_fetched > 0:
            self.counts.num_fetched += 1
            self.counts.num_tokens += num_fetched
            self.counts.fetch_s += self._loop.time() - begin_s
        return num_fetched

    @property
    def _token_bytes(self) -> int:
        """KV of one token over all layers."""
        layout = self._host.pool.layout
        return layout.num_layers * layout.token_bytes

    def _min_tokens(self, wanted: FetchPrefix, *, link_bytes_per_s: float, overhead_s: float) -> int | None:
        return min_fetch_tokens(
            prefill_tokens_per_s=wanted.prefill_tokens_per_s,
            token_bytes=self._token_bytes,
            link_bytes_per_s=link_bytes_per_s,
            overhead_s=overhead_s,
        )

    def _may_pay(self, wanted: FetchPrefix, address: str, num_tokens: int) -> bool:
        """Fetching all of it from there would be faster than computing it, as far as that is known here."""
        rate = self._believed(address, self._rates.link_bytes_per_s(address))
        least = self._min_tokens(wanted, link_bytes_per_s=rate, overhead_s=ASSUMED_OVERHEAD_S)
        return least is not None and least <= num_tokens

    def _believed(self, address: str, measured: float | None) -> float:
        """Bytes per second of the way from there. measured: by whoever sent there, if anybody did."""
        bound = LATE_FRACTION * self._rates.fetch_bound(address, self._loop.time())
        return min(measured or ASSUMED_BYTES_PER_S, bound)

    async def _look(
        self, wanted: FetchPrefix, sources: Sequence[PrefixPeer], timeout_s: float
    ) -> dict[str, CachedAt]:
        """What each of them has, all asked at once. One that has nothing, or does not answer in time, is left out."""
        async with asyncio.TaskGroup() as group:
            asked = {
                one.address: group.create_task(self._look_at(wanted, one.address, timeout_s))
                for one in sources
            }
        answers = {address: task.result() for address, task in asked.items()}
        return {address: answer for address, answer in answers.items() if answer is not None}

    async def _look_at(self, wanted: FetchPrefix, address: str, timeout_s: float) -> CachedAt | None:
        peer = self._channels.take(address)
        begin_s = self._loop.time()
        try:
            answer = await pb_grpc.WorkerServiceStub(peer.channel).FindPrefix(
                pb.FindPrefixRequest(block_hashes=wanted.block_hashes, address=self._address),
                timeout=timeout_s,
            )
        except grpc.aio.AioRpcError as error:
            logger.info(
                "prefix_not_found transfer_id=%s peer=%s reason=%s",
                wanted.transfer_id,
                address,
                error.details() or error.code(),
            )
            return None
        finally:
            await self._channels.give_back(peer, is_lost=False)
        num_blocks = min(answer.num_blocks, len(wanted.block_hashes))
        if num_blocks == 0 or not self._is_exact(answer):
            return None
        size = self._host.pool.layout.block_size
        # Of the way that the KV takes, which only its sender has measured; else of the way back.
        rate = self._believed(address, answer.link_bytes_per_s or self._rates.link_bytes_per_s(address))
        return CachedAt(
            num_blocks * size,
            rate,
            # The other's engine answers between two steps, and does so again.
            overhead_s=ASSUMED_OVERHEAD_S + ROUND_TRIPS * (self._loop.time() - begin_s),
            host_tokens=min(answer.num_host_blocks, num_blocks) * size,
            host_bytes_per_s=ASSUMED_HOST_BYTES_PER_S,
        )

    def _is_exact(self, answer: pb.FindPrefixResponse) -> bool:
        """What this peer has is what is computed here: nothing else would be taken when it has come."""
        here = self._host.pool.layout
        if answer.kv_dtype not in DTYPE_BITS:
            return False
        there = replace(here, dtype=answer.kv_dtype, weight_dtype=answer.weight_dtype)
        return inexactness(there, here) is None

    async def _fetch_from(self, wanted: FetchPrefix, address: str, cached: CachedAt, timeout_s: float) -> int:
        """Tokens that came from there."""
        # It may have lost some since.
        least = self._min_tokens(
            wanted, link_bytes_per_s=cached.link_bytes_per_s, overhead_s=cached.overhead_s
        )
        peer: Peer = self._channels.take(address)
        begin_s = self._loop.time()
        try:
            num_tokens, transport, why = await fetch(
                self._host,
                GrpcChannel(peer.channel),
                self._pools,
                transfer_id=wanted.transfer_id,
                block_hashes=wanted.block_hashes,
                min_tokens=min(least or 1, cached.num_tokens),
                timeout_s=timeout_s,
                config=self._config,
                counts=self.transfer_counts,
                address=self._address,
            )
        except PhasewiseTransferError as error:
            self._note_failure(wanted.transfer_id, address, error)
            return 0
        finally:
            await self._channels.give_back(peer, is_lost=False)
        num_bytes = num_tokens * self._token_bytes
        self._rates.note(
            address,
            is_sending=False,
            transport=transport,
            reason=why,
            codec="none",
            num_bytes=num_bytes,
            num_wire_bytes=num_bytes,
            busy_s=self._loop.time() - begin_s,
        )
        logger.info(
            "prefix_fetched transfer_id=%s peer=%s num_tokens=%d",
            wanted.transfer_id,
            address,
            num_tokens,
        )
        return num_tokens

    def _note_late(self, address: str, num_bytes: int, begin_s: float) -> None:
        now_s = self._loop.time()
        self._rates.note_late(address, num_bytes=num_bytes, elapsed_s=now_s - begin_s, now_s=now_s)

    def _note_failure(self, transfer_id: str, address: str, error: PhasewiseTransferError) -> None:
        log = logger.info
        if isinstance(error, DigestMismatch):
            log = logger.warning
        log("prefix_not_fetched transfer_id=%s peer=%s reason=%s", transfer_id, address, error)
