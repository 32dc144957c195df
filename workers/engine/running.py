"""Who computes an engine's steps, and what a step is while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from workers.api import Phase
from workers.engine.sharing import Sharing, SharingLog
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.step_choice import Exclusive, Split
from workers.step_shape import StepShape

#: Steps of one phase or of both at the same time, and what each has of the device.
SharedStep = Split | Exclusive


class Runner(Protocol):
    """Computes steps. `ModelRunner` does it with torch; tests have one without."""

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        """Make the plan's copies, then its restores, compute its slices and drafts, and sample.

        Calls on_layers(layer_lo, layer_hi) as soon as the KV of these layers is written.
        """
        ...


class Begun(Protocol):
    """A step that runs."""

    @property
    def is_done(self) -> bool:
        """`result` will not wait."""
        ...

    def result(self) -> StepResult:
        """Wait for it. Called once; of several steps in the order in which they were begun, of each phase where they run side by side."""
        ...


class OverlappingRunner(Runner, Protocol):
    """Computes on a device, where a step waits for the one before it and not for the host."""

    def begin(self, plan: StepPlan, on_layers: Callable[[int, int], None], previous: Any) -> Begun:
        """Begin what `run` does. previous: the step before, whose tokens the plan assumes; None when it assumes none."""
        ...


class SplitRunner(Protocol):
    """Computes steps of two phases at the same time. Those of one phase follow each other, those of both on all before them."""

    def begin_beside(
        self,
        plan: StepPlan,
        on_layers: Callable[[int, int], None],
        previous: Any,
        phase: Phase,
        step: SharedStep,
    ) -> Begun:
        """See OverlappingRunner.begin. step: what the phases have of the device."""
        ...

    def layout_name(self, step: SharedStep) -> str:
        """What they get of it."""
        ...


@dataclass(frozen=True, slots=True)
class Splitting:
    """Who says when steps are split, who computes them then, and what the device did for how long."""

    sharing: Sharing
    runner: SplitRunner
    log: SharingLog


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was begun and is not completed. shape: None when the latency model learns nothing from it."""

    plan: StepPlan
    begun: Begun
    entries: tuple[int, ...]
    shape: StepShape | None


class BeginningBrokeError(Exception):
    """A step could not be begun; only its requests fail."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason
