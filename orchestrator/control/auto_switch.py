"""Switches that the controller wants itself: what workers and gateway tell becomes a policy's load, its moves become requests. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from orchestrator.control.look import Look
from orchestrator.control.policies.phase_sets import PhaseSets, PhaseSetsConfig
from orchestrator.control.policies.policy import (
    ANY_PHASES,
    ClusterLoad,
    Totals,
    WorkerLoad,
)
from orchestrator.control.prefill_speed import learnt_cost
from orchestrator.control.role_switch import SwitchRequest, switch_cost
from orchestrator.control.scaling import Demand
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState
from workers.api import Phase, PhaseSet, WorkerId

#: A look that led to nothing is told so often, in seconds.
LOOK_EVERY_S = 1.0
#: Batches of pictures after which a worker is believed how long they take.
ENOUGH_BATCHES = 10
ENCODE, PREFILL, DECODE = (frozenset({phase}) for phase in Phase)
ALLOWED: tuple[PhaseSet, ...] = (PREFILL | DECODE, PREFILL, DECODE, ENCODE)


class SwitchMode(StrEnum):
    """What becomes of the moves that the policy wants."""

    OFF = "off"
    #: They are told, with their reasons, and not made.
    DRY_RUN = "dry_run"
    ON = "on"


class AutoSwitch:
    """The policy of one cluster. block_sizes: tokens of a KV block of each worker. declared: phases of each that is declared.

    Workers that encode are left as they are while pictures come and no worker has learnt what they cost.
    """

    def __init__(
        self,
        slo: Slo,
        block_sizes: Mapping[WorkerId, int],
        declared: Iterable[PhaseSet] = (),
        scaling: ScalingConfig | None = None,
    ) -> None:
        #: What the last tick saw, if it is to be told.
        self.last: Look | None = None
        #: What the last tick saw; None when it knew too little.
        self._seen: Look | None = None
        self._scaling = scaling
        self._told_at_s = -math.inf
        self._slo = slo
        self._block_sizes = block_sizes
        self._allowed = allowed_sets(declared)
        self._sets: PhaseSets | None = None
        #: The last one that was learnt: a new process has to learn anew.
        self._tile_s: float | None = None

    def tick(self, now_s: float, view: ClusterView, totals: Totals | None) -> Sequence[SwitchRequest]:
        """The switches to make now; none while no worker has learnt how long its steps take."""
        self.last = self._seen = None
        cost = learnt_cost(view)
        if cost is None or totals is None:
            return ()
        self._tile_s = tile_seconds(view) or self._tile_s
        tile_s = self._tile_s if totals.tiles else 0.0
        load = cluster_load(view, totals, self._block_sizes, with_encode=tile_s is not None)
        look = Look(
            now_s,
            load,
            cost,
            self._slo,
            tile_s or 0.0,
            switch_cost(view.switches),
            self._allowed,
            self._scaling,
            self._waiting(view),
        )
        self._seen = look
        if self._sets is None:
            self._sets = phase_sets(look, self._allowed)
        self._sets.learn(look.cost, look.tile_s, look.switch_cost)
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

    def demand(self, view: ClusterView, *, has_moved: bool) -> Demand | None:
        """What the last tick saw, for the number of workers; None when it knew too little. has_moved: it began a switch."""
        one_more = self._sets.one_more() if self._sets is not None else None
        if self._seen is None or self._sets is None or self._sets.load is None or one_more is None:
            return None
        is_moving = has_moved or any(one.is_under_way for one in view.switches)
        return Demand(self._sets.load, is_moving, one_more, self._seen)

    def tell(self) -> None:
        """What the last tick saw is to be told: somebody has decided from it."""
        self.last = self._seen

    def _waiting(self, view: ClusterView) -> tuple[WorkerId, ...]:
        if self._scaling is None:
            return ()
        extra = frozenset(self._scaling.extra)
        return tuple(
            one.worker_id
            for one in view.workers
            if one.worker_id in extra and one.state is not LifecycleState.READY
        )

    def not_made(self, now_s: float) -> None:
        """What the last tick wanted was not done."""
        if self._sets is not None:
            self._sets.not_made(now_s)


def allowed_sets(declared: Iterable[PhaseSet]) -> tuple[PhaseSet, ...]:
    """What a worker may come to serve: encode beside other phases only where somebody has declared so.

    Batches of pictures hold up the steps of their process, and it needs memory for all of it: neither is in the load.
    """
    mixed = {phases for phases in declared if Phase.ENCODE in phases} - {ENCODE}
    return (*ALLOWED, *sorted(mixed, key=sorted))


def phase_sets(look: Look, allowed: tuple[PhaseSet, ...]) -> PhaseSets:
    """The policy, at its beginning, which comes after that of the cluster: steps have been learnt from, perhaps under another controller."""
    floors = dict.fromkeys(Phase, 1)
    config = PhaseSetsConfig(look.slo, look.cost, look.tile_s, allowed, floors, look.switch_cost)
    return PhaseSets(config, look.at_s if look.load.totals.num_requests else None)


def tile_seconds(view: ClusterView) -> float | None:
    """To encode a tile, as they come: of the worker that has seen most batches; None while none has seen enough."""
    found = [
        (one.status.encode_costs, one.status.embeddings)
        for one in view.workers
        if one.status is not None and one.status.encode_costs is not None
    ]
    costs, counts = max(found, key=lambda one: one[0].num_batches, default=(None, None))
    if costs is None or counts is None or costs.num_batches < ENOUGH_BATCHES or not counts.num_tiles_encoded:
        return None
    return (
        costs.batch_s * counts.num_batches + costs.patch_s * counts.num_patches
    ) / counts.num_tiles_encoded


def cluster_load(
    view: ClusterView, totals: Totals, block_sizes: Mapping[WorkerId, int], *, with_encode: bool = True
) -> ClusterLoad:
    """Of the workers that are ready, as they last said. with_encode: also those that encode."""
    switching = {one.worker_id for one in view.switches if one.is_under_way}
    workers = []
    for worker in view.workers:
        status = worker.status
        if worker.state is not LifecycleState.READY or status is None:
            continue
        phases = worker.phases | worker.leaving
        if worker.leaving and worker.worker_id not in switching:
            # It goes.
            continue
        if not phases or (Phase.ENCODE in phases and not with_encode):
            continue
        work, size = status.work, block_sizes[worker.worker_id]
        blocks = status.blocks
        workers.append(
            WorkerLoad(
                worker.worker_id,
                phases,
                kv_capacity=blocks.total * size,
                is_switching=worker.worker_id in switching,
                prefill_tokens=work.prefill_tokens,
                num_prefills=work.num_prefills,
                num_decoding=work.num_decoding,
                decode_context=work.decode_context,
                num_promised=max(0, work.num_decodes - work.num_decoding),
                kv_tokens=(blocks.in_use + blocks.leased) * size,
                num_decode_steps=status.num_steps,
                encode_tiles=work.encode_tiles,
                loaded=status.loaded or ANY_PHASES,
            )
        )
    _promise(workers)
    return ClusterLoad(tuple(workers), replace(totals))


def _promise(workers: Sequence[WorkerLoad]) -> None:
    """What workers hold that do not decode is KV of sequences that others will, as soon as they have room for it.

    That they are promised says not how long they are: a few decode, and many times their KV may wait for room.
    """
    num_promised = sum(one.num_promised for one in workers)
    held = sum(one.kv_tokens for one in workers if Phase.DECODE not in one.phases)
    for one in workers:
        if one.num_promised:
            one.promised_context = held * one.num_promised // num_promised
