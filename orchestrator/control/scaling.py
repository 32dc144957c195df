"""How many workers there are beyond the declared ones: asked for when phase moves do not help, and taken back. Pure.

The last lever of the `phasewise` policy. What the load is, and what one more worker would serve, is said by `policies.phase_sets`; a
worker that goes is drained as in a switch of phases: what it serves goes elsewhere first, sequences with their KV.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.control.look import Look
from orchestrator.control.role_switch import OBSERVED_S
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.view import LifecycleState, ScaleState, ScaleView
from orchestrator.control.worker_machine import WorkerMachine
from workers.api import Phase, PhaseSet, WorkerId, WorkerStatus

#: Decisions that are remembered.
MAX_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Demand:
    """What the policy says in this tick: the load now, whether phases are being moved, what one more worker would serve, and what it saw."""

    load: float
    is_moving: bool
    one_more: PhaseSet
    look: Look


@dataclass(slots=True)
class Scaling:
    """Of one deployment. The workers that it has added are those of the machines that are not declared."""

    config: ScalingConfig
    #: Workers that go, and since when.
    retiring: dict[WorkerId, float] = field(default_factory=dict)
    #: Since when each of them waits for a node; of those that have one, the last look.
    _asked_at_s: dict[WorkerId, float] = field(default_factory=dict)
    _above_since_s: float | None = None
    _below_since_s: float | None = None
    _blocked_until_s: float = -math.inf
    _views: list[ScaleView] = field(default_factory=list)
    _num_decisions: int = 0
    #: As of the last look.
    _met: float | None = None
    #: Since when the last decision has its effect.
    _effect_since_s: float | None = None

    @property
    def num_decisions(self) -> int:
        """So far."""
        return self._num_decisions

    def views(self) -> tuple[ScaleView, ...]:
        """The last decisions, in order."""
        return tuple(self._views)

    def recover(self, views: Sequence[ScaleView], added: Sequence[WorkerId], now_s: float) -> None:
        """An earlier controller has decided these, and added these workers. Those that it was draining stay."""
        self._views, self._num_decisions = list(views), len(views)
        self._asked_at_s = dict.fromkeys(added, now_s)
        # Whose effect has begun nobody has seen.
        self._effect_since_s = None if self._is_growing else -math.inf
        if not (added and self._is_growing):
            self._end(
                ScaleState.UNDONE, "its controller died before it ended; the workers that there are stay"
            )

    def tick(
        self,
        now_s: float,
        demand: Demand | None,
        machines: Mapping[WorkerId, WorkerMachine],
        served: Mapping[Phase, int],
        met: float | None = None,
    ) -> tuple[WorkerId, ...]:
        """Workers to add now; those that are to go are in `retiring`.

        served: how many ready workers can be used for each phase. met: part of the requests of the last OBSERVED_S that met their targets.
        """
        self._met = met
        added = [one for one in self.config.extra if one in machines]
        placed = {
            one for one in added if machines[one].address or machines[one].state is LifecycleState.READY
        }
        self._follow(now_s, added, placed, machines)
        self._observe(now_s, [machines[one] for one in added])
        if demand is None or demand.is_moving or self.retiring:
            # Moves come first; their effect is waited for.
            self._above_since_s = self._below_since_s = None
            return ()
        num_ready = sum(one.state is LifecycleState.READY for one in machines.values())
        is_waiting = any(
            machines[one].state in (LifecycleState.PENDING, LifecycleState.STARTING) for one in added
        )
        if self._has_lasted(now_s, demand.load > self.config.above and not is_waiting):
            return self._add(now_s, demand, added, len(machines), num_ready)
        lower = demand.load * num_ready / (num_ready - 1) if num_ready > 1 else math.inf
        self._release_if_due(now_s, lower, demand, added, machines, served)
        return ()

    def gone(self, worker_id: WorkerId, reason: str, num_workers: int) -> None:
        """It has been removed; num_workers: those that are left."""
        self.retiring.pop(worker_id, None)
        self._asked_at_s.pop(worker_id, None)
        self._end(ScaleState.DONE, f"{worker_id} {reason}; workers left: {num_workers}")

    def keeps(self, worker_id: WorkerId, reason: str) -> None:
        """It was to go and stays."""
        del self.retiring[worker_id]
        self._end(ScaleState.UNDONE, reason)

    def _follow(
        self,
        now_s: float,
        added: Sequence[WorkerId],
        placed: set[WorkerId],
        machines: Mapping[WorkerId, WorkerMachine],
    ) -> None:
        """Whether those that were asked for have come. One whose process ends later waits from then on."""
        self._asked_at_s |= dict.fromkeys(placed, now_s)
        late = [
            one
            for one in added
            if one not in placed and now_s - self._asked_at_s.setdefault(one, now_s) >= self.config.give_up_s
        ]
        if late:
            self._blocked_until_s = now_s + self.config.blocked_s
            for one in late:
                self.retiring.setdefault(one, now_s)
            self._end(ScaleState.UNDONE, self._why_late([machines[one] for one in late]))
        elif added and len(placed) == len(added) and self._is_growing:
            self._end(ScaleState.DONE, "all of them have a node")

    def _observe(self, now_s: float, added: Sequence[WorkerMachine]) -> None:
        """Give the last decision, once it was carried out, the part of the requests that met their targets after it."""
        last = self._views[-1] if self._views else None
        if last is None or last.state is not ScaleState.DONE or last.met_after is not None:
            return
        if self._effect_since_s is None:
            # A node alone has no effect.
            is_effective = all(one.state is LifecycleState.READY for one in added)
            self._effect_since_s = now_s if is_effective else None
        elif OBSERVED_S <= now_s - self._effect_since_s < 2 * OBSERVED_S:
            self._views[-1] = replace(last, met_after=self._met)

    def _why_late(self, late: Sequence[WorkerMachine]) -> str:
        broken = [one for one in late if one.state in (LifecycleState.LOST, LifecycleState.FAILED)]
        if broken:
            return "; ".join(f"{one.worker_id} does not start: {one.reason}" for one in broken)
        names = ", ".join(one.worker_id for one in late)
        return f"no node took {names} in {self.config.give_up_s:g} s: is there an autoscaler, and may it add nodes?"

    @property
    def _is_growing(self) -> bool:
        last = self._views[-1] if self._views else None
        return last is not None and last.state is ScaleState.ASKED and last.num_wanted > last.num_before

    def _has_lasted(self, now_s: float, is_above: bool) -> bool:
        if not is_above or now_s < self._blocked_until_s:
            self._above_since_s = None
            return False
        if self._above_since_s is None:
            self._above_since_s = now_s
        return now_s - self._above_since_s >= self.config.hold_s

    def _add(
        self, now_s: float, demand: Demand, added: Sequence[WorkerId], num_workers: int, num_ready: int
    ) -> tuple[WorkerId, ...]:
        assert self._above_since_s is not None
        lasted_s, self._above_since_s = now_s - self._above_since_s, None
        free = [one for one in self.config.extra if one not in added]
        missing = (
            math.ceil(num_ready * demand.load / self.config.aim) - num_workers
            if math.isfinite(demand.load)
            else 1
        )
        new = tuple(free[: max(1, missing)])
        reason = f"load {demand.load:.2f} for {lasted_s:.0f} s, and no move of phases helps"
        if not new:
            self._blocked_until_s = now_s + self.config.blocked_s
            reason = f"{reason}; maxWorkers are there already"
        predicted = _gain(demand.load, demand.load * num_ready / (num_ready + len(new)))
        self._decided(now_s, num_workers, num_workers + len(new), reason, demand.look, predicted)
        if not new:
            self._end(ScaleState.UNDONE, reason)
        for one in new:
            self._asked_at_s[one] = now_s
        return new

    def _release_if_due(
        self,
        now_s: float,
        lower: float,
        demand: Demand,
        added: Sequence[WorkerId],
        machines: Mapping[WorkerId, WorkerMachine],
        served: Mapping[Phase, int],
    ) -> None:
        if not added or lower >= self.config.below:
            self._below_since_s = None
            return
        if self._below_since_s is None:
            self._below_since_s = now_s
        lasted_s = now_s - self._below_since_s
        if lasted_s < self.config.release_s:
            return
        # The last one first, unless nobody else serves what it does.
        for one in reversed(added):
            machine = machines[one]
            phases = machine.status.phases if machine.status is not None else frozenset()
            if machine.state is not LifecycleState.READY or all(served.get(phase, 0) > 1 for phase in phases):
                self._below_since_s = None
                self.retiring[one] = now_s
                reason = f"one worker fewer would have load {lower:.2f}, for {lasted_s:.0f} s: {one} goes"
                predicted = _gain(demand.load, lower)
                num = len(machines)
                self._decided(now_s, num, num - 1, reason, demand.look, predicted)
                return

    def _decided(
        self,
        now_s: float,
        before: int,
        wanted: int,
        reason: str,
        look: Look,
        predicted: float | None,
    ) -> None:
        # Of those that were still waited for some may have come.
        self._end(ScaleState.UNDONE, f"overtaken: {reason}")
        self._num_decisions += 1
        self._effect_since_s = None
        view = ScaleView(
            f"scale-{self._num_decisions}-{now_s:.3f}",
            now_s,
            before,
            wanted,
            ScaleState.ASKED,
            reason,
            reason,
            look.digest,
            predicted,
            met_before=self._met,
        )
        self._views.append(view)
        del self._views[:-MAX_REMEMBERED]

    def _end(self, state: ScaleState, reason: str) -> None:
        if self._views and self._views[-1].state is ScaleState.ASKED:
            self._views[-1] = replace(self._views[-1], state=state, reason=reason)


def _gain(before: float, after: float) -> float | None:
    """Goodput after over goodput before, of two loads: of one above 1 a part is served. None when nothing was, as a phase had no worker."""
    return max(1.0, before) / max(1.0, after) if math.isfinite(before) else None


def is_drained(machine: WorkerMachine, status: WorkerStatus | None, phases: PhaseSet) -> bool:
    """Nothing is left there that somebody needs; nothing can be where no process is ready."""
    if machine.state is not LifecycleState.READY:
        return True
    return status is not None and status.work.of(phases) == 0 and status.num_leases == 0
