"""Cached prefixes that this worker gets from others instead of computing them."""

import asyncio
import logging
from collections.abc import Callable

from kvtransfer.client import fetch
from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import PeerCounts
from kvtransfer.errors import PhasewiseTransferError
from kvtransfer.grpc_stream import GrpcChannel
from kvtransfer.host import KvHost
from kvtransfer.transports.choice import TransportOpener
from workers.api import PrefixPeer
from workers.engine.messages import FetchPrefix, Message, PrefixFetched
from workers.kv_channels import Peer, PeerChannels
from workers.prefix_rule import min_fetch_tokens

logger = logging.getLogger(__name__)

#: Of a fetch, before the first one was measured: its round trips, in seconds.
ASSUMED_OVERHEAD_S = 0.01
#: Rate of the way to a worker that nothing was sent to yet, in bytes per second.
ASSUMED_BYTES_PER_S = 1e9
#: A prefix is asked for this part of the time that computing it would take, and is computed then.
TIMEOUT_FRACTION = 0.5


class KvFetching:
    """All prefixes that are being fetched. Made and used in the loop.

    rates: what is known of the ways to other workers, where what is fetched is noted too. Every `start` ends in one PrefixFetched.
    """

    def __init__(
        self,
        host: KvHost,
        channels: PeerChannels,
        rates: PeerCounts,
        post: Callable[[Message], None],
        config: KvTransferConfig,
    ) -> None:
        self._host = host
        self._channels = channels
        self._rates = rates
        self._post = post
        self._config = config
        self._pools = TransportOpener(config.transport)
        #: By transfer id. Bounded by the requests that wait in the engine.
        self._tasks: dict[str, asyncio.Task[int]] = {}
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    def start(self, wanted: FetchPrefix) -> None:
        """Ask its peers, one after the other, for what the engine wants."""
        task = asyncio.create_task(self._ask_all(wanted))
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

    async def _ask_all(self, wanted: FetchPrefix) -> int:
        """Tokens that came from the first peer that had enough."""
        if self._is_closed or not self._config.is_prefix_fetched:
            return 0
        layout = self._host.pool.layout
        num_tokens = len(wanted.block_hashes) * layout.block_size
        timeout_s = min(wanted.timeout_s, TIMEOUT_FRACTION * num_tokens / wanted.prefill_tokens_per_s)
        try:
            async with asyncio.timeout(timeout_s):
                for source in wanted.peers:
                    least = min_fetch_tokens(
                        prefill_tokens_per_s=wanted.prefill_tokens_per_s,
                        token_bytes=layout.num_layers * layout.token_bytes,
                        link_bytes_per_s=self._rates.link_bytes_per_s(source.address) or ASSUMED_BYTES_PER_S,
                        overhead_s=ASSUMED_OVERHEAD_S,
                    )
                    if least is None or least > num_tokens:
                        continue
                    found = await self._ask(wanted, source, least, timeout_s)
                    if found > 0:
                        return found
        except TimeoutError:
            logger.info("prefix_fetch_late transfer_id=%s timeout_s=%.3f", wanted.transfer_id, timeout_s)
        return 0

    async def _ask(self, wanted: FetchPrefix, source: PrefixPeer, min_tokens: int, timeout_s: float) -> int:
        peer: Peer = self._channels.take(source.address)
        begin_s = self._loop.time()
        try:
            num_tokens, transport, why = await fetch(
                self._host,
                GrpcChannel(peer.channel),
                self._pools,
                transfer_id=wanted.transfer_id,
                block_hashes=wanted.block_hashes,
                min_tokens=min_tokens,
                timeout_s=timeout_s,
                config=self._config,
            )
        except PhasewiseTransferError as error:
            logger.info(
                "prefix_not_fetched transfer_id=%s peer=%s reason=%s",
                wanted.transfer_id,
                source.address,
                error,
            )
            return 0
        finally:
            await self._channels.give_back(peer, is_lost=False)
        layout = self._host.pool.layout
        self._rates.note(
            source.address,
            is_sending=False,
            transport=transport,
            reason=why,
            codec="none",
            num_bytes=num_tokens * layout.num_layers * layout.token_bytes,
            num_wire_bytes=num_tokens * layout.num_layers * layout.token_bytes,
            busy_s=self._loop.time() - begin_s,
        )
        logger.info(
            "prefix_fetched transfer_id=%s peer=%s num_tokens=%d",
            wanted.transfer_id,
            source.address,
            num_tokens,
        )
        return num_tokens
