"""The queue of a coarse device: who is next, in the order of any policy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.policies.policy import Job, WorkerLoad
from orchestrator.sim.coarse_device import CoarseDevice
from orchestrator.sim.coarse_queue import FrontQueue
from orchestrator.sim.coarse_request import CoarseRequest, Live
from tests.support.coarse import COSTS, SLO, D, P, policy, run, slack_order
from workers.api import WorkerId
from workers.prompt_order import LATE_SHARE

NO_DEVICE = cast("CoarseDevice", None)


@dataclass
class Given:
    """The keys and ranks that it was told, by number of the prompt."""

    keys: Sequence[int]
    given_ranks: Sequence[int]
    is_ranked: bool
    waiting: set[int] = field(default_factory=set)

    def key(self, job: Job) -> float:
        return float(self.keys[job.number])

    def ranks(self, _now_s: float, jobs: Iterable[Job], _device: WorkerLoad) -> Sequence[int]:
        if not self.is_ranked:
            return ()
        seen = list(jobs)
        assert seen == sorted(seen, key=lambda one: (self.key(one), one.number))
        return [self.given_ranks[one.number] for one in seen]

    def waits(self, job: Job) -> None:
        self.waiting.add(job.number)

    def leaves(self, job: Job) -> None:
        self.waiting.remove(job.number)

    def charge(self, job: Job, num_tokens: int) -> None:
        raise AssertionError


def live(number: int, num_left: int, *, is_begun: bool = False) -> Live:
    job = Job(number, 0.0, SLO.ttft_s, "", num_left, is_begun=is_begun)
    return Live(CoarseRequest(0.0, num_left, 5, SLO), number, job, NO_DEVICE, NO_DEVICE)


PROMPT = st.tuples(st.integers(0, 4), st.integers(-1, 2), st.integers(1, 300), st.booleans())


@settings(max_examples=300)
@given(
    prompts=st.lists(PROMPT, max_size=12),
    is_ranked=st.booleans(),
    budget=st.integers(0, 1500),
    places=st.integers(0, 6),
)
def test_the_first_go_first_as_far_as_budget_and_places_reach(
    prompts: list[tuple[int, int, int, bool]], is_ranked: bool, budget: int, places: int
) -> None:
    order = Given([one[0] for one in prompts], [one[1] for one in prompts], is_ranked)
    begun: list[Live] = []
    queue = FrontQueue(
        order,
        WorkerLoad(WorkerId("w"), P | D, 400_000),
        1e12,
        lambda _live: len(begun) < places,
        begun.append,
    )
    lives = [live(i, size, is_begun=is_begun) for i, (_, _, size, is_begun) in enumerate(prompts)]
    for one in lives:
        queue.add(one)
    # What should come of it: one who has not begun and finds no place stops the others that have not.
    expected, left, num_free, is_blocked = [], budget, places, False
    for one in sorted(
        lives, key=lambda one: (is_ranked * prompts[one.number][1], prompts[one.number][0], one.number)
    ):
        if not one.job.is_begun:
            is_blocked = is_blocked or num_free == 0
            if is_blocked:
                continue
            num_free -= left > 0
        if left > 0:
            expected.append((one.number, min(left, one.job.num_left)))
            left -= expected[-1][1]
    head = queue.head(0.0, 0)
    had_begun = {one.number for one in lives if one.job.is_begun}
    chunks = queue.take_chunks(0.0, budget)
    assert [(one.number, size) for one, size in chunks] == expected
    if expected:
        assert head is not None
        assert head.num_left == chunks[0][0].job.num_left
    assert [one.number for one in begun] == [number for number, _ in expected if number not in had_begun]
    assert all(one.job.is_begun for one, _ in chunks)
    taken = {number for number, _ in expected}
    rest = {one.number for one in queue.take_waiting()[0]}
    assert rest == {one.number for one in lives if not one.job.is_begun and one.number not in taken}
    assert queue.has_prompts == bool(had_begun - taken)


def test_beyond_what_a_device_can_do_those_that_others_make_it_without_wait() -> None:
    """Long prompts and short ones, 1.3 times what can be computed: nearly all short ones are in time, and all get their tokens."""
    requests = [CoarseRequest(0.03 * i, 4000 if i % 4 == 0 else 800, 1, SLO) for i in range(400)]
    result, _ = run(policy([P | D], order=slack_order), requests)
    short = [one.is_met for one in result.records if one.request.prompt_tokens == 800]
    assert sum(short) / len(short) > 0.95
    assert {one.status for one in result.records} == {"OK"}


@pytest.mark.parametrize("num_late", [1, 5])
def test_who_is_too_late_waits_for_its_share_and_no_longer(num_late: int) -> None:
    late = [CoarseRequest(0.0, 30_000, 1, SLO)] * num_late
    token_s = COSTS.step.token_s
    others = [CoarseRequest(0.01 * i, round(0.01 / token_s), 1, SLO) for i in range(1, 2500)]
    result, _ = run(policy([P | D], order=slack_order), [*late, *others])
    first_s = result.records[0].first_s
    # 20 tokens of others for each of its own.
    least_s = 30_000 * token_s / LATE_SHARE
    assert first_s < 1.5 * least_s
    assert sum(one.is_met for one in result.records[num_late:]) > 0.5 * len(others)
