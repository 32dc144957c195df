"""Prompts that wait for room go to a worker that has some."""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.records import OK
from orchestrator.control.request_record import SampleRecord
from orchestrator.control.rerouting import (
    MAX_COMPARED,
    MAX_LOOKS,
    REST_S,
    WaitingPrompt,
    crowded_workers,
    is_worth,
    without_room,
)
from orchestrator.control.router import LoadLedger, Predicted, kept_tokens
from orchestrator.control.slo import Slo
from orchestrator.control.view import WorkerView
from orchestrator.gateway.live_request import enqueue
from orchestrator.sim.faults import random_faults
from protos import inference_pb2 as pb
from tests.support.fake_worker import BOTH, FakeWorker
from tests.support.gateway import Gateway, collect, gateway, run
from tests.support.quiet_workers import QuietWorkers
from tests.support.sim import ENGINE, LLAMA_ON_H100, SHAPES, D, P, load, random_load, worker
from tests.support.sim import run as simulate
from tests.support.waiting import until
from workers.api import PhaseSet, PhaseWork, PrefillStarted, RequestId, WorkerId, WorkerState, WorkerStatus
from workers.step_shape import FactorSource

COSTS = replace(LLAMA_ON_H100.costs(), source=FactorSource.FITTED)


def status(name: str, phases: PhaseSet, room: int | None, num_waiting: int = 0) -> WorkerStatus:
    work = PhaseWork(prefill_tokens=num_waiting)
    return WorkerStatus(
        WorkerId(name), 1, phases, WorkerState.READY, step_costs=COSTS, work=work, room_tokens=room
    )


# Which prompts are looked at, and which of them go.

prompts = st.builds(
    lambda rank, by_s, attempt, worker_id, num_tokens, more, since_s: WaitingPrompt(
        rank, by_s, attempt, worker_id, num_tokens, num_tokens + more, since_s
    ),
    st.integers(0, 2),
    st.floats(0, 10),
    st.integers(1, 10**6),
    st.sampled_from([WorkerId("a"), WorkerId("b"), WorkerId("c")]),
    st.integers(1, 100),
    st.integers(0, 50),
    st.floats(0, 2),
)


@given(
    st.lists(prompts, max_size=80, unique_by=lambda one: one.attempt),
    st.integers(0, 100),
    st.integers(1, 100),
)
def test_of_those_without_room_the_most_urgent_are_looked_at_and_the_first_ones(
    found: list[WaitingPrompt], room: int, most: int
) -> None:
    rooms = {WorkerId("a"): room, WorkerId("b"): 0}
    chosen, last = without_room(found, rooms, most, 2.0)
    stuck = [
        one
        for one in found
        if one.worker_id in rooms
        and rooms[one.worker_id] < one.room_tokens
        and one.num_tokens <= most
        and one.since_s <= 2.0 - REST_S
    ]
    assert chosen == sorted(chosen)
    if len(stuck) <= MAX_LOOKS:
        assert (set(chosen), last) == (set(stuck), 0)
        return
    assert len(chosen) == MAX_LOOKS
    urgent = sorted(stuck)[: MAX_LOOKS // 2]
    others = [one for one in stuck if one not in urgent][: MAX_LOOKS // 2]
    assert set(chosen) == {*urgent, *others}
    assert last == others[-1].attempt


def test_so_many_that_work_stays_bounded() -> None:
    """The last one would be the most urgent."""
    nowhere = {WorkerId("a"): 0}
    found = [WaitingPrompt(0, float(-i), i, WorkerId("a"), 1, 1, 0.0) for i in range(MAX_COMPARED + 1)]
    asked = iter(found)
    chosen, last = without_room(asked, nowhere, 1, 2.0)
    half = MAX_LOOKS // 2
    assert [one.attempt for one in chosen[:half]] == [MAX_COMPARED - 1 - i for i in range(half)]
    assert [one.attempt for one in chosen[half:]] == list(reversed(range(half)))
    assert last == half - 1
    assert len(list(asked)) == 1


def test_a_worker_is_crowded_when_it_needs_more_room_than_it_has_for_what_it_was_given() -> None:
    ledger = LoadLedger()
    for name in ("a", "b", "c"):
        # Fewer prompt tokens than have room: a part of what may be generated is kept, too.
        ledger.add(WorkerId(name), prefill_tokens=16, coming_tokens=26)
    rooms = {WorkerId("a"): 25, WorkerId("b"): 26, WorkerId("d"): 0}
    assert crowded_workers(ledger, rooms) == {"a"}


seconds = st.floats(0, 100)


@given(seconds, seconds, seconds, seconds, seconds)
def test_who_moves_has_its_first_token_no_later_than_twice_what_was_possible(
    own_s: float, wait_s: float, there_s: float, room_comes_s: float, step_s: float
) -> None:
    """Whenever there is room here: it is asked again and again, and moves as soon as it is worth it."""
    here, there = Predicted(own_s + wait_s, wait_s), Predicted(there_s, 0.0)
    moves_at_s = max(0.0, there_s - own_s)
    assert is_worth(moves_at_s + 1e-9 * (1 + own_s + wait_s + there_s), here, there)
    if room_comes_s <= moves_at_s:
        # It stays, which was the best.
        return
    assert moves_at_s + there_s <= 2 * min(there_s, room_comes_s + own_s) + 1e-9
    assert not is_worth(moves_at_s - 1e-6 - step_s, here, there) or moves_at_s == 0.0


def test_what_is_cached_here_keeps_it_as_long_as_it_would_take_there() -> None:
    here, there = Predicted(3.2, 3.0), Predicted(1.5, 0.3)
    assert not is_worth(1.29, here, there)
    assert is_worth(1.31, here, there)


# At a gateway.


def request(**more: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a text", sampling=pb.SamplingParams(max_tokens=2), **more)


def told(worker: FakeWorker, room: int, num_waiting: int = 0) -> WorkerView:
    return replace(worker.view(), status=status(worker.worker_id, worker.phases, room, num_waiting))


async def give(
    it: Gateway, first: FakeWorker, second: FakeWorker, num: int, priorities: Sequence[int] = ()
) -> list[asyncio.Task[object]]:
    """So many requests, which the first worker has and says nothing of; for the second one there was no room then."""
    await it.publish(told(first, 10_000), told(second, 0))
    first.answer = lambda _submit: ()
    asked = []
    for number in range(num):
        more = {"priority": priorities[number]} if priorities else {}
        asked.append(asyncio.ensure_future(collect(it.client.Generate(request(**more)))))
        await until(lambda number=number: len(first.submits) > number, "it is submitted")
    return asked


def rest(it: Gateway) -> None:
    """All that wait have waited for long enough."""
    for sample in it.dispatcher._running.values():
        attempt = sample.record.attempts[-1]
        attempt.at_s -= 2 * REST_S
    it.dispatcher._routes._looked_at_s -= 2 * REST_S


def test_prompts_that_wait_for_room_go_to_a_worker_that_has_some() -> None:
    async def main() -> None:
        first, second = (FakeWorker(f"b-{i}", BOTH) for i in range(2))
        async with gateway(first, second) as it:
            asked = await give(it, first, second, 4)
            begun, last_attempt, third, fourth = first.submits
            first.say(PrefillStarted(begun.key, 0.125))
            running = it.dispatcher._running
            await until(lambda: not running[begun.key.attempt].machine.is_prefill_waiting, "it has begun")
            running[last_attempt.key.attempt].machine.num_attempts = 3
            # They have not waited for long enough, and then there is no room anywhere.
            await it.publish(told(first, 0, 100), told(second, 10_000))
            rest(it)
            await it.publish(told(first, 0, 100), told(second, 0))
            assert second.submits == []
            num = kept_tokens(len(third.token_ids), len(third.token_ids) + 2)
            await it.publish(told(first, 0, 100), told(second, num))
            # There is room for one of them, the one that came first.
            await asyncio.gather(asked[2])
            await until(lambda: first.aborts == [third.key], "it was taken back")
            rest(it)
            await it.publish(told(first, 0, 100), told(second, num))
            await asyncio.gather(asked[3])
            await until(lambda: first.aborts == [third.key, fourth.key], "the other one, too")
            record = it.dispatcher.records.get(RequestId(fourth.key.request_id))
            assert record is not None
            [sample] = record.samples
            assert [one.problem for one in sample.attempts] == [
                "b-0 has no room for its KV, and b-1 has",
                "",
            ]
            for submit in (begun, last_attempt):
                first.say(*first.script(submit)[submit is begun :])
            answers = await asyncio.gather(*asked)
            # It was nobody's failure.
            assert [answer[-1].timings.attempts for answer in answers] == [1, 3, 1, 1]  # type: ignore[index]
            it.dispatcher.check_invariants()

    run(main)


def test_the_prompt_of_the_highest_priority_goes_first() -> None:
    """There is room for one of them."""

    async def main() -> None:
        first, second = (FakeWorker(f"b-{i}", BOTH) for i in range(2))
        async with gateway(first, second) as it:
            asked = await give(it, first, second, 3, priorities=(0, 2, 1))
            urgent = first.submits[1]
            rest(it)
            num = kept_tokens(len(urgent.token_ids), len(urgent.token_ids) + 2)
            await it.publish(told(first, 0, 100), told(second, num))
            await until(lambda: first.aborts == [urgent.key], "it was taken back")
            await asyncio.gather(asked[1])
            for submit in (first.submits[0], first.submits[2]):
                first.say(*first.script(submit))
            await asyncio.gather(*asked)

    run(main)


def test_what_a_worker_says_of_a_prompt_that_has_gone_is_nothing() -> None:
    """It began it in the same moment: its tokens are not delivered, and those of the other one are."""

    async def main() -> None:
        first, second = (FakeWorker(f"b-{i}", BOTH) for i in range(2))
        async with gateway(first, second) as it:
            [asked] = await give(it, first, second, 1)
            [submit] = first.submits
            first.token_at = lambda _position: 5
            second.answer = lambda _submit: ()
            rest(it)
            await it.publish(told(first, 0, 100), told(second, 10_000))
            await until(lambda: len(second.submits) == 1, "it has gone")
            first.say(*first.script(submit))
            second.say(*second.script(second.submits[0]))
            answer = await asked
            tokens = [token for message in answer for token in message.token_ids]  # type: ignore[attr-defined]
            assert tokens == [second.token_at(len(submit.token_ids) + i) for i in range(len(tokens))]
            await until(lambda: first.aborts == [submit.key], "it was taken back")

    run(main)


def test_as_many_prompts_go_to_a_worker_that_only_prefills_as_it_has_room_for() -> None:
    workers = QuietWorkers({"p0": P, "p1": P, "d": D})
    workers.see({"p0": 10**6, "p1": 0, "d": 10**6})
    workers.submit(20, 100, 100)
    workers.see({"p0": 0, "p1": 100, "d": 10**6})
    workers.see({"p0": 0, "p1": 100, "d": 10**6})
    assert workers.num_at == {("p0", "d"): 19, ("p1", "d"): 1}


def test_no_prompt_goes_to_a_worker_that_is_not_ready() -> None:
    workers = QuietWorkers({"a": BOTH, "b": BOTH, "c": BOTH})
    workers.see({"a": 10**6, "b": 0, "c": 0})
    workers.submit(4, 100, 100)
    workers.see({"a": 0, "b": 0, "c": 10**6}, failed=["c"])
    assert workers.num_at == {("a", "a"): 4}
    workers.see({"a": 0, "b": 0, "c": 10**6})
    assert workers.num_at == {("c", "c"): 4}


def test_a_prompt_that_lacks_what_is_kept_for_its_answer_goes_to_a_worker_that_has_room() -> None:
    """It needs room for 100 tokens and a quarter of 8,000."""
    for room, is_enough in ((2099, False), (2100, True)):
        workers = QuietWorkers({"a": BOTH, "b": BOTH})
        workers.see({"a": 10**6, "b": 0})
        workers.submit(1, 100, 8000)
        workers.see({"a": room, "b": 10**6})
        assert workers.num_at == {("a", "a") if is_enough else ("b", "b"): 1}


def test_a_cached_beginning_is_not_taken_off_room_that_has_it_already() -> None:
    """All but the last block of the prompt is cached at a, as part of its room for 150 tokens."""
    workers = QuietWorkers({"a": BOTH, "b": BOTH})
    workers.see({"a": 10**6, "b": 0})
    workers.submit(1, 200, 8)
    [sample] = workers.dispatcher._running.values()
    assert sample.machine.route is not None
    prompt = sample.as_waiting(replace(sample.machine.route, num_cached_tokens=192))
    assert prompt.room_tokens == kept_tokens(200, 208)


def test_prompts_that_can_go_nowhere_do_not_hide_others() -> None:
    """The long ones are the more urgent ones. b has room for neither all of one nor what is kept for its answer."""
    for num_tokens, max_new, room in ((5000, 100, 4000), (100, 8000, 2099)):
        workers = QuietWorkers({"a": BOTH, "b": BOTH})
        workers.see({"a": 10**7, "b": 0})
        workers.submit(MAX_LOOKS, num_tokens, max_new, priority=1)
        workers.submit(50, 10, 10)
        for _ in range(5):
            workers.see({"a": 0, "b": room})
        assert workers.num_at == {("a", "a"): MAX_LOOKS, ("b", "b"): 50}


def test_each_of_many_prompts_is_looked_at_in_its_time() -> None:
    """Only the last one has less kept for its answer than b has room for."""
    workers = QuietWorkers({"a": BOTH, "b": BOTH})
    workers.see({"a": 10**8, "b": 0})
    workers.submit(MAX_COMPARED + 200, 10, 8000)
    workers.submit(1, 10, 10)
    for _ in range(-(-(MAX_COMPARED + 201) // (MAX_LOOKS // 2))):
        workers.see({"a": 0, "b": 100})
    assert workers.num_at == {("a", "a"): MAX_COMPARED + 200, ("b", "b"): 1}


class Counted:
    """A sample, and its machine, of which the priority is asked for."""

    num_asked = 0

    def __init__(self, priority: int) -> None:
        self.machine = self
        self._priority = priority

    @property
    def priority(self) -> int:
        Counted.num_asked += 1
        return self._priority


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=40))
def test_samples_wait_by_priority_and_those_that_come_back_before_others(
    coming: list[tuple[int, bool]],
) -> None:
    waiting: deque[Any] = deque()
    for priority, is_first in coming:
        sample = Counted(priority)
        before = list(waiting)
        enqueue(sample, waiting, is_first=is_first)  # type: ignore[arg-type]
        place = waiting.index(sample)
        assert [one for one in waiting if one is not sample] == before
        assert all(
            one.priority > priority or (one.priority == priority and not is_first) for one in before[:place]
        )
        assert all(
            one.priority < priority or (one.priority == priority and is_first) for one in before[place:]
        )


def test_a_prompt_comes_back_to_a_long_queue_without_a_look_at_all_of_it() -> None:
    waiting: deque[Any] = deque(Counted(priority) for priority in (1, 0) for _ in range(5000))
    Counted.num_asked = 0
    for is_first in (True, False):
        enqueue(Counted(0), waiting, is_first=is_first)  # type: ignore[arg-type]
    assert Counted.num_asked < 50


# In simulated clusters.


def moves(record: SampleRecord) -> list[float]:
    """When it went elsewhere for want of room."""
    after = zip(record.attempts, record.attempts[1:], strict=False)
    return [then.at_s - now.at_s for now, then in after if "has no room for its KV" in now.problem]


def test_a_prompt_does_not_wait_for_the_end_of_long_answers_while_others_have_room() -> None:
    """w0 has four answers of 2,500 tokens, each of which lasts 16 s, and w1 four of 400 tokens."""
    times = [(0.2 * i, 2500, 2500 if i in (0, 3, 4, 7) else 400) for i in range(8)]
    plan = load([*times, *((1.6 + 0.02 * i, 2500, 400) for i in range(4))])
    result, simulation = simulate(SHAPES["two"], plan, noise=0.0)
    assert {one.status for one in result.load.records} == {OK}
    found = [simulation.dispatcher.records.get(RequestId(f"r{i}")) for i in range(12)]
    used = [[one.route.prefill.worker_id for one in record.samples[0].attempts] for record in found if record]
    # Two were given to w0 when nobody had room.
    assert used[8:] == [["w1"], ["w0", "w1"], ["w0", "w1"], ["w1"]]
    assert max(one.token_times_s[0] for one in result.load.records[8:]) < 2.5


@given(st.integers(0, 10**6), st.sampled_from(["two", "two apart", "mixed"]), st.booleans(), st.booleans())
def test_on_any_load_that_fills_the_caches_nothing_is_lost_or_moved_to_and_fro(
    seed: int, shape: str, has_faults: bool, is_cache_told: bool
) -> None:
    rng = random.Random(seed)
    engine = replace(
        ENGINE,
        kv_cache_bytes=rng.choice((6 * 10**8, 10**9)),
        max_running_sequences=rng.choice((3, 64)),
        growth_reserve=rng.choice((0.0, 0.25, 1.0)),
    )
    declared = [worker(one.worker_id, one.phases, engine) for one in SHAPES[shape]]
    names = [one.worker_id for one in declared]
    faults = random_faults(rng, names, rate_per_s=0.3, until_s=4.0) if has_faults else ()
    plan = random_load(seed, num_requests=rng.randint(10, 40), rate_rps=rng.choice((10.0, 30.0)))
    result, simulation = simulate(
        declared, plan, seed=seed, faults=faults, slo=Slo(0.5, 0.02), is_cache_told=is_cache_told
    )
    if not faults:
        assert {one.status for one in result.load.records} == {OK}
    for number in range(len(plan)):
        record = simulation.dispatcher.records.get(RequestId(f"r{number}"))
        assert record is not None
        assert all(rested_s >= REST_S for sample in record.samples for rested_s in moves(sample))
