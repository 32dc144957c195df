"""Which workers a request runs on. Pure.

Loads are the gateway's own account of what it has in flight: the view is up to a tick old.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from orchestrator.control.prefill_speed import PrefillSpeed
from orchestrator.control.prefix_index import WorkerKey
from orchestrator.control.transfer_paths import ANSWER_TOKENS, TransferPaths
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import EngineConfig, Phase, PrefixPeer, WorkerId

#: By worker: see rooms_of.
Rooms = Mapping[WorkerId, int]
NO_ROOMS: Rooms = {}
#: Workers that are asked for the beginning of a prompt, all at once.
MAX_PREFIX_PEERS = 8
#: Of engines whose own nobody has told.
GROWTH_RESERVE = EngineConfig().growth_reserve
ENCODE_ALONE = frozenset({Phase.ENCODE})
#: A sequence that decodes on a worker delays a prompt there as so many tokens of prompt do: an estimate that has not been tuned.
#: Without any a beginning that many prompts have would fill one worker.
SEQUENCE_TOKENS = 32
#: Of the shortest predicted time: whoever is within it counts as equal. What equal workers have learnt differs by some percent, and one
#: of them must not get all prompts of an idle cluster for that.
NEAR = 1.1


@dataclass(frozen=True, slots=True)
class PromptLoad:
    """What a prompt would cost where.

    cached: tokens of its beginning that a worker has, where it has any. num_blocks: that a worker has of all prompts. max_tokens: with those that may be
    generated. growth_reserves: of the engines of declared workers.
    """

    num_tokens: int = 0
    cached: Mapping[WorkerKey, int] = field(default_factory=dict)
    num_blocks: Mapping[WorkerKey, int] = field(default_factory=dict)
    max_tokens: int = 0
    growth_reserves: Mapping[WorkerId, float] = field(default_factory=dict)

    def room_at(self, worker: WorkerView) -> int:
        """Tokens for which a worker must have room that begins it: where it is decoded elsewhere those of the prompt."""
        if Phase.DECODE not in worker.phases:
            return self.num_tokens
        reserve = self.growth_reserves.get(worker.worker_id, GROWTH_RESERVE)
        return kept_tokens(self.num_tokens, self.max_tokens, reserve)

    def cached_at(self, worker: WorkerView) -> int:
        """Tokens that this worker need not compute, as far as is known."""
        return self.cached.get((worker.worker_id, worker.incarnation), 0)


@dataclass(frozen=True, slots=True)
class Predicted:
    """From now to a first token, in seconds. wait_s: the part of it that is others' prompts."""

    ttft_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Prefill and decode on these incarnations; one worker may do both."""

    prefill: WorkerView
    decode: WorkerView
    reason: str
    #: Others that may have the KV of the beginning of its prompt, those first that are known to have most of it, then the
    #: decode worker.
    prefix_peers: tuple[PrefixPeer, ...] = ()
    #: Tokens of the prompt that the prefill worker was known to have.
    num_cached_tokens: int = 0
    #: None while no worker has learnt how long its steps take.
    predicted: Predicted | None = None
    #: Tokens for which the prefill worker keeps room, and the decode worker when it is another one: until the prompt is computed, and for a
    #: sequence that moves until its KV is there.
    prefill_room: int = 0
    decode_room: int = 0

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


@dataclass(frozen=True, slots=True)
class Load:
    """What a gateway has in flight on one worker."""

    #: Prompt tokens submitted whose prefill has not ended.
    prefill_tokens: int = 0
    #: Sequences that decode, or will decode, there.
    decode_sequences: int = 0
    #: Patches of pictures that are being encoded there.
    encode_patches: int = 0
    #: That are kept there for prompts which are not computed, and for KV that is to come.
    coming_tokens: int = 0


NO_LOAD = Load()


@dataclass(slots=True)
class LoadLedger:
    """In-flight work for each worker; entries of idle workers are dropped."""

    loads: dict[WorkerId, Load] = field(default_factory=dict)

    def of(self, worker_id: WorkerId) -> Load:
        """What is in flight there; zero for a worker without any."""
        return self.loads.get(worker_id, NO_LOAD)

    def add(
        self,
        worker_id: WorkerId,
        *,
        prefill_tokens: int = 0,
        decode_sequences: int = 0,
        encode_patches: int = 0,
        coming_tokens: int = 0,
    ) -> None:
        """Count work that was submitted (positive) or has ended (negative)."""
        before = self.of(worker_id)
        load = Load(
            before.prefill_tokens + prefill_tokens,
            before.decode_sequences + decode_sequences,
            before.encode_patches + encode_patches,
            before.coming_tokens + coming_tokens,
        )
        assert load.prefill_tokens >= 0, worker_id
        assert load.decode_sequences >= 0, worker_id
        assert load.encode_patches >= 0, worker_id
        assert load.coming_tokens >= 0, worker_id
        if load == NO_LOAD:
            self.loads.pop(worker_id, None)
        else:
            self.loads[worker_id] = load


def choose_route(
    view: ClusterView | None,
    ledger: LoadLedger,
    is_linked: Callable[[WorkerView], bool],
    prompt: PromptLoad | None = None,
    speeds: Mapping[WorkerId, PrefillSpeed] | None = None,
    paths: TransferPaths | None = None,
    rooms: Rooms = NO_ROOMS,
) -> Route | Wait | Refuse:
    """Prefill where the first token, and KV elsewhere if it has to move, are predicted to come first; decode see choose_decode.

    Where some workers have room for its KV, and all tell, it goes to these. is_linked: whether the gateway has a working stream to that incarnation. paths: of KV. rooms: see rooms_of. speeds: of all workers that prefill; without them,
    and among workers that are near each other, that one is first where least is to be computed: what waits there, the
    prompt without what is cached there, and what the sequences there slow it down by. Among equal prefill workers one
    that can also decode wins, since then no KV has to move; of several such the one with fewer sequences, then the one that
    has less in its cache, so that an idle cluster keeps as much as it can. Ties go to the smaller id.
    """
    if view is None:
        return Wait("no controller has published a view of the cluster yet")
    prompt = prompt or PromptLoad()
    ready = ready_workers(view, Phase.PREFILL, is_linked)
    roomy = workers_with_room(ready, ledger, rooms, prompt.room_at)
    candidates = roomy or ready
    if speeds is not None:
        candidates = _soonest(candidates, ledger, prompt, speeds, paths)
    prefill = _cheapest(candidates, ledger, prompt)
    if prefill is None:
        return missing(view, Phase.PREFILL)
    decode: WorkerView | None = prefill
    move: Move | None = None
    if Phase.DECODE not in prefill.phases:
        if paths is not None:
            own = None if speeds is None else speeds[prefill.worker_id]
            hidden_s = 0.0 if own is None else own.token_s * (prompt.num_tokens - prompt.cached_at(prefill))
            move = Move(paths, prefill, prompt.num_tokens, hidden_s)
        decode = choose_decode(view, ledger, is_linked, move, rooms=rooms, max_tokens=prompt.max_tokens)
    if decode is None:
        return missing(view, Phase.DECODE)
    peers = _prefix_peers(view, prefill, decode, is_linked, prompt)
    predicted = None if speeds is None else predict(prefill, ledger, prompt, speeds)
    reason = _reason(prefill, decode, ledger, prompt)
    if 0 < len(roomy) < len(ready):
        reason += f"; {len(roomy)} of {len(ready)} workers have room for its KV"
    if predicted is not None:
        reason += f"; first token in about {predicted.ttft_s:.2g} s"
    if move is not None and (move_s := move.move_s(decode)):
        reason += f"; its KV takes about {move_s:.2g} s, {move.exposed_s(decode):.2g} s of it after prefill"
    return Route(
        prefill,
        decode,
        reason,
        peers,
        prompt.cached_at(prefill),
        predicted,
        prefill_room=prompt.room_at(prefill),
        # A hand-off is given all that it may need.
        decode_room=0 if decode is prefill else prompt.max_tokens,
    )


@dataclass(frozen=True, slots=True)
class Move:
    """KV of so many tokens that is to go from a worker to one that decodes, for hidden_s of it while its prompt is computed."""

    paths: TransferPaths
    source: WorkerView
    num_tokens: int
    hidden_s: float = 0.0

    def move_s(self, target: WorkerView) -> float:
        """All of it; 0 where nothing is known of the way."""
        return self.paths.move_s(self.source, target, self.num_tokens)

    def exposed_s(self, target: WorkerView) -> float:
        """What the next token waits for."""
        return max(0.0, self.move_s(target) - self.hidden_s)


def choose_decode(
    view: ClusterView,
    ledger: LoadLedger,
    is_linked: Callable[[WorkerView], bool],
    move: Move | None = None,
    *,
    rooms: Rooms = NO_ROOMS,
    max_tokens: int = 0,
) -> WorkerView | None:
    """Where fewest sequences are, or, with `move`, where waiting for the KV and for the others' tokens takes least, of those that have room for `max_tokens`.

    All count where none has, or one does not tell. None when no worker can decode now. Ties go to where fewer sequences are, then to the smaller id.
    """
    loads = ledger.loads

    def cost(worker: WorkerView) -> tuple[float, int, WorkerId]:
        num = loads.get(worker.worker_id, NO_LOAD).decode_sequences
        wait_s = 0.0 if move is None else move.exposed_s(worker) + ANSWER_TOKENS * move.paths.sequence_s * num
        return wait_s, num, worker.worker_id

    ready = ready_workers(view, Phase.DECODE, is_linked)
    roomy = workers_with_room(ready, ledger, rooms, lambda _worker: max_tokens)
    return min(roomy or ready, key=cost, default=None)


def kept_tokens(num_tokens: int, max_tokens: int, growth_reserve: float = GROWTH_RESERVE) -> int:
    """For which an engine keeps blocks when it begins a prompt of `num_tokens` that may come to `max_tokens`; whole blocks may be more."""
    return num_tokens + math.ceil(growth_reserve * (max_tokens - num_tokens))


def rooms_of(view: ClusterView) -> Rooms:
    """Tokens for which each worker has room now, as it told last; see WorkerStatus."""
    told = ((one.worker_id, one.status.room_tokens) for one in view.workers if one.status is not None)
    return {worker_id: tokens for worker_id, tokens in told if tokens is not None}


def room_left(worker: WorkerView, ledger: LoadLedger, rooms: Rooms) -> int:
    """Tokens for which it would begin a sequence at once, beside those that have been promised room there; nothing where it does not tell.

    Some of these have it already, so it may be more.
    """
    return rooms.get(worker.worker_id, 0) - ledger.of(worker.worker_id).coming_tokens


def workers_with_room(
    workers: Sequence[WorkerView], ledger: LoadLedger, rooms: Rooms, room_at: Callable[[WorkerView], int]
) -> list[WorkerView]:
    """Those that would begin a sequence at once which needs room for `room_at` tokens there.

    None where one of them does not tell how much it has: it would get all, or nothing.
    """
    loads, found = ledger.loads, []
    for worker in workers:
        room = rooms.get(worker.worker_id)
        if room is None:
            return []
        # Most have none, or enough.
        if room and room - loads.get(worker.worker_id, NO_LOAD).coming_tokens >= room_at(worker):
            found.append(worker)
    return found


def _reason(prefill: WorkerView, decode: WorkerView, ledger: LoadLedger, prompt: PromptLoad) -> str:
    num_cached = prompt.cached_at(prefill)
    cached = f", and {num_cached} of the prompt's {prompt.num_tokens} cached" if num_cached else ""
    num_waiting = ledger.of(prefill.worker_id).prefill_tokens
    if prefill is decode:
        load = f" with {num_waiting} prompt tokens{cached}" if num_waiting or cached else ""
        return f"{prefill.worker_id} serves both phases{load}"
    return (
        f"least loaded: {prefill.worker_id} with {num_waiting} prompt tokens{cached}, "
        f"{decode.worker_id} with {ledger.of(decode.worker_id).decode_sequences} sequences"
    )


def _prefix_peers(
    view: ClusterView,
    prefill: WorkerView,
    decode: WorkerView,
    is_linked: Callable[[WorkerView], bool],
    prompt: PromptLoad,
) -> tuple[PrefixPeer, ...]:
    """Workers beside the one that prefills: after a turn of a conversation its KV is where it was decoded."""
    known = [worker for worker in view.workers if prompt.cached_at(worker)] if prompt.cached else []
    known.sort(key=prompt.cached_at, reverse=True)
    found: list[PrefixPeer] = []
    seen = {prefill.worker_id}
    for worker in chain(known, (decode,), view.workers):
        if (
            worker.worker_id not in seen
            # Whoever only encodes has no KV.
            and worker.phases != ENCODE_ALONE
            and worker.state is LifecycleState.READY
            and is_linked(worker)
        ):
            seen.add(worker.worker_id)
            found.append(PrefixPeer(worker.address, worker.incarnation))
            if len(found) == MAX_PREFIX_PEERS:
                break
    return tuple(found)


def _cheapest(candidates: list[WorkerView], ledger: LoadLedger, prompt: PromptLoad) -> WorkerView | None:
    """See choose_route. Most are out at the first number, so that the others are found for few."""
    loads, cached, num_tokens = ledger.loads, prompt.cached, prompt.num_tokens
    best: WorkerView | None = None
    best_cost = math.inf
    best_rest: tuple[int, int, int, WorkerId] | None = None
    for worker in candidates:
        worker_id = worker.worker_id
        key, load = (worker_id, worker.incarnation), loads.get(worker_id, NO_LOAD)
        can_decode = Phase.DECODE in worker.phases
        cost = load.prefill_tokens + num_tokens - cached.get(key, 0)
        if can_decode:
            cost += SEQUENCE_TOKENS * load.decode_sequences
        if cost > best_cost:
            continue
        rest = 0 if can_decode else 1, load.decode_sequences, prompt.num_blocks.get(key, 0), worker_id
        if cost < best_cost or best_rest is None or rest < best_rest:
            best, best_cost, best_rest = worker, cost, rest
    return best


def ready_workers(
    view: ClusterView, phase: Phase, is_linked: Callable[[WorkerView], bool]
) -> list[WorkerView]:
    """Those that can serve the phase now."""
    return [
        worker
        for worker in view.workers
        if phase in worker.phases and worker.state is LifecycleState.READY and is_linked(worker)
    ]


def _soonest(
    candidates: list[WorkerView],
    ledger: LoadLedger,
    prompt: PromptLoad,
    speeds: Mapping[WorkerId, PrefillSpeed],
    paths: TransferPaths | None,
) -> list[WorkerView]:
    """Those at which the prompt is predicted to be computed first, or nearly, and to be where it can be decoded."""
    loads, cached, num_tokens = ledger.loads, prompt.cached, prompt.num_tokens
    times_s = []
    for worker in candidates:
        worker_id = worker.worker_id
        load = loads.get(worker_id, NO_LOAD)
        num_before = cached.get((worker_id, worker.incarnation), 0)
        speed, num_new = speeds[worker_id], num_tokens - num_before
        time_s = speed.prefill_s(load.prefill_tokens, num_new, num_before, load.decode_sequences)
        if paths is not None and Phase.DECODE not in worker.phases:
            time_s += paths.best_exposed_s(worker, num_tokens, speed.token_s * num_new)
        times_s.append(time_s)
    limit_s = NEAR * min(times_s, default=0.0)
    return [worker for worker, time_s in zip(candidates, times_s, strict=True) if time_s <= limit_s]


def predict(
    worker: WorkerView, ledger: LoadLedger, prompt: PromptLoad, speeds: Mapping[WorkerId, PrefillSpeed]
) -> Predicted:
    """Of a prompt that is given to this worker now, which is one of `speeds`."""
    load, num_before = ledger.of(worker.worker_id), prompt.cached_at(worker)
    speed, num_new = speeds[worker.worker_id], prompt.num_tokens - num_before
    ttft_s = speed.prefill_s(load.prefill_tokens, num_new, num_before, load.decode_sequences)
    return Predicted(ttft_s, ttft_s - speed.prefill_s(0, num_new, num_before, load.decode_sequences))


def missing(view: ClusterView, phase: Phase) -> Wait | Refuse:
    """No worker can serve the phase now: is one coming?"""
    declared = [worker for worker in view.workers if phase in worker.phases | worker.leaving]
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
