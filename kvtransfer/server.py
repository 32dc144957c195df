"""MAIN LOOP of receiving: serves the streams that other workers open, and sends what they fetch."""

import asyncio
import logging
from collections.abc import Callable

import grpc.aio

from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import TransferCounts
from kvtransfer.driver import Session
from kvtransfer.errors import (
    CorruptFrame,
    DigestMismatch,
    LeaseExpired,
    PhasewiseTransferError,
    ReservationRefused,
    TooManyStreams,
)
from kvtransfer.fetch_serving import FetchServing
from kvtransfer.frames import Abort, Attach, Committed, Ended, Fetch, Frame, Refused, Reserve, Resume
from kvtransfer.grpc_stream import add_handler
from kvtransfer.host import KvHost
from kvtransfer.lease import Lease, LeaseTable
from kvtransfer.parts import PartJoin
from kvtransfer.pool import PoolOpener
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.session import GivenUp, PartsWhole, StreamBroke, TransferReport
from kvtransfer.stream import MessageStream
from kvtransfer.transports.choice import TransportOpener
from kvtransfer.wire import decode, encode

logger = logging.getLogger(__name__)

#: Transfers that are served at a time; one more is refused. Each holds at most its credits' chunks in memory.
MAX_SESSIONS = 1024
#: Streams that bring the chunks of one transfer.
MAX_FEEDS = 16
#: How long a new stream may take to say what it is for, in seconds.
FIRST_FRAME_S = 5.0
#: Streams that have not said it yet; one more is not listened to.
MAX_NEW_STREAMS = 256


class KvTransferServer:
    """The receiving side of one worker: its leases and the transfers that live now. Made in the loop.

    pools: opens senders' pools, and is its owner's to close; by default one is made as `config.transport` says.
    on_sent(address, report): what was fetched from here has been committed there.
    """

    def __init__(
        self,
        host: KvHost,
        config: KvTransferConfig,
        pools: PoolOpener | None = None,
        *,
        on_sent: Callable[[str, TransferReport], None] | None = None,
    ) -> None:
        self._host = host
        self._config = config
        #: Pools that nobody else uses.
        self._own_pools = TransportOpener(config.transport) if pools is None else None
        self._pools = pools or self._own_pools
        self._leases = LeaseTable()
        self._join = PartJoin(host, self._abort_part, self._commit_part)
        #: Receiving, by transfer and part, in order of arrival.
        self._sessions: dict[tuple[str, int], Session] = {}
        self._num_streams = 0
        self._num_new_streams = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._closed_reason: str | None = None
        self.counts = TransferCounts()
        self._fetches = FetchServing(host, config, self.counts, on_sent)

    @property
    def num_leases(self) -> int:
        """Transfers that hold blocks here."""
        return len(self._leases)

    @property
    def num_transfers(self) -> int:
        """Transfers that live, and streams that have not said what they are."""
        return max(self._num_streams, len(self._sessions) + len(self._fetches.sessions))

    def leases(self) -> list[Lease]:
        """Those that are held now."""
        return self._leases.all()

    def is_lossy(self, transfer_id: str) -> bool:
        """Some of what this transfer has brought came through a codec. To be asked in `commit`; then it is forgotten."""
        machines = [one.machine for one in self._sessions.values() if one.machine.transfer_id == transfer_id]
        is_one_lossy = any(isinstance(machine, ReceiverMachine) and machine.is_lossy for machine in machines)
        # Parts that have committed have no session any more.
        return is_one_lossy or self._join.is_lossy(transfer_id)

    async def serve(self, stream: MessageStream) -> None:
        """One stream, to its end."""
        self._num_streams += 1
        self._is_idle.clear()
        try:
            first = await self._first_frame(stream)
            match first:
                case Reserve():
                    await self._begin(first, stream)
                case Resume():
                    await self._resume(first, stream)
                case Attach():
                    await self._attach(first, stream)
                case Fetch():
                    refusal = await self._fetches.serve(first, stream)
                    if refusal is not None:
                        await _say(stream, Abort(refusal))
                case None:
                    return
                case _:
                    await _say(stream, first)
        finally:
            self._num_streams -= 1
            self._set_idle()

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give this transfer up: its sender is told why, its blocks are released before this returns.

        Nothing happens when there is none, or when it has committed.
        """
        for session in [*self._sessions.values(), *self._fetches.sessions]:
            if session.machine.transfer_id == transfer_id:
                session.post(GivenUp(reason))

    async def close(self, reason: str) -> None:
        """Give up every transfer, and each that comes from now on; returns when none is left."""
        self._closed_reason = reason
        self._fetches.close(reason)
        for session in [*self._sessions.values(), *self._fetches.sessions]:
            session.post(GivenUp(reason))
        await self._is_idle.wait()
        if self._own_pools is not None:
            self._own_pools.close_all()

    def check_invariants(self) -> None:
        """Every lease is of a transfer that lives."""
        self._leases.check_invariants()
        assert len(self._leases) <= len(self._sessions)
        for session in self._sessions.values():
            assert not session.machine.is_ended

    def _abort_part(self, transfer_id: str, part: int, reason: str) -> None:
        session = self._sessions.get((transfer_id, part))
        if session is not None:
            session.post(GivenUp(reason))

    def _commit_part(self, transfer_id: str, part: int) -> None:
        self._sessions[transfer_id, part].post(PartsWhole())

    # Streams.

    async def _first_frame(self, stream: MessageStream) -> Frame | None:
        """What the stream is for; what to answer when that is not known; None when it is gone."""
        if self._num_new_streams >= MAX_NEW_STREAMS:
            return Refused(str(TooManyStreams(MAX_NEW_STREAMS)), retryable=True)
        self._num_new_streams += 1
        try:
            async with asyncio.timeout(min(self._config.lease_s, FIRST_FRAME_S)):
                message = await stream.read()
        except TimeoutError:
            return Ended("nothing was said")
        except ConnectionError:
            return None
        finally:
            self._num_new_streams -= 1
        if message is None:
            return None
        try:
            first = decode(message)
        except CorruptFrame as error:
            # Whoever it was opens another stream and says it again.
            logger.warning("first_frame_corrupt reason=%s", error)
            return None
        except PhasewiseTransferError as error:
            return Ended(str(error))
        if not isinstance(first, (Reserve, Resume, Attach, Fetch)):
            return Ended(f"a stream does not begin with {type(first).__name__}")
        if self._closed_reason is not None:
            return Abort(self._closed_reason) if isinstance(first, Fetch) else Ended(self._closed_reason)
        num_served = len(self._sessions) + self._fetches.num_served
        if num_served >= MAX_SESSIONS and isinstance(first, (Reserve, Fetch)):
            reason = f"{MAX_SESSIONS} transfers are served already"
            return Abort(reason) if isinstance(first, Fetch) else Refused(reason, retryable=True)
        return first

    async def _begin(self, request: Reserve, stream: MessageStream) -> None:
        key = request.transfer_id, request.part
        if await self._begin_again(request, stream):
            return
        if key in self._sessions:
            await _say(stream, Refused("this transfer is served here already", retryable=False))
            return
        machine = ReceiverMachine(
            self._host.pool.layout,
            self._host.incarnation,
            self._leases,
            lease_s=self._config.lease_s,
            resume_s=self._config.resume_s,
            max_in_flight=self._config.credits,
            now_s=asyncio.get_running_loop().time(),
        )
        session = Session(
            machine,
            self._join.host_of(request),
            pools=self._pools,
            on_event=lambda: self._after_event(key, session),
        )
        self._sessions[key] = session
        session.post(request)
        if session.outcome is not None and session.outcome.error is not None and request.num_parts > 1:
            self._join.fail(request, session.outcome.error)
        await self._run(session, stream)

    async def _begin_again(self, request: Reserve, stream: MessageStream) -> bool:
        """Its sender lost the stream before it was answered, and asks again. False when it has to begin anew."""
        session = self._sessions.get((request.transfer_id, request.part))
        if session is None or not isinstance(session.machine, ReceiverMachine):
            return False
        if session.machine.request != request or not session.machine.is_unanswered:
            return False
        await session.detach()
        if session.is_ended or not session.machine.is_unanswered:
            return False
        session.post(request)
        await self._run(session, stream)
        return True

    async def _resume(self, request: Resume, stream: MessageStream) -> None:
        session = self._sessions.get((request.transfer_id, request.part))
        if session is not None:
            await session.detach()
        if session is None or session.is_ended:
            is_over = request.incarnation == self._host.incarnation
            if is_over and self._leases.is_settled(request.lease_id):
                await _say(stream, Committed())
            else:
                reason = f"lease {request.lease_id} of incarnation {request.incarnation} is not known here any more"
                await _say(stream, Ended(reason))
            return
        self.counts.num_resumed += 1
        session.post(request)
        await self._run(session, stream)

    async def _attach(self, request: Attach, stream: MessageStream) -> None:
        session = self._sessions.get((request.transfer_id, request.part))
        if session is None or not isinstance(session.machine, ReceiverMachine):
            await _say(stream, Ended("no such transfer is served here"))
        elif (request.lease_id, request.incarnation) != (session.machine.lease_id, self._host.incarnation):
            await _say(stream, Ended(f"lease {request.lease_id} is not that of this transfer"))
        elif session.num_feeds >= MAX_FEEDS:
            await _say(stream, Ended(f"{MAX_FEEDS} streams bring its chunks already"))
        else:
            await session.feed(stream)

    async def _run(self, session: Session, stream: MessageStream) -> None:
        try:
            await session.attach(stream, awaits_end=False)
        except asyncio.CancelledError:
            # Its call was cancelled, or another stream takes over.
            session.post(StreamBroke("its call was cancelled"))
            raise

    def _after_event(self, key: tuple[str, int], session: Session) -> None:
        machine = session.machine
        assert isinstance(machine, ReceiverMachine)
        if session.is_ended and self._sessions.get(key) is session:
            del self._sessions[key]
            self._note_end(session, machine)
        elif machine.request is not None and machine.request.num_parts > 1:
            commit = machine.awaited_commit
            if commit is not None:
                self._join.note_whole(machine.request, commit.token_ids, is_lossy=machine.is_lossy)

    def _note_end(self, session: Session, machine: ReceiverMachine) -> None:
        outcome = session.outcome
        assert outcome is not None
        error = outcome.error
        self.counts.num_corrupt_chunks += session.num_corrupt_chunks
        self.counts.num_received += error is None
        self.counts.num_expired += isinstance(error, LeaseExpired)
        self.counts.num_refused += isinstance(error, ReservationRefused)
        self.counts.num_digest_mismatches += machine.num_digest_mismatches
        self.counts.num_bytes_received += machine.num_bytes_written
        log = logger.warning if isinstance(error, DigestMismatch) else logger.info
        log(
            "transfer_received transfer_id=%s state=%s transport=%s reason=%s",
            machine.transfer_id,
            machine.state,
            machine.transport,
            error or "committed",
        )
        self._set_idle()

    def _set_idle(self) -> None:
        if not self._sessions and not self._fetches.sessions and self._num_streams == 0:
            self._is_idle.set()


def add_kvtransfer_service(
    server: grpc.aio.Server, host: KvHost, config: KvTransferConfig
) -> KvTransferServer:
    """Serve KvTransferService for `host` on a server that was made with `grpc_stream.GRPC_OPTIONS`."""
    receiving = KvTransferServer(host, config)
    add_handler(server, receiving.serve)
    return receiving


async def _say(stream: MessageStream, frame: Frame) -> None:
    """The only thing that is said on this stream."""
    try:
        await stream.write(encode(frame))
    except ConnectionError as error:
        logger.info("transfer_refusal_lost reason=%s", error)
