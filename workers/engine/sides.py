"""Prompts and decodes of one engine as two steps that run at the same time, each planned and completed by itself.

Of each side a second step is planned while the first one runs, as `lookahead.py` has it. What decides is the engine's; what begins
steps and waits for them is handed in.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.api import Phase
from workers.engine.engine import Engine
from workers.engine.running import BeginningBrokeError, Begun, Flight, SharedStep
from workers.engine.step_plan import StepPlan
from workers.step_choice import Split

#: Decodes first: who waits for blocks keeps prompts from taking them.
ORDER = (Phase.DECODE, Phase.PREFILL)


@dataclass(frozen=True, slots=True)
class Acts:
    """What the two sides have done, by `StepLoop`.

    plan: the next step of one side. begin: it, after the one before it, on the share that its side has; raises BeginningBrokeError. broke:
    it could not be begun. wait: for one of some steps to end. complete: it has ended.
    """

    plan: Callable[[float, Phase], StepPlan | None]
    begin: Callable[[StepPlan, Begun | None, Phase, SharedStep], Flight]
    broke: Callable[[StepPlan, Exception], None]
    wait: Callable[[Sequence[Flight]], Flight]
    complete: Callable[[Flight], None]


class Sides:
    """Steps of both phases in flight: of each one that runs, and perhaps the next."""

    def __init__(self, engine: Engine, acts: Acts, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._acts = acts
        self._clock = clock
        self._flights: dict[Phase, deque[Flight]] = {phase: deque() for phase in ORDER}

    def __bool__(self) -> bool:
        """Something runs."""
        return any(self._flights.values())

    def turn(self, now_s: float, step: SharedStep) -> bool:
        """Begin of each side what runs and what follows on it, then complete what ends first; False when there was nothing to compute."""
        engine = self._engine
        wanted = ORDER if isinstance(step, Split) else (step.phase,)
        is_waiting = Phase.DECODE in wanted and not self._flights[Phase.DECODE] and bool(self)
        if not is_waiting or not engine.is_short_of_blocks:
            for phase in (*ORDER, *ORDER):
                if phase in wanted:
                    self._begin_next(now_s, phase, step)
        return self.land()

    def land(self) -> bool:
        """Wait for a step to end, and complete it; False when none runs."""
        first = [flights[0] for flights in self._flights.values() if flights]
        if not first:
            return False
        landed = self._acts.wait(first)
        flights = next(some for some in self._flights.values() if some and some[0] is landed)
        flights.popleft()
        self._acts.complete(landed)
        if flights:
            flights[0].plan.began_s = self._clock()
        return True

    def _begin_next(self, now_s: float, phase: Phase, step: SharedStep) -> None:
        flights = self._flights[phase]
        if len(flights) > 1:
            return
        running = flights[0] if flights else None
        if running is not None and not self._engine.assume(running.plan):
            return
        broken: tuple[StepPlan, Exception] | None = None
        try:
            plan = self._acts.plan(now_s, phase)
            if plan is not None:
                before = running.begun if running is not None else None
                flights.append(self._acts.begin(plan, before, phase, step))
        except BeginningBrokeError as error:
            assert plan is not None
            broken = plan, error.reason
        finally:
            if running is not None:
                self._engine.take_back()
        if broken is not None:
            self._acts.broke(*broken)
