"""The process around an engine: one gRPC server, one engine thread, and the way between them.

The same for any set of phases, as a plain process (`main`) and in a Ray actor (`actor`).

The server listens before the model is loaded, so that whoever started the worker can ask how far it is.
A worker that cannot serve stays, says why, and ends when it is told to.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace

import grpc.aio
import psutil

from kvtransfer.errors import PhasewiseTransferError
from kvtransfer.frames import Refused
from kvtransfer.grpc_stream import GRPC_OPTIONS, add_handler
from kvtransfer.stream import MessageStream
from kvtransfer.wire import encode
from protos import worker_pb2_grpc as pb_grpc
from workers.api import Event, KvEvent, KvLedger, WorkerSpec, WorkerState, WorkerStatus
from workers.engine.engine import Engine
from workers.engine.ledger import with_leases
from workers.engine.messages import Output, TokensDecoded
from workers.engine.step_loop import StepLoop
from workers.errors import AddressUnavailable, PhasewiseWorkerError
from workers.grammar_gate import GrammarGate
from workers.kv_host import EngineKvHost, TransferOutput
from workers.loading import LoadedModel, load
from workers.service import WorkerService
from workers.sessions import SessionTable

logger = logging.getLogger(__name__)

#: How long calls that are being answered may take to end when the worker stops, in seconds.
STOP_GRACE_S = 1.0
#: How long the step that runs may take before the engine tells who holds what, in seconds.
LEDGER_TIMEOUT_S = 5.0


async def serve(
    spec: WorkerSpec,
    *,
    on_bound: Callable[[str], None],
    stop: asyncio.Event,
    on_state: Callable[[WorkerState, str], None] | None = None,
) -> None:
    """Run one worker until `stop` is set, or Shutdown is called, which sets it.

    on_bound: told host:port once the server listens. on_state: told every change of state, with a message.
    Raises AddressUnavailable.
    """
    await Worker(spec, on_state=on_state).serve(on_bound=on_bound, stop=stop)


class _LoadingStopped(Exception):  # noqa: N818 - not an error: it ends a load that nobody needs any more
    pass


class Worker:
    """One worker. Made and used in the loop; the engine runs in a thread of its own."""

    def __init__(
        self, spec: WorkerSpec, *, on_state: Callable[[WorkerState, str], None] | None = None
    ) -> None:
        self.spec = spec
        self._on_state = on_state
        self._state = WorkerState.LOADING
        self._message = "starting"
        #: The state that was last told to `on_state`.
        self._told_state: WorkerState | None = None
        self._loaded: LoadedModel | None = None
        self._loop = asyncio.get_running_loop()
        self._sessions = SessionTable()
        self._step_loop: StepLoop | None = None
        self._kv_host: EngineKvHost | None = None
        self._thread: threading.Thread | None = None
        self._is_broken = asyncio.Event()
        self._process = psutil.Process()

    async def serve(self, *, on_bound: Callable[[str], None], stop: asyncio.Event) -> None:
        """See the function of this name."""
        server = grpc.aio.server(options=(*GRPC_OPTIONS, ("grpc.so_reuseport", 0)))
        service = WorkerService(
            self._sessions,
            self.spec.incarnation,
            status=self.status,
            model=lambda: self._loaded.info if self._loaded is not None else None,
            ledger=self.ledger,
            shut_down=stop.set,
        )
        pb_grpc.add_WorkerServiceServicer_to_server(service, server)
        add_handler(server, self._receive)
        address = _bind(server, self.spec.bind_host, self.spec.port)
        await server.start()
        is_ending = threading.Event()
        try:
            self._set_state(self._state, self._message)
            on_bound(address)
            await self._load(lambda: stop.is_set() or is_ending.is_set())
            async with asyncio.TaskGroup() as group:
                closing = group.create_task(self._close_transfers_when_broken())
                await stop.wait()
                closing.cancel()
        finally:
            is_ending.set()
            await self._end(server)

    def status(self) -> WorkerStatus:
        """What to report now."""
        status = WorkerStatus(
            worker_id=self.spec.worker_id,
            incarnation=self.spec.incarnation,
            phases=self.spec.phases,
            state=self._state,
            message=self._message,
            pid=os.getpid(),
            memory_bytes=self._process.memory_info().rss,
        )
        if self._step_loop is None or self._kv_host is None:
            return status
        engine = self._step_loop.snapshot
        return replace(
            status,
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            blocks=engine.blocks,
            num_leases=engine.num_leases,
            num_steps=engine.num_steps,
            leaked_blocks=engine.leaked_blocks,
            num_invariant_failures=engine.num_invariant_failures,
            transfers=self._kv_host.counts(),
            peers=self._kv_host.peers(),
        )

    async def ledger(self) -> KvLedger | None:
        """Who holds which KV blocks; None when there is no engine (any more). Raises TimeoutError."""
        if self._step_loop is None or self._kv_host is None or self._thread is None:
            return None
        if not self._thread.is_alive():
            return None
        async with asyncio.timeout(LEDGER_TIMEOUT_S):
            ledger = await asyncio.wrap_future(self._step_loop.ledger())
        return with_leases(ledger, self._kv_host.lease_ids())

    async def check_invariants(self) -> None:
        """Those of sessions, transfers and, in its own thread, of the engine. The worker must be READY."""
        assert self._step_loop is not None
        assert self._kv_host is not None
        self._sessions.check_invariants()
        self._kv_host.check_invariants()
        await asyncio.wrap_future(self._step_loop.call(self._step_loop.engine.check_invariants))

    # Start.

    async def _load(self, is_stopped: Callable[[], bool]) -> None:
        """READY or FAILED afterwards, unless it was stopped."""

        def progress(what: str, fraction: float) -> None:
            if is_stopped():
                raise _LoadingStopped
            self._loop.call_soon_threadsafe(self._set_state, WorkerState.LOADING, f"{what} {fraction:.0%}")

        try:
            self._start_engine(await asyncio.to_thread(load, self.spec, progress))
        except _LoadingStopped:
            return
        except (PhasewiseWorkerError, PhasewiseTransferError) as error:
            self._set_state(WorkerState.FAILED, str(error))
        except Exception as error:
            logger.exception("loading_broke worker_id=%s", self.spec.worker_id)
            self._set_state(WorkerState.FAILED, f"loading failed: {error!r}; see the worker's log")
        else:
            self._set_state(WorkerState.READY, "")
            return
        self._sessions.refuse(f"the worker failed: {self._message}")

    def _start_engine(self, loaded: LoadedModel) -> None:
        spec = self.spec
        engine = Engine(
            spec.engine,
            spec.phases,
            num_blocks=loaded.num_blocks,
            max_context_tokens=loaded.config.max_context_tokens,
            claim_s=spec.kv_transfer.lease_s,
            attention_tokens=loaded.config.attention_tokens,
            root_of=loaded.root_of,
            punctuation=loaded.punctuation,
            packer=loaded.packer,
            pacing=loaded.pacing,
        )
        # One callback for each publication, at most a few in each step; both ends take them in order.
        self._step_loop = StepLoop(
            engine,
            loaded.runner,
            publish=self._publish,
            on_broken=self._on_broken,
        )
        self._kv_host = EngineKvHost(loaded.pool, spec.incarnation, self._step_loop.post, spec.kv_transfer)
        gate = GrammarGate(loaded.compiler, self._step_loop.post, self._sessions.deliver)
        self._sessions.serve_with(gate.pass_on, loaded.config.vocab_size)
        self._loaded = loaded
        self._thread = threading.Thread(
            target=self._step_loop.run, name=f"engine-{spec.worker_id}", daemon=True
        )
        self._thread.start()

    # What comes from the engine, first in its thread, then in the loop.

    def _publish(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _on_broken(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._engine_broke, reason)

    def _dispatch(self, outputs: list[Output]) -> None:
        """Events to the gateways, the rest to the transfers."""
        assert self._kv_host is not None
        events: list[Event] = []
        kv_events: list[KvEvent] = []
        try:
            for output in outputs:
                if isinstance(output, TokensDecoded):
                    events.extend(output.events())
                elif isinstance(output, TransferOutput):
                    self._kv_host.handle(output)
                elif isinstance(output, KvEvent):
                    kv_events.append(output)
                else:
                    events.append(output)
            self._sessions.deliver(events)
            if kv_events:
                self._sessions.deliver_kv(kv_events)
        except Exception:
            # Our own bug. What is lost with this batch would be waited for until deadlines.
            logger.exception("dispatch_broke worker_id=%s", self.spec.worker_id)
            self._engine_broke("what the engine said could not be passed on; see the worker's log")

    def _engine_broke(self, reason: str) -> None:
        self._set_state(WorkerState.FAILED, reason)
        self._sessions.refuse(f"the worker failed: {reason}")
        self._is_broken.set()

    async def _close_transfers_when_broken(self) -> None:
        await self._is_broken.wait()
        assert self._kv_host is not None
        await self._kv_host.close(f"the worker failed: {self._message}")

    async def _receive(self, stream: MessageStream) -> None:
        """A stream of KvTransferService."""
        if self._kv_host is None:
            await stream.write(encode(Refused(f"the worker is {self._state}: {self._message}", True)))
            return
        await self._kv_host.receiving.serve(stream)

    # End.

    async def _end(self, server: grpc.aio.Server) -> None:
        """Answer what runs, give up what is on its way, and leave no thread or socket behind."""
        reason = "the worker is stopping"
        self._sessions.refuse(reason)
        self._sessions.finish()
        if self._kv_host is not None:
            await self._kv_host.close(reason)
        if self._step_loop is not None and self._thread is not None:
            self._step_loop.stop()
            await asyncio.to_thread(self._thread.join)
        if self._loaded is not None:
            self._loaded.runner.close()
            await asyncio.to_thread(self._loaded.compiler.close)
        await server.stop(STOP_GRACE_S)
        logger.info("worker_stopped worker_id=%s incarnation=%d", self.spec.worker_id, self.spec.incarnation)

    def _set_state(self, state: WorkerState, message: str) -> None:
        self._state, self._message = state, message
        if state is self._told_state:
            return
        self._told_state = state
        logger.info(
            "worker_state_changed worker_id=%s incarnation=%d state=%s message=%s",
            self.spec.worker_id,
            self.spec.incarnation,
            state,
            message,
        )
        if self._on_state is not None:
            self._on_state(state, message)


def _bind(server: grpc.aio.Server, host: str, port: int) -> str:
    """Listen there; returns host:port with the real port. Raises AddressUnavailable."""
    shown_host = f"[{host}]" if ":" in host else host
    address = f"{shown_host}:{port}"
    try:
        bound_port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressUnavailable(address) from error
    return f"{shown_host}:{bound_port}"
