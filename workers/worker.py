"""The process around an engine and an encoder: one gRPC server, their threads, and the way between them.

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
from kvtransfer.grpc_stream import EMBEDDINGS, GRPC_OPTIONS, add_handler
from kvtransfer.stream import MessageStream
from kvtransfer.wire import encode
from protos import worker_pb2_grpc as pb_grpc
from workers.api import (
    Abort,
    Command,
    Encode,
    FailureCode,
    KvLedger,
    ModelInfo,
    Phase,
    PhaseSet,
    PhasesRefused,
    RequestFailed,
    RequestKey,
    Submit,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)
from workers.device.gpu_telemetry import GpuTelemetry
from workers.engine.messages import Message
from workers.errors import AddressUnavailable, PhasewiseWorkerError
from workers.image_side import ImageSide
from workers.loading import TEXT_PHASES, LoadedModel, load
from workers.service import PrefixFound, WorkerService
from workers.sessions import SessionTable
from workers.text_side import TextSide

logger = logging.getLogger(__name__)

#: How long calls that are being answered may take to end when the worker stops, in seconds.
STOP_GRACE_S = 1.0


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
    """One worker. Made and used in the loop; the engine runs in a thread of its own.

    text: prefill and decode; images: the embeddings of pictures, and encode. Each is None before the model is loaded, and
    on a worker that does neither.
    """

    def __init__(
        self, spec: WorkerSpec, *, on_state: Callable[[WorkerState, str], None] | None = None
    ) -> None:
        self.spec = spec
        #: What it serves; that of the spec until the first switch.
        self.phases = spec.phases
        self._phase_epoch = 0
        self.text: TextSide | None = None
        self.images: ImageSide | None = None
        self._telemetry: GpuTelemetry | None = None
        self._on_state = on_state
        self._state = WorkerState.LOADING
        self._message = "starting"
        #: The state that was last told to `on_state`.
        self._told_state: WorkerState | None = None
        self._info: ModelInfo | None = None
        self._loop = asyncio.get_running_loop()
        self._sessions = SessionTable()
        self._address = ""
        self._is_broken = asyncio.Event()
        self._process = psutil.Process()

    async def serve(self, *, on_bound: Callable[[str], None], stop: asyncio.Event) -> None:
        """See the function of this name."""
        server = grpc.aio.server(options=(*GRPC_OPTIONS, ("grpc.so_reuseport", 0)))
        service = WorkerService(
            self._sessions,
            self.spec.incarnation,
            status=self.status,
            model=lambda: self._info,
            ledger=self.ledger,
            find_prefix=self.find_prefix,
            set_phases=self.set_phases,
            shut_down=stop.set,
        )
        pb_grpc.add_WorkerServiceServicer_to_server(service, server)
        add_handler(server, self._receive_kv)
        add_handler(server, self._receive_embeddings, EMBEDDINGS)
        address = self._address = _bind(server, self.spec.bind_host, self.spec.port)
        await server.start()
        is_ending = threading.Event()
        try:
            self._set_state(self._state, self._message)
            on_bound(address)
            await self._load(lambda: stop.is_set() or is_ending.is_set())
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._close_transfers_when_broken())]
                if self.images is not None:
                    tasks.append(group.create_task(self.images.run()))
                await stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            is_ending.set()
            await self._end(server)

    def status(self) -> WorkerStatus:
        """What to report now."""
        status = WorkerStatus(
            worker_id=self.spec.worker_id,
            incarnation=self.spec.incarnation,
            phases=self.phases,
            state=self._state,
            message=self._message,
            pid=os.getpid(),
            memory_bytes=self._process.memory_info().rss,
            phase_epoch=self._phase_epoch,
            loaded=self.loaded,
            takes_pictures=self._info is not None and bool(self._info.vision_json),
        )
        if self.text is not None:
            status = self.text.with_status(status)
        if self.images is not None:
            status = self.images.with_status(status)
        if self._telemetry is not None:
            status = replace(status, gpu=self._telemetry.status)
        return status

    @property
    def loaded(self) -> PhaseSet:
        """Phases that this process has weights and memory for. It keeps them, so that it can take back what it gave up."""
        if self._info is None:
            return frozenset()
        text = TEXT_PHASES if self.text is not None else frozenset()
        if not self._info.vision_json:
            return text
        return text - {Phase.PREFILL} | self.spec.phases & {Phase.ENCODE, Phase.PREFILL}

    async def ledger(self) -> KvLedger | None:
        """Who holds which KV blocks; None when there is no engine (any more). Raises TimeoutError."""
        return await self.text.ledger() if self.text is not None else None

    async def find_prefix(self, block_hashes: tuple[bytes, ...], address: str) -> PrefixFound | None:
        """See TextSide; None when there is no engine (any more)."""
        return await self.text.find_prefix(block_hashes, address) if self.text is not None else None

    async def set_phases(self, incarnation: int, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
        """Serve these from now on: None, or why not, and nothing has changed. A repeated call changes nothing either.

        Raises TimeoutError when the engine does not answer; it may change them then.
        """
        refusal = self._phases_refusal(incarnation, phases, phase_epoch)
        if refusal is not None:
            return refusal
        if phases != self.phases:
            # Whoever has loaded encode alone serves encode alone.
            assert self.text is not None
            problem = await self.text.set_phases(phases)
            if problem is not None:
                return PhasesRefused(problem, is_busy=True)
            if self.images is not None:
                self.images.phases_changed(phases - self.phases)
        if phase_epoch > self._phase_epoch:
            logger.info(
                "phases_set worker_id=%s incarnation=%d phase_epoch=%d from=%s to=%s",
                self.spec.worker_id,
                self.spec.incarnation,
                phase_epoch,
                "+".join(sorted(self.phases)),
                "+".join(sorted(phases)),
            )
            self.phases, self._phase_epoch = phases, phase_epoch
        return None

    def _phases_refusal(self, incarnation: int, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
        if incarnation != self.spec.incarnation:
            return PhasesRefused(f"this is incarnation {self.spec.incarnation}, not {incarnation}")
        if self._state is not WorkerState.READY or self._info is None:
            return PhasesRefused(f"the worker is {self._state}: {self._message}")
        if not phases:
            return PhasesRefused("phases: is empty; name one at least")
        if phase_epoch < self._phase_epoch or (phase_epoch == self._phase_epoch and phases != self.phases):
            return PhasesRefused(f"switch {self._phase_epoch} was later than {phase_epoch}")
        if Phase.ENCODE in phases and not self._info.vision_json:
            return PhasesRefused("phases: this model takes no pictures, which encode is about")
        if not phases <= self.loaded:
            return PhasesRefused("it would need weights or memory that it has not", needs_new_process=True)
        if self.images is not None and Phase.ENCODE in self.phases - phases:
            num_left = self.images.num_encodes
            return PhasesRefused(f"{num_left} pictures are encoded here", is_busy=True) if num_left else None
        return None

    async def check_invariants(self) -> None:
        """Those of sessions, transfers, embeddings and engine. The worker must be READY."""
        self._sessions.check_invariants()
        if self.text is not None:
            await self.text.check_invariants()
        if self.images is not None:
            self.images.check_invariants()

    # Start.

    async def _load(self, is_stopped: Callable[[], bool]) -> None:
        """READY or FAILED afterwards, unless it was stopped."""

        def progress(what: str, fraction: float) -> None:
            if is_stopped():
                raise _LoadingStopped
            self._loop.call_soon_threadsafe(self._set_state, WorkerState.LOADING, f"{what} {fraction:.0%}")

        try:
            self._begin(await asyncio.to_thread(load, self.spec, progress))
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

    def _begin(self, loaded: LoadedModel) -> None:
        """Serve with this."""
        if loaded.text is not None:
            self.text = TextSide(
                self.spec, loaded.text, self._sessions, address=self._address, on_broken=self._engine_broke
            )
        if loaded.images is not None:
            post = self.text.post if self.text is not None else _post_nowhere
            self.images = ImageSide(self.spec, loaded.images, self._sessions, post)
        if self.text is not None:
            self.text.start(self.images.host if self.images is not None else None)
        if loaded.gpu_uuid is not None:
            self._telemetry = GpuTelemetry(loaded.gpu_uuid, on_unhealthy=self._gpu_failed)
            self._telemetry.start()
        self._info = loaded.info
        self._sessions.serve_with(self._take, loaded.info.vocab_size)

    def _take(self, command: Command) -> None:
        """A command that came by a session, to whom it is for."""
        key = command.key if isinstance(command, Submit | Encode) else None
        if isinstance(command, Encode) and self.images is not None and Phase.ENCODE in self.phases:
            self.images.encode(command)
        elif isinstance(command, Abort) and self.images is not None and self.images.abort(command):
            return
        elif self.text is not None and not isinstance(command, Encode):
            needs_images = isinstance(command, Submit) and command.images and Phase.PREFILL in command.phases
            if needs_images and self.images is None:
                assert key is not None
                self._refuse(key, FailureCode.INVALID, "images: the model of this worker takes no pictures")
            else:
                self.text.pass_on(command)
        elif key is not None:
            phases = ", ".join(sorted(self.phases))
            # It may have served more when this was sent; another worker does.
            self._refuse(key, FailureCode.INTERNAL, f"phases: this worker serves {phases}")

    def _refuse(self, key: RequestKey, code: FailureCode, reason: str) -> None:
        self._sessions.deliver([RequestFailed(key, code, reason)])

    # What happens.

    def _engine_broke(self, reason: str) -> None:
        self._set_state(WorkerState.FAILED, reason)
        self._sessions.refuse(f"the worker failed: {reason}")
        self._is_broken.set()

    def _gpu_failed(self, reason: str) -> None:
        """In the thread of the telemetry."""
        self._loop.call_soon_threadsafe(self._engine_broke, f"GPU: {reason}")

    async def _close_transfers_when_broken(self) -> None:
        await self._is_broken.wait()
        if self.text is not None:
            await self.text.close_transfers(f"the worker failed: {self._message}")

    async def _receive_kv(self, stream: MessageStream) -> None:
        """A stream of KvTransferService."""
        if self.text is None:
            await self._refuse_stream(stream)
        else:
            await self.text.receive(stream)

    async def _receive_embeddings(self, stream: MessageStream) -> None:
        """The same for embeddings of pictures."""
        host = self.images.host if self.images is not None else None
        if host is None:
            await self._refuse_stream(stream)
        else:
            await host.receiving.serve(stream)

    async def _refuse_stream(self, stream: MessageStream) -> None:
        if self._state is WorkerState.READY:
            refused = Refused("this worker has no use for them: its phases or its model are others", False)
        else:
            refused = Refused(f"the worker is {self._state}: {self._message}", True)
        await stream.write(encode(refused))

    # End.

    async def _end(self, server: grpc.aio.Server) -> None:
        """Answer what runs, give up what is on its way, and leave no thread or socket behind."""
        reason = "the worker is stopping"
        self._sessions.refuse(reason)
        self._sessions.finish()
        if self.images is not None:
            await self.images.close(reason)
        if self.text is not None:
            await self.text.close(reason)
        if self._telemetry is not None:
            await asyncio.to_thread(self._telemetry.stop)
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


def _post_nowhere(_message: Message) -> None:
    raise AssertionError("there is no engine")


def _bind(server: grpc.aio.Server, host: str, port: int) -> str:
    """Listen there; returns host:port with the real port. Raises AddressUnavailable."""
    shown_host = f"[{host}]" if ":" in host else host
    address = f"{shown_host}:{port}"
    try:
        bound_port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressUnavailable(address) from error
    return f"{shown_host}:{bound_port}"
