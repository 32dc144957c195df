"""Switches that the controller wants itself: what workers and gateway tell becomes a policy's load, its moves become requests. Pure."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from orchestrator.control.policies.phase_sets import PhaseSets, PhaseSetsConfig
from orchestrator.control.policies.policy import ClusterLoad, Totals, WorkerLoad
from orchestrator.control.prefill_speed import most_learnt
from orchestrator.control.role_switch import SwitchRequest, phase_text
from orchestrator.control.slo import Slo
from orchestrator.control.step_cost import StepCost
from orchestrator.control.view import ClusterView, LifecycleState
from workers.api import Phase, PhaseSet, WorkerId

#: A look that led to nothing is told so often, in seconds.
LOOK_EVERY_S = 1.0
PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
ALLOWED: tuple[PhaseSet, ...] = (PREFILL | DECODE, PREFILL, DECODE)


class SwitchMode(StrEnum):
    """What becomes of the moves that the policy wants."""

    OFF = "off"
    #: They are told, with their reasons, and not made.
    DRY_RUN = "dry_run"
    ON = "on"


@dataclass(frozen=True, slots=True)
class Look:
    """What the policy saw at one moment, so that another one can be asked. at_s: of the controller's clock."""

    at_s: float
    load: ClusterLoad
    cost: StepCost
    slo: Slo

    @property
    def digest(self) -> str:
        """Names it among all looks."""
        parts = [_as_text(one) for one in self.load.workers]
        text = "|".join((*parts, repr(self.load.totals), repr(self.cost)))
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


_LOAD_FIELDS = tuple(one.name for one in fields(WorkerLoad))


def _as_text(load: WorkerLoad) -> str:
    """All that it says."""
    told = {name: getattr(load, name) for name in _LOAD_FIELDS}
    # A set has no order of its own.
    told["phases"] = frozenset()
    return f"{phase_text(load.phases)}{told!r}"


class AutoSwitch:
    """The policy of one cluster. block_sizes: tokens of a KV block of each declared worker.

    Workers that encode are left as they are: what a picture costs is not known here.
    """

    def __init__(self, slo: Slo, block_sizes: Mapping[WorkerId, int]) -> None:
        #: What the last tick saw, if it is to be told.
        self.last: Look | None = None
        self._told_at_s = -math.inf
        self._slo = slo
        self._block_sizes = block_sizes
        self._sets: PhaseSets | None = None

    def tick(self, now_s: float, view: ClusterView, totals: Totals | None) -> Sequence[SwitchRequest]:
        """The switches to make now; none while no worker has learnt how long its steps take."""
        self.last = None
        learnt = most_learnt(view)
        if learnt is None or totals is None:
            return ()
        cost = StepCost.learnt(learnt)
        load = cluster_load(view, totals, self._block_sizes)
        look = Look(now_s, load, cost, self._slo)
        if self._sets is None:
            self._sets = phase_sets(cost, self._slo)
        self._sets.learn(cost)
        wanted = self._sets.tick(now_s, load)
        is_told = bool(wanted) or now_s - self._told_at_s >= LOOK_EVERY_S
        self.last = look if is_told else None
        if is_told:
            self._told_at_s = now_s
        digest = look.digest if wanted else ""
        return tuple(
            SwitchRequest(
                f"{digest}-{switch.worker_id}",
                switch.worker_id,
                switch.phases,
                switch.reason,
                switch.predicted,
                digest,
            )
            for switch in wanted
        )

    def not_made(self, now_s: float) -> None:
        """What the last tick wanted was not done."""
        if self._sets is not None:
            self._sets.not_made(now_s)


def phase_sets(cost: StepCost, slo: Slo) -> PhaseSets:
    """The policy, at its beginning."""
    floors = dict.fromkeys((Phase.PREFILL, Phase.DECODE), 1)
    return PhaseSets(PhaseSetsConfig(slo, cost, 0.0, ALLOWED, floors))


def cluster_load(view: ClusterView, totals: Totals, block_sizes: Mapping[WorkerId, int]) -> ClusterLoad:
    """Of the workers that are ready and do not encode, as they last said."""
    switching = {one.worker_id for one in view.switches if one.is_under_way}
    workers = []
    for worker in view.workers:
        status = worker.status
        if worker.state is not LifecycleState.READY or status is None:
            continue
        phases = worker.phases | worker.leaving
        if Phase.ENCODE in phases or not phases:
            continue
        work, size = status.work, block_sizes[worker.worker_id]
        blocks = status.blocks
        workers.append(
            WorkerLoad(
                worker.worker_id,
                phases,
                kv_capacity=max(1, blocks.total * size),
                is_switching=worker.worker_id in switching,
                prefill_tokens=work.prefill_tokens,
                num_prefills=work.num_prefills,
                num_decoding=work.num_decoding,
                decode_context=work.decode_context,
                num_promised=max(0, work.num_decodes - work.num_decoding),
                kv_tokens=(blocks.in_use + blocks.leased) * size,
                num_decode_steps=status.num_steps,
            )
        )
    return ClusterLoad(tuple(workers), replace(totals))
