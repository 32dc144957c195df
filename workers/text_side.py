"""Prefill and decode on one worker: the engine in its thread, and what its outputs become in the loop."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from kvtransfer.stream import MessageStream
from workers.api import (
    EngineCommand,
    Event,
    KvEvent,
    KvLedger,
    KvTransferCounts,
    PhaseSet,
    WorkerSpec,
    WorkerStatus,
)
from workers.embeddings.host import EmbeddingHost
from workers.engine.engine import Engine
from workers.engine.ledger import with_leases
from workers.engine.messages import ImagesNeeded, ImagesReleased, Message, Output, TokensDecoded
from workers.engine.running import Splitting
from workers.engine.sharing import SharingLog, predicted_sharing
from workers.engine.step_loop import StepLoop
from workers.grammar_gate import GrammarGate
from workers.kv_host import EngineKvHost, TransferOutput
from workers.loading import LoadedText
from workers.service import PrefixFound
from workers.sessions import SessionTable

logger = logging.getLogger(__name__)

#: How long the step that runs may take before the engine tells who holds what, or what is cached, in seconds.
ANSWER_TIMEOUT_S = 5.0


class TextSide:
    """Made, used and closed in the loop; the engine runs in a thread of its own, from `start` on.

    on_broken: told, in the loop, why it cannot serve any more.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        loaded: LoadedText,
        sessions: SessionTable,
        *,
        address: str,
        on_broken: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._loaded = loaded
        self._sessions = sessions
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self._embeddings: EmbeddingHost | None = None
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
            latency=loaded.latency,
        )
        self._runner = loaded.split or loaded.runner
        # One callback for each publication, at most a few in each step; both ends take them in order.
        self.step_loop = StepLoop(
            engine,
            self._runner,
            publish=self._publish,
            on_broken=lambda reason: self._call_soon(on_broken, reason),
            latency=loaded.latency,
            overlapping=self._runner if self._runner.may_overlap else None,
            splitting=_splitting(loaded, spec.engine.token_budget),
        )
        self.kv_host = EngineKvHost(
            loaded.pool, spec.incarnation, self.step_loop.post, spec.kv_transfer, address=address
        )
        gate = GrammarGate(loaded.compiler, self.step_loop.post, sessions.deliver)
        self._pass_on = gate.pass_on
        self._thread = threading.Thread(
            target=self.step_loop.run, name=f"engine-{spec.worker_id}", daemon=True
        )

    def start(self, embeddings: EmbeddingHost | None) -> None:
        """Begin to serve. embeddings: those of pictures; None when there are none."""
        self._embeddings = embeddings
        self._thread.start()
        if self._loaded.followers is not None:
            self._loaded.followers.watch(lambda reason: self._call_soon(self._on_broken, reason))

    def post(self, message: Message) -> None:
        """Hand a message to the engine, from any thread."""
        self.step_loop.post(message)

    def pass_on(self, command: EngineCommand) -> None:
        """What a gateway asks for."""
        self._pass_on(command)

    async def receive(self, stream: MessageStream) -> None:
        """A stream of KvTransferService."""
        await self.kv_host.receiving.serve(stream)

    # What is told of it.

    def with_status(self, status: WorkerStatus) -> WorkerStatus:
        """With the engine's part of it."""
        engine = self.step_loop.snapshot
        return replace(
            status,
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            blocks=engine.blocks,
            num_leases=engine.num_leases,
            num_steps=engine.num_steps,
            leaked_blocks=engine.leaked_blocks,
            num_invariant_failures=engine.num_invariant_failures,
            transfers=self._transfers(engine.num_wrong_prefixes),
            peers=self.kv_host.peers(),
            reuse=self.kv_host.with_fetches(engine.reuse),
            work=engine.work,
            first_step_s=engine.first_step_s,
            step_costs=engine.step_costs,
            layout_s=engine.layout_s,
            room_tokens=engine.room_tokens,
        )

    def _transfers(self, num_wrong_prefixes: int) -> KvTransferCounts:
        """Counts of the transfers, and of prefixes that the engine found to be of other tokens."""
        counts = self.kv_host.counts()
        return replace(counts, num_digest_mismatches=counts.num_digest_mismatches + num_wrong_prefixes)

    async def ledger(self) -> KvLedger | None:
        """Who holds which KV blocks; None when the engine has ended. Raises TimeoutError."""
        if not self._thread.is_alive():
            return None
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            ledger = await asyncio.wrap_future(self.step_loop.ledger())
        return with_leases(ledger, self.kv_host.lease_ids())

    async def set_phases(self, phases: PhaseSet) -> str | None:
        """Serve these from now on; why not, when a request here needs one that would go. Raises TimeoutError."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await asyncio.wrap_future(self.step_loop.set_phases(phases))

    async def find_prefix(self, block_hashes: tuple[bytes, ...], address: str) -> PrefixFound | None:
        """What is cached of this chain of blocks, for the worker at this address; None when the engine has ended.

        Answers between two steps; one who gives up waiting costs the engine nothing. Raises TimeoutError.
        """
        if not self._thread.is_alive():
            return None
        engine = self.step_loop.engine
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            num_blocks, num_host_blocks = await asyncio.wrap_future(
                self.step_loop.call(lambda: engine.count_cached(block_hashes))
            )
        layout = self.kv_host.pool.layout
        rate = self.kv_host.link_bytes_per_s(address) or 0.0
        return PrefixFound(num_blocks, num_host_blocks, rate, layout.dtype, layout.weight_dtype)

    async def check_invariants(self) -> None:
        """Those of transfers and, in its own thread, of the engine."""
        self.kv_host.check_invariants()
        await asyncio.wrap_future(self.step_loop.call(self.step_loop.engine.check_invariants))

    # What comes from the engine, first in its thread, then in the loop.

    def _call_soon(self, function: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def _publish(self, outputs: list[Output]) -> None:
        self._call_soon(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        """Events to the gateways, the rest to transfers and embeddings."""
        events: list[Event] = []
        kv_events: list[KvEvent] = []
        try:
            for output in outputs:
                if isinstance(output, TokensDecoded):
                    events.extend(output.events())
                elif isinstance(output, TransferOutput):
                    self.kv_host.handle(output)
                elif isinstance(output, ImagesNeeded | ImagesReleased):
                    assert self._embeddings is not None
                    self._embeddings.handle(output)
                elif isinstance(output, KvEvent):
                    kv_events.append(output)
                else:
                    events.append(output)
            self._sessions.deliver(events)
            if kv_events:
                self._sessions.deliver_kv(kv_events)
        except Exception:
            # Our own bug. What is lost with this batch would be waited for until deadlines.
            logger.exception("dispatch_broke worker_id=%s", self._spec.worker_id)
            self._on_broken("what the engine said could not be passed on; see the worker's log")

    # End.

    async def close_transfers(self, reason: str) -> None:
        """Give up what is on its way."""
        await self.kv_host.close(reason)

    async def close(self, reason: str) -> None:
        """Leave no thread behind."""
        await self.kv_host.close(reason)
        self.step_loop.stop()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        # A GPU that hangs is to hold up nobody else.
        await asyncio.to_thread(self._runner.close)
        await asyncio.to_thread(self._loaded.compiler.close)


def _splitting(loaded: LoadedText, max_prefill_tokens: int) -> Splitting | None:
    """None where no step is split."""
    if loaded.split is None:
        return None
    sharing = predicted_sharing(loaded.latency, loaded.split.layouts, max_prefill_tokens)
    return Splitting(sharing, loaded.split, SharingLog())
