"""Simulated time: what is fast does the same as what is plain."""

from collections.abc import Callable
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sim.timers import SimTimers

#: Few different ones, so that many things are due at once.
TIMES = st.integers(0, 6).map(float)


class World:
    """Things that happen once, and others that happen again and again, each of which asks for one that happens once every time."""

    def __init__(self, *, is_repeating: bool) -> None:
        self.timers = SimTimers()
        self.seen: list[tuple[float, str]] = []
        self._is_repeating = is_repeating

    def note(self, name: str) -> None:
        self.seen.append((self.timers.time(), name))

    def begin(self, name: str, at_s: float, gaps_s: list[float], later_s: float) -> None:
        gaps = iter(gaps_s)

        def again(now_s: float) -> float:
            assert now_s == self.timers.time()
            self.note(name)
            self.timers.call_at(now_s + later_s, self.note, f"of {name}")
            return now_s + next(gaps, inf)

        def once(call: Callable[[float], float]) -> None:
            if (again_s := call(self.timers.time())) < inf:
                self.timers.call_at(again_s, once, call)

        if self._is_repeating:
            self.timers.repeat_at(at_s, again)
        else:
            self.timers.call_at(at_s, once, again)


@given(
    st.lists(st.tuples(TIMES, st.lists(TIMES, max_size=6), TIMES), max_size=4),
    st.lists(st.tuples(TIMES, st.booleans()), max_size=6),
    TIMES,
)
def test_what_is_repeated_happens_as_if_it_asked_for_each_time(
    repeated: list[tuple[float, list[float], float]], once: list[tuple[float, bool]], until_s: float
) -> None:
    worlds = [World(is_repeating=True), World(is_repeating=False)]
    for world in worlds:
        for i, (at_s, gaps_s, later_s) in enumerate(repeated):
            world.begin(f"r{i}", at_s, gaps_s, later_s)
        for i, (at_s, is_cancelled) in enumerate(once):
            timer = world.timers.call_at(at_s, world.note, f"o{i}")
            if is_cancelled:
                timer.cancel()
        while world.timers.run_next(until_s):
            pass
        assert world.timers.time() <= until_s
    fast, plain = worlds
    assert fast.seen == plain.seen
    assert fast.timers.num_events == plain.timers.num_events
