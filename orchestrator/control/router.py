"""Which workers a request runs on. Pure.

Loads are the gateway's own account of what it has in flight: the view is up to a tick old.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import Phase, PrefixPeer, WorkerId

#: Workers that are asked for the beginning of a prompt, all at once.
MAX_PREFIX_PEERS = 8


@dataclass(frozen=True, slots=True)
class Route:
    """Prefill and decode on these incarnations; one worker may do both."""

    prefill: WorkerView
    decode: WorkerView
    reason: str
    #: Others that may have the KV of the beginning of its prompt, the decode worker first.
    prefix_peers: tuple[PrefixPeer, ...] = ()

    @property
    def is_colocated(self) -> bool:
        """No KV has to move."""
        return self.prefill.worker_id == self.decode.worker_id


@dataclass(frozen=True, slots=True)
class Wait:
    """No worker can run it now, but one is on its way."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """No worker can run it, and none is coming."""

    reason: str


@dataclass(slots=True)
class Load:
    """What a gateway has in flight on one worker."""

    #: Prompt tokens submitted whose prefill has not ended.
    prefill_tokens: int = 0
    #: Sequences that decode, or will decode, there.
    decode_sequences: int = 0
    #: Patches of pictures that are being encoded there.
    encode_patches: int = 0


@dataclass(slots=True)
class LoadLedger:
    """In-flight work for each worker; entries of idle workers are dropped."""

    loads: dict[WorkerId, Load] = field(default_factory=dict)

    def of(self, worker_id: WorkerId) -> Load:
        """What is in flight there; zero for a worker without any."""
        return self.loads.get(worker_id) or Load()

    def add(
        self,
        worker_id: WorkerId,
        *,
        prefill_tokens: int = 0,
        decode_sequences: int = 0,
        encode_patches: int = 0,
    ) -> None:
        """Count work that was submitted (positive) or has ended (negative)."""
        load = self.loads.setdefault(worker_id, Load())
        load.prefill_tokens += prefill_tokens
        load.decode_sequences += decode_sequences
        load.encode_patches += encode_patches
        assert load.prefill_tokens >= 0, worker_id
        assert load.decode_sequences >= 0, worker_id
        assert load.encode_patches >= 0, worker_id
        if load == Load():
            del self.loads[worker_id]


def choose_route(
    view: ClusterView | None, ledger: LoadLedger, is_linked: Callable[[WorkerView], bool]
) -> Route | Wait | Refuse:
    """The least loaded workers for prefill and for decode.

    is_linked: whether the gateway has a working stream to that incarnation. Among equally loaded prefill
    workers one that can also decode wins, since then no KV has to move; of several such the one with fewer
    sequences. Ties go to the smaller id.
    """
    if view is None:
        return Wait("no controller has published a view of the cluster yet")
    prefill = _least_loaded(view, Phase.PREFILL, is_linked, lambda w: _prefill_cost(w, ledger))
    if prefill is None:
        return missing(view, Phase.PREFILL)
    if Phase.DECODE in prefill.phases:
        reason = f"{prefill.worker_id} serves both phases"
        return Route(prefill, prefill, reason, _prefix_peers(view, prefill, prefill, is_linked))
    decode = _least_loaded(
        view, Phase.DECODE, is_linked, lambda w: (ledger.of(w.worker_id).decode_sequences,)
    )
    if decode is None:
        return missing(view, Phase.DECODE)
    reason = (
        f"least loaded: {prefill.worker_id} with {ledger.of(prefill.worker_id).prefill_tokens} prompt tokens, "
        f"{decode.worker_id} with {ledger.of(decode.worker_id).decode_sequences} sequences"
    )
    return Route(prefill, decode, reason, _prefix_peers(view, prefill, decode, is_linked))


def _prefix_peers(
    view: ClusterView, prefill: WorkerView, decode: WorkerView, is_linked: Callable[[WorkerView], bool]
) -> tuple[PrefixPeer, ...]:
    """Workers beside the one that prefills: after a turn of a conversation its KV is where it was decoded."""
    others = [
        worker
        for worker in view.workers
        if worker.worker_id != prefill.worker_id
        # Whoever only encodes has no KV.
        and worker.phases != {Phase.ENCODE}
        and worker.state is LifecycleState.READY
        and is_linked(worker)
    ]
    others.sort(key=lambda worker: (worker.worker_id != decode.worker_id, worker.worker_id))
    return tuple(PrefixPeer(worker.address, worker.incarnation) for worker in others[:MAX_PREFIX_PEERS])


def _prefill_cost(worker: WorkerView, ledger: LoadLedger) -> tuple[int, ...]:
    load = ledger.of(worker.worker_id)
    return load.prefill_tokens, 0 if Phase.DECODE in worker.phases else 1, load.decode_sequences


def ready_workers(
    view: ClusterView, phase: Phase, is_linked: Callable[[WorkerView], bool]
) -> list[WorkerView]:
    """Those that can serve the phase now."""
    return [
        worker
        for worker in view.workers
        if phase in worker.phases and worker.state is LifecycleState.READY and is_linked(worker)
    ]


def _least_loaded(
    view: ClusterView,
    phase: Phase,
    is_linked: Callable[[WorkerView], bool],
    cost: Callable[[WorkerView], tuple[int, ...]],
) -> WorkerView | None:
    candidates = ready_workers(view, phase, is_linked)
    return min(candidates, key=lambda worker: (*cost(worker), worker.worker_id), default=None)


def missing(view: ClusterView, phase: Phase) -> Wait | Refuse:
    """No worker can serve the phase now: is one coming?"""
    declared = [worker for worker in view.workers if phase in worker.phases]
    coming = [worker for worker in declared if worker.state is not LifecycleState.FAILED]
    states = "; ".join(_describe(worker) for worker in declared)
    text = f"no worker can {phase} now ({states or 'none is declared'})"
    return Wait(text) if coming else Refuse(text)


def no_encoders(view: ClusterView | None) -> Refuse | None:
    """Why a request with pictures can never run; None when it can, perhaps later."""
    choice = missing(view, Phase.ENCODE) if view is not None else None
    if not isinstance(choice, Refuse):
        return None
    return Refuse(f"{choice.reason}; pictures need a group of workers with the phase encode in the manifest")


def _describe(worker: WorkerView) -> str:
    if worker.state is LifecycleState.READY:
        return f"{worker.worker_id} is ready, and not connected yet"
    return f"{worker.worker_id} is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
