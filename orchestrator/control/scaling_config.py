"""When workers are added, and when they go. Pure."""

from dataclasses import dataclass

from workers.api import WorkerId


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """extra: workers that may be added, in this order.

    above: load from which more are asked for once it has lasted hold_s without a move of phases, so many that it would be `aim`. below: load
    that one fewer would have, so that one is given back once that has lasted release_s. A worker that no node took for give_up_s is
    not waited for any longer, and no other one asked for in the next blocked_s. drain_s: in which a worker that goes is to be empty.
    """

    extra: tuple[WorkerId, ...]
    above: float = 1.0
    aim: float = 0.7
    below: float = 0.6
    hold_s: float = 30.0
    release_s: float = 120.0
    give_up_s: float = 300.0
    blocked_s: float = 600.0
    drain_s: float = 60.0
