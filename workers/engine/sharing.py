"""How the prompts and the decodes of an engine share its device, step by step. Pure."""

from typing import Protocol

from workers.api import BlockCounts, PhaseWork
from workers.step_choice import Head, Step


class Sharing(Protocol):
    """Chooses. Asked before each step that could begin."""

    def step(self, now_s: float, work: PhaseWork, blocks: BlockCounts, head: Head) -> Step:
        """What comes next. head: of the prompts, those that are being computed included; num_left is 0 without any."""
        ...


class SharingLog:
    """What a device did for how long."""

    def __init__(self) -> None:
        #: Seconds, by name.
        self.seconds: dict[str, float] = {}
        #: From one that computes to another.
        self.num_switches = 0
        self._name: str | None = None
        self._since_s = 0.0
        self._last_layout: str | None = None

    def note(self, now_s: float, name: str | None) -> None:
        """From now on it does this; None is nothing."""
        if name == self._name:
            return
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now_s - self._since_s
        self._name, self._since_s = name, now_s
        if name is not None:
            self.num_switches += self._last_layout not in (None, name)
            self._last_layout = name
