"""Requests that are refused because their first token would come too late."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK, RequestRecord
from orchestrator.control.admission import MAX_REMEMBERED, TOGETHER_S, Admission, RefusalLog, refusal
from orchestrator.control.router import Predicted
from orchestrator.control.slo import Slo
from orchestrator.errors import TooLate
from orchestrator.sim.simulation import Simulation
from tests.support.sim import BOTH, ENGINE, by_token, load, run, worker

SLO = Slo(1.0, 10.0)
#: 10,000 tokens/s.
SLOW = by_token(1e-4)
WHOLE = replace(ENGINE, is_prefix_cache_on=False)
CLUSTER = [worker("w0", BOTH, WHOLE)]
#: So that the worker has computed enough steps.
LIGHT = [(0.5 * number, 2000, 8) for number in range(12)]

seconds = st.floats(0.0, 100.0)


@given(seconds, seconds, seconds, st.floats(0.01, 100.0))
def test_what_is_refused_is_late_and_is_so_by_what_waits(
    wait_s: float, own_s: float, waited_s: float, target_s: float
) -> None:
    predicted = Predicted(wait_s + own_s, wait_s)
    problem = refusal(predicted, waited_s, target_s)
    if problem is None:
        assert waited_s + predicted.ttft_s <= target_s or wait_s == 0.0
        return
    assert problem.predicted_s > target_s
    assert 0.0 < problem.retry_after_s <= wait_s
    # By then so much of the wait is over that it is in time, or all of it.
    left_s = wait_s - problem.retry_after_s
    assert left_s == 0.0 or waited_s + own_s + left_s == pytest.approx(target_s)


def test_without_a_prediction_everything_is_taken() -> None:
    assert refusal(None, 50.0, 1.0) is None


def test_the_refusal_tells_the_numbers() -> None:
    assert str(refusal(Predicted(4.2, 3.9), 0.0, 2.0)) == (
        "predicted TTFT 4.2 s, target 2 s (slo.ttftMs); one like it would be taken in about 2.2 s (gateway.admission)"
    )


def replay(plan: list[PlannedRequest], admission: Admission) -> tuple[tuple[RequestRecord, ...], Simulation]:
    result, simulation = run(CLUSTER, plan, SLOW, noise=0.0, slo=SLO, admission=admission, check_every=2000)
    return result.load.records, simulation


def attainment(records: list[RequestRecord]) -> float:
    return sum(record.token_times_s[0] <= SLO.ttft_s for record in records) / len(records)


def test_under_overload_those_that_are_taken_are_in_time() -> None:
    # Twice as much as the worker can do, for 10 s.
    plan = load([*LIGHT, *((6.0 + 0.1 * number, 2000, 8) for number in range(100))])
    records, _ = replay(plan, Admission.OFF)
    assert {record.status for record in records} == {OK}
    assert attainment(list(records)) < 0.3
    records, simulation = replay(plan, Admission.PREDICTED)
    assert {record.status for record in records} == {OK, "TooLate"}
    taken = [record for record in records if record.status == OK]
    assert attainment(taken) > 0.95
    assert simulation.dispatcher.refusals.num == len(records) - len(taken)
    # The worker is not left idle for it: at most 10 s and a second's queue of work were there to be done.
    assert len(taken) > len(LIGHT) + 40
    assert [len(record.token_times_s) for record in taken] == [8] * len(taken)
    # In every second somebody gets in.
    late = [record.planned.arrival_s for record in taken if record.planned.arrival_s > 7.0]
    assert {int(at_s) for at_s in late} == set(range(7, 16))


def test_a_light_load_is_taken_whole() -> None:
    records, simulation = replay(load((0.5 * number, 2000, 8) for number in range(30)), Admission.PREDICTED)
    assert {record.status for record in records} == {OK}
    assert simulation.dispatcher.refusals.num == 0


def test_one_that_comes_back_at_the_time_that_it_was_told_is_taken() -> None:
    burst = [*LIGHT, *((6.0 + 0.001 * number, 2000, 8) for number in range(20))]
    records, _ = replay(load(burst), Admission.PREDICTED)
    last = records[-1]
    assert last.status == "TooLate"
    told = re.search(r"in about ([0-9.e-]+) s", last.message)
    assert told is not None
    # A prompt counts until all of it is computed: up to one prompt's time, 0.2 s, later than told, and rounding.
    again_s = last.planned.arrival_s + float(told[1]) + 0.21
    records, _ = replay(load([*burst, (again_s, 2000, 8)]), Admission.PREDICTED)
    assert records[-1].status == OK
    assert records[-1].token_times_s[0] <= SLO.ttft_s


def test_a_prompt_that_is_late_by_itself_is_taken_when_nothing_waits() -> None:
    long_s = 8.0
    records, _ = replay(load([*LIGHT, (long_s, 15_000, 8), (long_s + 0.1, 15_000, 8)]), Admission.PREDICTED)
    assert [record.status for record in records[-2:]] == [OK, "TooLate"]


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(1.0, 9.0), st.floats(0.0, 9.0)), max_size=60))
def test_refusals_are_told_of_together_and_none_is_lost(came: list[tuple[float, float, float]]) -> None:
    log, now_s = RefusalLog(), 0.0
    for waits_s, ttft_s, retry_s in came:
        now_s += waits_s
        log.add(now_s, TooLate(ttft_s, 1.0, retry_s))
    spans = list(log)
    assert log.num == len(came) == sum(span.num for span in spans)
    begin = 0
    for span in spans:
        told = came[begin : begin + span.num]
        begin += span.num
        assert 0.0 <= span.last_at_s - span.first_at_s < TOGETHER_S
        assert span.ttft_s == (min(one[1] for one in told), max(one[1] for one in told))
        assert span.retry_after_s == (min(one[2] for one in told), max(one[2] for one in told))
    assert all(later.first_at_s - one.first_at_s >= TOGETHER_S for one, later in pairwise(spans))


def test_what_is_remembered_of_refusals_is_bounded() -> None:
    log = RefusalLog()
    for i in range(MAX_REMEMBERED + 50):
        log.add(i * TOGETHER_S, TooLate(2.0, 1.0, 1.0))
    assert (log.num, len(list(log))) == (MAX_REMEMBERED + 50, MAX_REMEMBERED)
