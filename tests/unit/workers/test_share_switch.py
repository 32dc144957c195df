"""A phase that gets another share of the SMs by another process, whoever dies when."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from workers.device.share_switch import ActionKind, EventKind, ShareAction, ShareSwitch, SwitchState


class World:
    """Processes that do as they are told, one event at a time. `blocks`: of the work, by who owns them."""

    def __init__(self) -> None:
        self.switch = ShareSwitch()
        self.alive: dict[int, float] = {}
        self.computing: set[int] = set()
        self.events: deque[tuple[EventKind, int]] = deque()
        self.log: list[ShareAction] = []
        #: Owners whose blocks are held; those of the work that a process computes with.
        self.held: set[int] = set()
        self.uses: dict[int, set[int]] = {}

    def ask(self, percentage: float) -> None:
        self.apply(self.switch.ask(percentage, "asked"))

    def kill(self, number: int) -> None:
        if self.alive.pop(number, None) is not None:
            self.computing.discard(number)
            self.events.append((EventKind.DIED, number))

    def step(self) -> None:
        """The oldest event."""
        if self.events:
            self.apply(self.switch.handle(*self.events.popleft()))

    def apply(self, actions: list[ShareAction]) -> None:
        self.switch.check_invariants()
        for action in actions:
            self.log.append(action)
            self._do(action)
        # Who computes has the blocks that it computes with.
        for number in self.computing:
            assert self.uses[number] <= self.held, (number, self.uses, self.held)
        assert len(self.computing) <= 1

    def _do(self, action: ShareAction) -> None:
        number, is_alive = action.number, action.number in self.alive
        match action.kind:
            case ActionKind.START:
                assert number not in self.uses, "a number came again"
                self.alive[number], self.uses[number] = action.percentage, set()
                self.events.append((EventKind.READY, number))
            case ActionKind.HAND_OVER if is_alive:
                self.computing.discard(number)
                self.events.append((EventKind.HANDED_OVER, number))
            case ActionKind.ADOPT if is_alive:
                self.computing.add(number)
                self.held.add(number)
                self.uses[number] |= {number} | (self.uses[action.heir_of] if action.heir_of else set())
                self.events.append((EventKind.STEPPED, number))
            case ActionKind.TAKE:
                # What the heir computes with is its own from now on.
                old = self.uses.get(action.heir_of, set())
                self.held -= old
                self.uses[number] = (self.uses[number] - old) | {number}
            case ActionKind.END:
                self.alive.pop(number, None)
                self.computing.discard(number)
            case ActionKind.REAP:
                assert number not in self.alive, "a living process was reaped"
                self.held.discard(number)

    def settle(self) -> None:
        for _ in range(200):
            if not self.events:
                return
            self.step()
        raise AssertionError("it does not come to rest")


def kinds(world: World) -> list[tuple[ActionKind, int]]:
    return [(action.kind, action.number) for action in world.log]


def serving(percentage: float = 40) -> World:
    world = World()
    world.ask(percentage)
    world.settle()
    assert world.switch.state is SwitchState.SERVING
    world.log.clear()
    return world


def test_the_old_process_serves_until_the_new_one_is_ready_and_is_kept_until_it_has_stepped() -> None:
    world = serving()
    world.ask(60)
    assert world.computing == {1}
    world.step()
    assert world.switch.state is SwitchState.ENDING
    world.step()
    assert world.computing == {2}
    assert set(world.alive) == {1, 2}
    world.settle()
    assert kinds(world) == [
        (ActionKind.START, 2),
        (ActionKind.HAND_OVER, 1),
        (ActionKind.ADOPT, 2),
        (ActionKind.TAKE, 2),
        (ActionKind.END, 1),
    ]
    assert world.log[2].heir_of == 1
    assert world.alive == {2: 60}


def test_a_share_that_it_has_already_starts_nothing() -> None:
    world = serving()
    world.ask(40)
    assert world.log == []


def test_another_share_while_one_starts_replaces_that_one() -> None:
    world = serving()
    world.ask(60)
    world.ask(80)
    world.settle()
    assert world.alive == {3: 80}
    assert (ActionKind.END, 2) in kinds(world)


def test_another_share_while_it_changes_comes_next() -> None:
    world = serving()
    world.ask(60)
    world.step()
    world.ask(80)
    world.settle()
    assert world.alive == {3: 80}
    assert (ActionKind.TAKE, 2) in kinds(world)


def test_a_new_process_that_dies_before_its_first_step_leaves_the_old_one_with_its_work() -> None:
    world = serving()
    world.ask(60)
    world.step()
    world.step()
    world.events.clear()
    world.kill(2)
    world.step()
    assert world.computing == {1}
    assert (ActionKind.ADOPT, 1) in kinds(world)
    assert 1 in world.held
    world.settle()
    assert world.alive == {3: 60}


def test_an_old_process_that_dies_after_it_handed_over_loses_nothing() -> None:
    world = serving()
    world.ask(60)
    world.step()
    world.step()
    world.events.clear()
    world.kill(1)
    world.step()
    assert kinds(world)[-1] == (ActionKind.TAKE, 2)
    assert (ActionKind.REAP, 1) not in kinds(world)


def test_a_hand_over_whose_receiver_died_is_taken_back() -> None:
    world = serving()
    world.ask(60)
    world.step()
    assert world.events.popleft() == (EventKind.HANDED_OVER, 1)
    world.kill(2)
    world.step()
    world.apply(world.switch.handle(EventKind.HANDED_OVER, 1))
    assert world.computing == {1}


def test_a_process_that_dies_while_it_serves_is_reaped_and_replaced() -> None:
    world = serving()
    world.kill(1)
    world.settle()
    assert kinds(world) == [(ActionKind.REAP, 1), (ActionKind.START, 2), (ActionKind.ADOPT, 2)]
    assert world.log[-1].heir_of == 0
    assert world.alive == {2: 40}


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from([20.0, 40.0, 60.0, 80.0])),
        st.tuples(st.just("step"), st.none()),
        st.tuples(st.just("kill"), st.integers(0, 1)),
    ),
    max_size=40,
)


@given(ACTS)
def test_whatever_happens_one_computes_at_most_and_once_it_stops_the_share_is_the_last_one(
    acts: list[tuple[str, float | int | None]],
) -> None:
    world = World()
    for name, value in acts:
        if name == "ask":
            world.ask(float(value or 0))
        elif name == "step":
            world.step()
        elif world.alive:
            numbers = sorted(world.alive)
            world.kill(numbers[min(int(value or 0), len(numbers) - 1)])
    world.ask(50.0)
    world.settle()
    assert world.switch.state is SwitchState.SERVING
    assert list(world.alive.values()) == [50.0]
    [number] = world.alive
    assert world.computing == {number}
    assert world.held == {number}
    world.switch.check_invariants()
