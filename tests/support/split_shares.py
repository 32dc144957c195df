"""Layouts of a device without SMs, and what chooses among them."""

from typing import Any

from workers.api import Phase
from workers.device.sm_layouts import SmGroups, layout_table, shared_layout
from workers.device.sm_share import LiveLayout, SmShares
from workers.engine.sharing import Load
from workers.step_choice import Exclusive, Mixed, Split, Step

PHASES = (Phase.PREFILL, Phase.DECODE)


class FakeStream:
    """On a CPU a step has run when it was begun."""

    def __init__(self) -> None:
        self.num_waits = 0

    def wait_stream(self, _other: "FakeStream") -> None:
        self.num_waits += 1

    def synchronize(self) -> None:
        pass


def fake_shares() -> SmShares:
    """The shared layout and three disjoint ones, of 32 SMs."""
    table = (shared_layout(32, PHASES), *layout_table(SmGroups(8, 4, 0), PHASES, least_sms=8, step_groups=1))

    def streams() -> dict[Phase, Any]:
        return {phase: FakeStream() for phase in PHASES}

    return SmShares([LiveLayout(layout, streams()) for layout in table])


class Repeated:
    """Implements Sharing: these steps again and again, each for so many turns; a phase without work is never alone."""

    def __init__(self, *steps: Step, turns: int = 1) -> None:
        self._steps = steps
        self._turns = turns
        self._num_asked = 0

    def step(self, _now_s: float, load: Load) -> Step:
        step = self._steps[self._num_asked // self._turns % len(self._steps)]
        self._num_asked += 1
        if isinstance(step, Exclusive):
            has_work = load.head.num_left if step.phase is Phase.PREFILL else load.work.num_decoding
            return step if has_work else Mixed(2048)
        return step


HALVES = Split(0.5, 0.5, 2048)
SHARED = Split(1.0, 1.0, 2048)
EVERY_KIND: tuple[Step, ...] = (
    HALVES,
    Split(0.25, 0.75, 2048),
    Mixed(2048),
    Split(0.75, 0.5, 2048),
    SHARED,
    Exclusive(Phase.DECODE, 0),
    Split(0.75, 0.25, 2048),
    Exclusive(Phase.PREFILL, 2048),
)
