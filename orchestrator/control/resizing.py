"""Drives the number of workers in a controller's tick: what `scaling` decides becomes machines, and what the autoscaler is told. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.control.declared import WorkerResources
from orchestrator.control.observation import Observation
from orchestrator.control.plan import RequestResources
from orchestrator.control.role_switch import phase_text
from orchestrator.control.scaling import Demand, Scaling, is_drained
from orchestrator.control.switching import Switching
from orchestrator.control.view import LifecycleState
from orchestrator.control.worker_machine import WorkerMachine
from workers.api import WorkerId

#: Of one worker that was added, under one controller.
INCARNATIONS_PER_EPOCH = 1000
#: The autoscaler is told again after this, in seconds.
TELL_AUTOSCALER_S = 30.0


@dataclass(slots=True)
class Resizing:
    """The workers that are added and go. resources: of every worker that there may be. epoch: of this controller."""

    scaling: Scaling
    resources: Mapping[WorkerId, WorkerResources]
    epoch: int
    #: Highest incarnation of workers that were added and are gone.
    _used_incarnations: dict[WorkerId, int] = field(default_factory=dict)
    #: Version of the first view that tells of a worker that it goes.
    _going_since: dict[WorkerId, int] = field(default_factory=dict)
    #: What the autoscaler was last told, and when; None before that.
    _told: tuple[WorkerId, ...] | None = None
    _told_at_s: float = -math.inf

    def tick(
        self,
        now_s: float,
        demand: Demand | None,
        version: int,
        machines: dict[WorkerId, WorkerMachine],
        switching: Switching,
    ) -> bool:
        """Decide how many workers there are to be, and add machines for new ones; whether anything is to change.

        version: of the view that tells of it.
        """
        before = self.scaling.views()
        served = switching.served(machines.values())
        new = self.scaling.tick(now_s, demand, machines, served, switching.met())
        for worker_id in new:
            assert demand is not None
            machines[worker_id] = machine = WorkerMachine(worker_id)
            # No incarnation of an earlier life of it is used again, nor one that an earlier controller gave it.
            earlier = (self.epoch - 1) * INCARNATIONS_PER_EPOCH
            machine.saw_incarnation(max(earlier, self._used_incarnations.get(worker_id, 0)))
            switching.add(worker_id, demand.one_more)
        switching.retiring = frozenset(self.scaling.retiring)
        self._going_since = {one: self._going_since.get(one, version) for one in self.scaling.retiring}
        return self.scaling.views() != before

    def retire_drained(
        self,
        now_s: float,
        observation: Observation,
        machines: dict[WorkerId, WorkerMachine],
        switching: Switching,
    ) -> None:
        """Let go of workers that were to go and hold nothing any more; one that nobody can stand in for stays.

        One that is ready stays too while the gateway does not know that it goes: requests may come to it.
        """
        scaling = self.scaling
        for worker_id, since_s in list(scaling.retiring.items()):
            machine, phases = machines[worker_id], switching.wanted[worker_id]
            served = switching.served(machines.values())
            alone = [phase for phase in phases if not served[phase]]
            is_ready = machine.state is LifecycleState.READY
            is_late = now_s - since_s > scaling.config.drain_s
            status = observation.statuses.get((worker_id, machine.incarnation))
            if is_ready and alone:
                scaling.keeps(
                    worker_id, f"no other worker that is ready serves {phase_text(frozenset(alone))}"
                )
            elif is_ready and observation.gateway.version < self._going_since[worker_id]:
                scaling.retiring[worker_id] = now_s
            elif is_late or is_drained(machine, status, phases):
                self._used_incarnations[worker_id] = machine.incarnation
                del machines[worker_id]
                switching.forget(worker_id, now_s)
                why = "was not empty in time, and is ended" if is_late else "is drained"
                scaling.gone(worker_id, why, len(machines))
        switching.retiring = frozenset(scaling.retiring)

    def tell_autoscaler(
        self, now_s: float, machines: Mapping[WorkerId, WorkerMachine]
    ) -> tuple[RequestResources, ...]:
        """Of all workers while one of them waits for a place, and now and then, as it may have been lost; else of none.

        Ray's autoscaler has what it is asked for fit on any nodes: it would keep one that is empty for a worker that has its
        place on another. Nodes with workers on them stay as they are.
        """
        present = [machine for one, machine in machines.items() if one not in self.scaling.retiring]
        is_waiting = any(one.waits_for_place for one in present)
        workers = tuple(one.worker_id for one in present) if is_waiting else ()
        is_due = is_waiting and now_s - self._told_at_s >= TELL_AUTOSCALER_S
        if workers == self._told and not is_due:
            return ()
        self._told, self._told_at_s = workers, now_s
        reason = f"{len(workers)} workers" if workers else "all workers have their place"
        return (RequestResources(tuple(self.resources[one] for one in workers), reason),)
