"""Where requests go: the router's decisions for samples of requests, from all that the gateway knows. Reads no clock, sends nothing."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from orchestrator.control.prefill_speed import PrefillSpeed, prefill_speeds
from orchestrator.control.prefix_index import PrefixIndex
from orchestrator.control.rerouting import (
    REST_S,
    WaitingPrompt,
    crowded_workers,
    is_worth,
    most_room,
    without_room,
)
from orchestrator.control.router import (
    NO_ROOMS,
    LoadLedger,
    Move,
    PromptLoad,
    Refuse,
    Rooms,
    Route,
    Wait,
    choose_decode,
    choose_route,
    no_encoders,
    predict,
    ready_workers,
    room_left,
    rooms_of,
)
from orchestrator.control.transfer_paths import TransferPaths
from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.gateway.live_request import LiveSample
from workers.api import Phase, WorkerId

#: Between two looks at how fast KV goes between workers, in seconds.
PATHS_EVERY_S = 1.0


class Routes:
    """ledger, prefixes: the gateway's own account of what workers have in flight and have cached, which others keep. is_open: whether a worker can be sent to.

    token_budgets: of a step of each worker's engine. growth_reserves: of each engine, see EngineConfig. Times are of one clock, in seconds.
    """

    def __init__(
        self,
        ledger: LoadLedger,
        prefixes: PrefixIndex,
        is_open: Callable[[WorkerView], bool],
        token_budgets: Mapping[WorkerId, int],
        growth_reserves: Mapping[WorkerId, float],
    ) -> None:
        self._view: ClusterView | None = None
        self._ledger, self._prefixes, self._is_open = ledger, prefixes, is_open
        self._token_budgets, self._growth_reserves = token_budgets, growth_reserves
        #: As of the view; None while no worker has learnt how long its steps take.
        self._speeds: dict[WorkerId, PrefillSpeed] | None = None
        self._rooms: Rooms = NO_ROOMS
        self._paths: TransferPaths | None = None
        self._paths_at_s = 0.0
        #: When prompts that wait for room were looked at, last.
        self._looked_at_s = -math.inf
        #: Whose turn it is then: those of later attempts first.
        self._looked_at_last = 0

    @property
    def view(self) -> ClusterView | None:
        """The one that is in use."""
        return self._view

    def update(self, view: ClusterView, now_s: float) -> None:
        """Use this view from now on."""
        self._view = view
        self._speeds = prefill_speeds(view, self._token_budgets)
        self._rooms = rooms_of(view)
        if self._paths is None or now_s - self._paths_at_s >= PATHS_EVERY_S:
            self._paths, self._paths_at_s = TransferPaths.of(view), now_s

    def ready(self, phase: Phase) -> list[WorkerView]:
        """Workers that can be given requests for it."""
        assert self._view is not None
        return ready_workers(self._view, phase, self._is_open)

    def choose(self, avoided: frozenset[WorkerId], prompt: PromptLoad | None = None) -> Route | Wait | Refuse:
        """The best route without the avoided workers, or else with them."""
        if avoided:
            choice = self._best(prompt, lambda w: self._is_open(w) and w.worker_id not in avoided)
            if isinstance(choice, Route):
                return choice
        return self._best(prompt, self._is_open)

    def choose_for(self, sample: LiveSample) -> Route | Wait | Refuse:
        """The workers of the request's first sample, where the prompt is cached, if they can be had."""
        if sample.machine.images is not None and (refusal := no_encoders(self._view)) is not None:
            return refusal
        prompt = self._prompt_load(sample)
        first = sample.request.samples[0].machine.route
        if first is not None and sample.index > 0 and sample.machine.num_attempts == 0:
            wanted = {first.prefill.worker_id, first.decode.worker_id}
            choice = self._best(prompt, lambda w: self._is_open(w) and w.worker_id in wanted)
            if isinstance(choice, Route):
                return choice
        return self.choose(frozenset(sample.machine.avoided), prompt)

    def choose_decode(self, sample: LiveSample) -> WorkerView | None:
        """Who is to decode it instead of the worker that does; None while nobody can."""
        assert self._view is not None
        machine, move = sample.machine, None
        if self._paths is not None and machine.route is not None:
            # It stops while its KV moves: nothing of it is hidden.
            move = Move(self._paths, machine.route.decode, machine.num_prefill_tokens)
        return choose_decode(
            self._view, self._ledger, self._is_open, move, rooms=self._rooms, max_tokens=machine.max_tokens
        )

    def take_prompts_without_room(
        self, running: Mapping[int, LiveSample], now_s: float
    ) -> list[WaitingPrompt]:
        """Those whose turn it is, of those for which their workers have no room while others have some; `why_again` says whether they go there. The most urgent first.

        running: samples that workers have, by their attempt, in the order of these. None soon after the last ones.
        """
        if self._speeds is None or now_s < self._looked_at_s + REST_S:
            return []
        crowded = crowded_workers(self._ledger, self._rooms)
        most = most_room(self.ready(Phase.PREFILL), self._ledger, self._rooms) if crowded else 0
        if most <= 0:
            return []
        self._looked_at_s = now_s
        prompts = _waiting_at(crowded, running, self._looked_at_last)
        looks = without_room(prompts, self._rooms, most, now_s)
        self._looked_at_last = looks.last_in_turn
        return looks.prompts

    def may_be_crowded(self, view: ClusterView) -> bool:
        """Some worker may have no room for a prompt that it was given, by this view."""
        return bool(crowded_workers(self._ledger, rooms_of(view)))

    def why_again(self, sample: LiveSample, waited_s: float) -> str:
        """Why it goes to another worker that has room; empty when it stays."""
        machine, load, speeds = sample.machine, self._prompt_load(sample), self._speeds
        choice = self.choose(frozenset(machine.avoided), load)
        if speeds is None or machine.route is None:
            return ""
        if not isinstance(choice, Route) or choice.predicted is None:
            return ""
        here, there = machine.route.prefill, choice.prefill
        if room_left(there, self._ledger, self._rooms) < load.room_at(there):
            return ""
        if not is_worth(waited_s, predict(here, self._ledger, load, speeds), choice.predicted):
            return ""
        return f"{here.worker_id} has no room for its KV, and {there.worker_id} has"

    def _best(
        self, prompt: PromptLoad | None, may_use: Callable[[WorkerView], bool]
    ) -> Route | Wait | Refuse:
        return choose_route(self._view, self._ledger, may_use, prompt, self._speeds, self._paths, self._rooms)

    def _prompt_load(self, sample: LiveSample) -> PromptLoad:
        """What it would cost where. A prompt whose tokens are scored is computed whole."""
        machine = sample.machine
        is_scored = machine.sampling.num_prompt_logprobs is not None
        cached = {} if is_scored else self._prefixes.cached_tokens(sample.request.chain)
        num_blocks = self._prefixes.num_blocks_by_worker()
        return PromptLoad(
            machine.num_prefill_tokens, cached, num_blocks, machine.max_tokens, self._growth_reserves
        )


def can_go_back(sample: LiveSample) -> bool:
    """Nobody has begun it, this is not its last attempt, and it would not come back: samples after the first of their request follow that."""
    machine = sample.machine
    is_following = sample.index > 0 and machine.num_attempts == 1
    return machine.is_prefill_waiting and not machine.has_last_attempt and not is_following


def _waiting_at(
    workers: frozenset[WorkerId], running: Mapping[int, LiveSample], last: int
) -> Iterator[WaitingPrompt]:
    """Prompts that these workers were given and have not begun, those after attempt `last` first."""
    in_turn = itertools.chain(
        (sample for attempt, sample in running.items() if attempt > last),
        (sample for attempt, sample in running.items() if attempt <= last),
    )
    for sample in in_turn:
        route = sample.machine.route
        if route is None or route.prefill.worker_id not in workers or not can_go_back(sample):
            continue
        # Embeddings of pictures are there, or on their way.
        if sample.machine.images is None:
            yield sample.as_waiting(route)
