"""How a phase gets another share of the SMs where a share is fixed for the life of a process: by another process. Pure.

The old one serves on while the new one starts, maps the memory and gets ready (delayed switch); then it ends its step, hands over
what it has, and the new one goes on (asynchronous switch: each phase at its own boundary, without waiting for the other).
One machine for each phase of a GPU. Source: semi-PD, section on the resident process; states and failures are ours.

    state         `serving`            `next`
    SERVING       computes             -
    PREPARING     computes             starts
    ENDING        was told to end      is ready
    ADOPTING      has handed over      was told to go on, until it has computed a step
    DOWN          -                    -

A process that dies is replaced by one with the share that was asked for last. Until the next one has computed a step the old one is
kept, with its blocks, and goes on itself when the next one dies. The blocks of a dead process are freed, but for those that its heir
already computes with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class SwitchState(StrEnum):
    """Of the phase."""

    SERVING = "serving"
    PREPARING = "preparing"
    ENDING = "ending"
    ADOPTING = "adopting"
    DOWN = "down"


class EventKind(StrEnum):
    """What happens to a process."""

    READY = "ready"
    HANDED_OVER = "handed_over"
    STEPPED = "stepped"
    DIED = "died"


class ActionKind(StrEnum):
    """What is to be done with a process. START: of this number, with this share. ADOPT: go on with what `heir_of` handed over,
    with nothing where it is 0. TAKE: the blocks of `heir_of` are its own. END: it is not needed any more. REAP: free its blocks; it is dead.
    """

    START = "start"
    HAND_OVER = "hand_over"
    ADOPT = "adopt"
    TAKE = "take"
    END = "end"
    REAP = "reap"


@dataclass(frozen=True, slots=True)
class ShareAction:
    """number: of the process, from 1 on, never used again; it owns KV blocks by it."""

    kind: ActionKind
    number: int
    reason: str
    percentage: float = 0.0
    heir_of: int = 0


@dataclass(frozen=True, slots=True)
class Process:
    """One process and its share of the SMs, in percent."""

    number: int
    percentage: float


class ShareSwitch:
    """The processes of one phase. Nothing serves before the first `ask`. At most two are known, and at most one computes.

    Between a death and the next process `serving` is None; the phase is DOWN only before the first `ask`.
    """

    def __init__(self) -> None:
        self.state = SwitchState.DOWN
        self.serving: Process | None = None
        self.next: Process | None = None
        #: What was asked for last, in percent; 0 before that.
        self.wanted = 0.0
        self._last_number = 0

    def ask(self, percentage: float, reason: str) -> list[ShareAction]:
        """Go to this share. While one process starts it is replaced; later this one comes first, and then the next."""
        self.wanted = percentage
        if self.state is SwitchState.PREPARING and self._is_unwanted(self.next):
            assert self.next is not None
            ended, self.next = self.next, None
            return [ShareAction(ActionKind.END, ended.number, reason), *self._prepare(reason)]
        if self.state is SwitchState.DOWN or self._is_idle_and_unwanted():
            return self._prepare(reason)
        return []

    def handle(self, kind: EventKind, number: int) -> list[ShareAction]:
        """What process `number` did. Of one that is not known any more nothing follows, but that the dead are reaped."""
        role = "next" if self.next is not None and number == self.next.number else ""
        role = "serving" if self.serving is not None and number == self.serving.number else role
        move = _MOVES.get((self.state, kind, role))
        if move is not None:
            return move(self)
        return [_reap(number)] if kind is EventKind.DIED else []

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        needs_serving, has_next = _HAS[self.state]
        assert self.serving is not None or not needs_serving, self.state
        assert (self.next is not None) is has_next, self.state
        if self.serving is not None and self.next is not None:
            assert self.serving.number < self.next.number
        if self.state is SwitchState.SERVING:
            assert not self._is_unwanted(self.serving), "it rests at another share than was asked for"

    # Moves.

    def _ready(self) -> list[ShareAction]:
        assert self.next is not None
        if self.serving is None:
            self.state = SwitchState.ADOPTING
            return [ShareAction(ActionKind.ADOPT, self.next.number, "nothing is left to take over")]
        self.state = SwitchState.ENDING
        return [
            ShareAction(ActionKind.HAND_OVER, self.serving.number, f"process {self.next.number} is ready")
        ]

    def _handed_over(self) -> list[ShareAction]:
        assert self.serving is not None
        assert self.next is not None
        self.state = SwitchState.ADOPTING
        old = self.serving.number
        return [
            ShareAction(
                ActionKind.ADOPT, self.next.number, f"process {old} has ended its last step", heir_of=old
            )
        ]

    def _handed_over_to_nobody(self) -> list[ShareAction]:
        return self._resume("the one that it was meant for died")

    def _stepped(self) -> list[ShareAction]:
        old, self.serving, self.next, self.state = self.serving, self.next, None, SwitchState.SERVING
        assert self.serving is not None
        actions = []
        if old is not None:
            reason = f"process {self.serving.number} has computed a step"
            actions = [
                ShareAction(ActionKind.TAKE, self.serving.number, reason, heir_of=old.number),
                ShareAction(ActionKind.END, old.number, reason),
            ]
        if self._is_idle_and_unwanted():
            actions += self._prepare("another share was asked for meanwhile")
        return actions

    def _serving_died(self) -> list[ShareAction]:
        assert self.serving is not None
        dead, self.serving = self.serving.number, None
        if self.state is SwitchState.ENDING:
            # The next one is ready, and gets nothing.
            return [_reap(dead), *self._ready()]
        if self.state is SwitchState.SERVING:
            return [_reap(dead), *self._prepare("the process that served died")]
        return [_reap(dead)]

    def _handed_over_and_died(self) -> list[ShareAction]:
        assert self.serving is not None
        assert self.next is not None
        dead, self.serving = self.serving.number, None
        return [
            ShareAction(
                ActionKind.TAKE,
                self.next.number,
                f"process {dead} died after it had handed over",
                heir_of=dead,
            )
        ]

    def _next_died(self) -> list[ShareAction]:
        assert self.next is not None
        dead, was_adopting, self.next = self.next.number, self.state is SwitchState.ADOPTING, None
        reason = "the process that was to take over died"
        resume = self._resume(reason) if was_adopting and self.serving is not None else []
        return [_reap(dead), *resume, *self._prepare(reason)]

    def _resume(self, reason: str) -> list[ShareAction]:
        assert self.serving is not None
        number = self.serving.number
        return [ShareAction(ActionKind.ADOPT, number, reason, heir_of=number)]

    def _prepare(self, reason: str) -> list[ShareAction]:
        self._last_number += 1
        self.next = Process(self._last_number, self.wanted)
        self.state = SwitchState.PREPARING
        return [ShareAction(ActionKind.START, self._last_number, reason, percentage=self.wanted)]

    def _is_unwanted(self, process: Process | None) -> bool:
        return process is not None and process.percentage != self.wanted

    def _is_idle_and_unwanted(self) -> bool:
        return self.state is SwitchState.SERVING and self._is_unwanted(self.serving)


def _reap(number: int) -> ShareAction:
    return ShareAction(ActionKind.REAP, number, f"process {number} died")


_Move = Callable[[ShareSwitch], list[ShareAction]]
_S, _E = SwitchState, EventKind
_MOVES: dict[tuple[SwitchState, EventKind, str], _Move] = {
    (_S.SERVING, _E.DIED, "serving"): ShareSwitch._serving_died,
    (_S.PREPARING, _E.READY, "next"): ShareSwitch._ready,
    (_S.PREPARING, _E.HANDED_OVER, "serving"): ShareSwitch._handed_over_to_nobody,
    (_S.PREPARING, _E.DIED, "serving"): ShareSwitch._serving_died,
    (_S.PREPARING, _E.DIED, "next"): ShareSwitch._next_died,
    (_S.ENDING, _E.HANDED_OVER, "serving"): ShareSwitch._handed_over,
    (_S.ENDING, _E.DIED, "serving"): ShareSwitch._serving_died,
    (_S.ENDING, _E.DIED, "next"): ShareSwitch._next_died,
    (_S.ADOPTING, _E.STEPPED, "next"): ShareSwitch._stepped,
    (_S.ADOPTING, _E.DIED, "serving"): ShareSwitch._handed_over_and_died,
    (_S.ADOPTING, _E.DIED, "next"): ShareSwitch._next_died,
}
#: (needs `serving`, has `next`); where it needs none it may have one.
_HAS = {
    _S.SERVING: (True, False),
    _S.PREPARING: (False, True),
    _S.ENDING: (True, True),
    _S.ADOPTING: (False, True),
    _S.DOWN: (False, False),
}
