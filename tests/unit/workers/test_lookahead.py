"""Steps that are planned while others run: the same tokens as without, whoever comes, ends, leaves or is preempted meanwhile."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.device_engine import gather
from tests.support.engine_embeddings import EngineWithEmbeddings
from tests.support.engine_fakes import (
    BOTH,
    CONFIG,
    STEP_DEVICE,
    STEP_MODEL,
    STOP_TOKEN,
    key,
    make_engine,
    submit,
)
from workers.api import Abort, BlockCounts, EngineConfig, ImageTile, RequestFailed, Submit
from workers.engine.engine import Engine
from workers.engine.lookahead import ASSUMED_TOKEN, entries_of, sources_of, still_there
from workers.engine.messages import Output
from workers.engine.step_loop import StepLoop
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.latency_model import LatencyModel

NUM_BLOCKS = 24
ROOMY = replace(CONFIG, max_running_sequences=6, max_waiting_requests=20, token_budget=24)


def token_at(name: str, position: int) -> int:
    """What a request's token at this position is; a STOP_TOKEN now and then."""
    number = (int(name[1:]) * 31 + position * 17) % 23
    return STOP_TOKEN if number == 5 else 100 + number


class DeviceFake:
    """A device that runs steps in the order in which they were begun, and hands each to the next."""

    def __init__(self) -> None:
        self.num_ahead = 0
        #: What steps say that they took, by the device's clock.
        self.device_s: float | None = None
        self._running: deque[BegunFake] = deque()

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        return self.begin(plan, on_layers, None).result()

    def begin(
        self, plan: StepPlan, on_layers: Callable[[int, int], None], previous: "BegunFake | None"
    ) -> "BegunFake":
        sources = (
            sources_of(previous.plan, plan.decodes, -1) if previous is not None else [-1] * len(plan.decodes)
        )
        for sequence, source in zip(plan.decodes, sources, strict=True):
            name, last = sequence.key.request_id, len(sequence.token_ids) - 1
            if source < 0:
                token = sequence.token_ids[-1]
            else:
                assert previous is not None
                assert sequence.token_ids[-1] == ASSUMED_TOKEN
                token = previous.tokens[source]
                self.num_ahead += 1
            # What the forward pass reads is what was generated.
            assert last < sequence.num_prompt_tokens or token == token_at(name, last)
        sampled = [*plan.decodes, *(part.sequence for part in plan.chunks if part.yields_token)]
        tokens = [token_at(one.key.request_id, len(one.token_ids)) for one in sampled]
        begun = BegunFake(self, plan, tokens)
        self._running.append(begun)
        assert len(self._running) <= 2
        return begun

    def end(self, begun: "BegunFake") -> None:
        assert self._running.popleft() is begun


class BegunFake:
    def __init__(self, device: DeviceFake, plan: StepPlan, tokens: Sequence[int]) -> None:
        self.plan, self.tokens = plan, tokens
        self._device = device

    def result(self) -> StepResult:
        self._device.end(self)
        return StepResult(self.tokens, device_s=self._device.device_s)


class World:
    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        self.engine = make_engine(config=config, num_blocks=num_blocks)
        self.device = DeviceFake()
        self.outputs: list[Output] = []
        self.tokens: dict[str, list[int]] = {}
        self.now_s = 0.0
        self.latency = LatencyModel(STEP_MODEL, STEP_DEVICE)
        self.loop = StepLoop(
            self.engine,
            self.device,
            self.outputs.extend,
            pytest.fail,
            self._clock,
            latency=self.latency,
            overlapping=self.device,
        )

    def _clock(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def submit(self, name: str, num_prompt: int, max_new: int) -> None:
        self.tokens[name] = []
        asked = submit(name, BOTH, num_prompt=num_prompt, max_new=max_new)
        # Prompts differ, so that nobody finds those of others.
        tokens = tuple(1000 * int(name[1:]) + i for i in range(num_prompt))
        self.engine.handle(replace(asked, token_ids=tokens), self.now_s)

    def step(self) -> bool:
        is_working = self.loop.step()
        self.engine.check_invariants()
        assert not [one for one in self.outputs if isinstance(one, RequestFailed)]
        gather(self.outputs, self.tokens)
        self.outputs.clear()
        return is_working


def expected_tokens(name: str, num_prompt: int, max_new: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_new and (not tokens or tokens[-1] != STOP_TOKEN):
        tokens.append(token_at(name, num_prompt + len(tokens)))
    return tokens


REQUESTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=9
)


@given(
    REQUESTS,
    st.dictionaries(st.integers(0, 25), st.integers(0, 8), max_size=4),
    st.integers(9, 40),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_tokens_are_those_of_steps_that_wait_for_each_other(
    requests: list[tuple[int, int, int]],
    aborted: dict[int, int],
    num_blocks: int,
    is_cache_on: bool,
    growth_reserve: float,
) -> None:
    config = replace(ROOMY, is_prefix_cache_on=is_cache_on, growth_reserve=growth_reserve)
    world = World(config, num_blocks)
    gone: set[str] = set()
    waiting = deque(enumerate(requests))
    num_steps, is_working, pause = 0, True, 0
    while waiting or is_working:
        while waiting and pause == 0:
            i, (num_prompt, max_new, pause) = waiting.popleft()
            world.submit(f"r{i}", num_prompt, max_new)
        pause = max(0, pause - 1)
        if num_steps in aborted and f"r{aborted[num_steps]}" in world.tokens:
            gone.add(f"r{aborted[num_steps]}")
            world.engine.handle(Abort(key(f"r{aborted[num_steps]}")), 0.0)
        is_working = world.step()
        num_steps += 1
        assert num_steps < 2000
    for i, (num_prompt, max_new, _) in enumerate(requests):
        wanted = expected_tokens(f"r{i}", num_prompt, max_new)
        found = world.tokens[f"r{i}"]
        assert found == (wanted[: len(found)] if f"r{i}" in gone else wanted)
    assert_idle(world.engine, num_blocks)


def assert_idle(engine: Engine, num_blocks: int) -> None:
    counts: BlockCounts = engine.block_counts()
    assert counts.in_use == counts.leased == 0
    assert counts.free + counts.cached == num_blocks


def test_steps_overlap() -> None:
    world = World(ROOMY, NUM_BLOCKS)
    world.submit("r0", 3, 12)
    world.submit("r2", 3, 12)
    while world.step():
        pass
    num_tokens = sum(map(len, world.tokens.values()))
    # The first of each comes from its prompt, and the second is known before its step is planned.
    assert world.device.num_ahead >= num_tokens - 4
    assert world.device.num_ahead > 8


def test_a_request_that_needs_its_tokens_on_the_host_is_waited_for() -> None:
    world = World(ROOMY, NUM_BLOCKS)
    world.tokens["r0"] = []
    asked = submit("r0", BOTH, num_prompt=3, max_new=8)
    sampling = replace(asked.sampling, repetition_penalty=1.5)
    world.engine.handle(replace(asked, sampling=sampling), 0.0)
    while world.step():
        pass
    assert world.tokens["r0"] == expected_tokens("r0", 3, 8)
    assert world.device.num_ahead == 0


def test_a_step_that_waits_for_the_one_before_it_does_not_take_its_time_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(ROOMY, NUM_BLOCKS)
    asked = submit("r2", BOTH, num_prompt=3, max_new=8)
    sampling = replace(asked.sampling, repetition_penalty=1.5)
    world.engine.handle(replace(asked, sampling=sampling), 0.0)
    result, complete, times_s = BegunFake.result, world.engine.complete, list[float]()

    def slow(begun: BegunFake) -> StepResult:
        world.now_s += 1.0
        return result(begun)

    def timed(plan: StepPlan, found: StepResult, now_s: float) -> None:
        times_s.append(now_s - plan.began_s)
        complete(plan, found, now_s)

    monkeypatch.setattr(BegunFake, "result", slow)
    monkeypatch.setattr(world.engine, "complete", timed)
    while world.loop.step():
        pass
    assert len(times_s) == len(expected_tokens("r2", 3, 8)) > 3
    assert all(1.0 < one < 1.1 for one in times_s)


def test_a_step_keeps_what_is_still_there() -> None:
    engine = make_engine(config=ROOMY)
    for name in ("r1", "r2", "r3"):
        engine.handle(submit(name, num_prompt=4, max_new=9), 0.0)
    first = engine.schedule(0.0)
    assert first is not None
    engine.complete(first, StepResult([50, 51, 52]), 0.1)
    plan = engine.schedule(0.2)
    assert plan is not None
    entries = entries_of(plan)
    assert still_there(plan, entries, StepResult([1, 2, 3]))[0] is plan
    engine.handle(Abort(key("r2")), 0.3)
    kept, result = still_there(plan, entries, StepResult([1, 2, 3]))
    assert [one.key.request_id for one in kept.decodes] == ["r1", "r3"]
    assert list(result.token_ids) == [1, 3]


@pytest.mark.parametrize("breaks", ["begin", "result"])
def test_a_step_that_breaks_fails_its_requests_and_no_other(
    monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    world = World(ROOMY, NUM_BLOCKS)
    for name in ("r5", "r2"):
        world.submit(name, 3, 20)
    for _ in range(4):
        world.step()
    if breaks == "begin":
        begin = world.device.begin

        def broken(*arguments: object) -> BegunFake:
            monkeypatch.setattr(world.device, "begin", begin)
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(world.device, "begin", broken)
    else:

        def lost(begun: BegunFake) -> StepResult:
            monkeypatch.undo()
            world.device.end(begun)
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(BegunFake, "result", lost)
    world.loop.step()
    world.loop.step()
    failed = [one for one in world.outputs if isinstance(one, RequestFailed)]
    assert sorted(one.key.request_id for one in failed) == ["r2", "r5"]
    assert all("a kernel failed" in one.reason for one in failed)
    world.outputs.clear()
    world.engine.check_invariants()
    world.submit("r4", 5, 6)
    while world.step():
        pass
    assert world.tokens["r4"] == expected_tokens("r4", 5, 6)
    assert_idle(world.engine, NUM_BLOCKS)


def test_steps_count_as_long_as_they_took_on_the_device() -> None:
    """By the host's clock a step may end when the next one was begun, long after it did."""
    world = World(ROOMY, NUM_BLOCKS)
    world.device.device_s = 0.125
    seen: list[float] = []
    world.latency.observe = lambda _shape, measured_s: seen.append(measured_s)  # type: ignore[method-assign]
    world.submit("r1", 5, 8)
    while world.step():
        pass
    assert len(seen) == 8
    assert set(seen) == {0.125}


@given(st.integers(0, 2**20))
def test_steps_with_pictures_are_planned_ahead_from_what_is_there(seed: int) -> None:
    """Embeddings come and go while steps run; whatever is planned reads those that are there, and all is given back."""
    rng = Random(seed)
    world = EngineWithEmbeddings(make_engine(config=ROOMY, num_blocks=60), 24)
    names = [f"r{i}" for i in range(rng.randint(2, 5))]
    max_new = {name: rng.randint(1, 6) for name in names}
    waiting, num_ahead, flight = list(names), 0, None
    for _ in range(400):
        if waiting and rng.random() < 0.5:
            world.handle(with_pictures(waiting[0], max_new[waiting.pop(0)]))
        while world.wanted and rng.random() < 0.5:
            world.encode(succeeds=rng.random() < 0.8)
        world.deliver()
        if flight is not None and not world.engine.assume(flight[0]):
            complete(world, *flight)
            flight = None
        plan = world.engine.schedule(1.0)
        begun = None
        if plan is not None:
            world._check_rows(plan)
            begun = plan, entries_of(plan)
        if flight is not None:
            world.engine.take_back()
            num_ahead += begun is not None
            complete(world, *flight)
        flight = begun
        world._carry()
        if not waiting and world.engine.num_running + world.engine.num_waiting == 0:
            break
    world.check_empty()
    assert world.ended == dict.fromkeys(names, "")
    assert num_ahead > 0


def with_pictures(name: str, max_new: int) -> Submit:
    """Two pictures of five embeddings in a prompt that takes several steps."""
    plain = submit(name, BOTH, num_prompt=40, max_new=max_new)
    number = int(name[1:])
    tiles = [(3, number), (20, number % 2)]
    token_ids = [1000 * number + i for i in range(40)]
    for start, _ in tiles:
        token_ids[start : start + 5] = [9] * 5
    images = tuple(ImageTile(start, 5, b"%d" % content) for start, content in tiles)
    return replace(plain, token_ids=tuple(token_ids), images=images)


def complete(world: EngineWithEmbeddings, plan: StepPlan, entries: tuple[int, ...]) -> None:
    result = StepResult([50] * sum(part.yields_token for part in plan.slices))
    world.engine.complete(*still_there(plan, entries, result), 1.0)
    world.engine.check_invariants()
    world._carry()
