"""MAIN LOOP of receiving: serves the streams that senders open, one transfer each."""

import asyncio
import logging

import grpc.aio

from kvtransfer.config import KvTransferConfig
from kvtransfer.driver import Session
from kvtransfer.grpc_stream import add_handler
from kvtransfer.host import KvHost
from kvtransfer.lease import LeaseTable
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.session import GivenUp
from kvtransfer.stream import MessageStream

logger = logging.getLogger(__name__)


class KvTransferServer:
    """The receiving side of one worker: its leases and the transfers that live now. Made in the loop."""

    def __init__(self, host: KvHost, config: KvTransferConfig) -> None:
        self._host = host
        self._config = config
        self._leases = LeaseTable()
        # In order of arrival.
        self._sessions: dict[Session, None] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._closed_reason: str | None = None

    @property
    def num_leases(self) -> int:
        """Transfers that hold blocks here."""
        return len(self._leases)

    @property
    def num_transfers(self) -> int:
        """Streams that are being served, with and without a lease."""
        return len(self._sessions)

    async def serve(self, stream: MessageStream) -> None:
        """One transfer, from Reserve to its end."""
        machine = ReceiverMachine(
            self._host.layout,
            self._host.incarnation,
            self._leases,
            lease_s=self._config.lease_s,
            max_in_flight=self._config.credits,
            now_s=asyncio.get_running_loop().time(),
        )
        session = Session(machine, self._host)
        self._sessions[session] = None
        self._is_idle.clear()
        try:
            if self._closed_reason is not None:
                session.post(GivenUp(self._closed_reason))
            outcome = await session.run(stream, awaits_end=False)
            logger.info(
                "transfer_received transfer_id=%s state=%s reason=%s",
                machine.transfer_id,
                machine.state,
                outcome.error or "committed",
            )
        finally:
            del self._sessions[session]
            if not self._sessions:
                self._is_idle.set()

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give this transfer up: its sender is told why, its blocks are released before this returns.

        Nothing happens when there is none, or when it has committed.
        """
        for session in list(self._sessions):
            if session.machine.transfer_id == transfer_id:
                session.post(GivenUp(reason))

    async def close(self, reason: str) -> None:
        """Give up every transfer, and each that comes from now on; returns when none is left."""
        self._closed_reason = reason
        for session in list(self._sessions):
            session.post(GivenUp(reason))
        await self._is_idle.wait()

    def check_invariants(self) -> None:
        """Every lease is of a transfer that lives."""
        self._leases.check_invariants()
        assert len(self._leases) <= len(self._sessions)


def add_kvtransfer_service(
    server: grpc.aio.Server, host: KvHost, config: KvTransferConfig
) -> KvTransferServer:
    """Serve KvTransferService for `host` on a server that was made with `grpc_stream.GRPC_OPTIONS`."""
    receiving = KvTransferServer(host, config)
    add_handler(server, receiving.serve)
    return receiving
