"""What other workers fetch from this one: cached KV, looked for and sent."""

import asyncio
from collections.abc import Callable

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import TransferCounts
from kvtransfer.driver import Session
from kvtransfer.errors import ReservationRefused
from kvtransfer.frames import Fetch, Reserve
from kvtransfer.host import CachedKv, KvHost
from kvtransfer.kv_range import KvRange
from kvtransfer.sender import SenderMachine
from kvtransfer.session import GivenUp, KvReady, PrefillFinished, Started, TransferReport
from kvtransfer.stream import MessageStream
from kvtransfer.transports.choice import offers_of


class FetchServing:
    """Sends what is fetched from one worker. Used in the loop. counts: of its transfers. on_sent: see KvTransferServer."""

    def __init__(
        self,
        host: KvHost,
        config: KvTransferConfig,
        counts: TransferCounts,
        on_sent: Callable[[str, TransferReport], None] | None,
    ) -> None:
        self._host = host
        self._config = config
        self._counts = counts
        self._on_sent = on_sent
        #: Those that send now, and their transfers.
        self.sessions: dict[Session, str] = {}
        #: Fetches for which the host looks.
        self._num_looking = 0
        self._closed_reason: str | None = None

    @property
    def num_served(self) -> int:
        """Fetches that the host looks for, or that are sent."""
        return len(self.sessions) + self._num_looking

    async def serve(self, fetch: Fetch, stream: MessageStream) -> str | None:
        """Become the sender of cached KV, until it has ended; why not, when that cannot be."""
        layout = self._host.pool.layout
        if fetch.layout.block_size != layout.block_size:
            return f"blocks are of {layout.block_size} tokens here, not {fetch.layout.block_size}"
        try:
            cached = await self._look(fetch)
        except TimeoutError:
            return "the worker was too busy to look"
        except ReservationRefused as refusal:
            return refusal.reason
        if self._closed_reason is not None:
            self._host.release(fetch.transfer_id, cached.block_ids, self._closed_reason)
            return self._closed_reason
        await self._send_cached(fetch, cached, stream)
        return None

    def close(self, reason: str) -> None:
        """Nothing that is found from now on is sent. What is being sent is the caller's to give up."""
        self._closed_reason = reason

    async def _look(self, fetch: Fetch) -> CachedKv:
        self._num_looking += 1
        try:
            async with asyncio.timeout(min(fetch.timeout_s, self._config.lease_s)):
                return await self._host.find_cached(
                    fetch.transfer_id, fetch.block_hashes, min_tokens=fetch.min_tokens
                )
        finally:
            self._num_looking -= 1

    async def _send_cached(self, fetch: Fetch, cached: CachedKv, stream: MessageStream) -> None:
        pool = self._host.pool
        request = Reserve(
            fetch.transfer_id,
            pool.layout,
            cached.num_tokens,
            cached.num_tokens,
            fetch.incarnation,
            fetch.timeout_s,
            token_digest=cached.block_hash,
            offers=offers_of(pool.offers, self._config),
            # Chosen by the manifest or not at all: nothing is known here of the way there.
            codec=self._config.codec or CodecId.NONE,
        )
        machine = SenderMachine(
            request,
            cached.block_ids,
            max_chunk_bytes=self._config.max_chunk_bytes,
            resume_s=0.0,
            now_s=asyncio.get_running_loop().time(),
        )
        session = Session(machine, self._host, block_ids=cached.block_ids)
        self.sessions[session] = fetch.transfer_id
        try:
            session.post(Started())
            session.post(KvReady(KvRange(0, pool.layout.num_layers, 0, cached.num_tokens)))
            session.post(PrefillFinished(()))
            await session.attach(stream, awaits_end=False)
        finally:
            session.post(GivenUp("cancelled"))
            del self.sessions[session]
            if session.outcome is not None and session.outcome.report is not None:
                self._note_sent(fetch, session.outcome.report)

    def _note_sent(self, fetch: Fetch, report: TransferReport) -> None:
        self._counts.num_sent += 1
        self._counts.num_bytes_sent += report.num_bytes
        self._counts.num_resent_chunks += report.num_resent_chunks
        if self._on_sent is not None and fetch.address:
            self._on_sent(fetch.address, report)
