"""The request machine: every token once and in order, every worker released, one end."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.request_actions import (
    Action,
    Deliver,
    DeliverDrafts,
    DeliverPrompt,
    Fail,
    FailureKind,
    Send,
    WantRoute,
)
from orchestrator.control.request_machine import (
    MAX_ATTEMPTS,
    TRANSITIONS,
    RequestMachine,
    RequestState,
    RequestTimes,
)
from orchestrator.control.router import Route
from orchestrator.control.slo import Slo
from orchestrator.control.view import LifecycleState, WorkerView
from workers.api import (
    Abort,
    DecodingReport,
    DraftsGenerated,
    Event,
    FailureCode,
    FinishReason,
    Handoff,
    KvTransferred,
    Migrate,
    Phase,
    PrefillStarted,
    PromptScored,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokenLogprobs,
    TokensGenerated,
    WorkerId,
)

PROMPT = (5, 6, 7)


def worker(name: str, *phases: Phase, incarnation: int = 1) -> WorkerView:
    return WorkerView(WorkerId(name), incarnation, frozenset(phases), LifecycleState.READY, f"{name}:1")


P = worker("p-0", Phase.PREFILL)
D = worker("d-0", Phase.DECODE)
E = worker("d-1", Phase.DECODE)
B = worker("b-0", Phase.PREFILL, Phase.DECODE)
SPLIT = Route(P, D, "test")
TOGETHER = Route(B, B, "test")


def machine(max_new_tokens: int = 4, deadline_s: float = 100.0) -> RequestMachine:
    return RequestMachine(
        RequestId("r"), PROMPT, SamplingParams(max_new_tokens, seed=9), deadline_s, RequestTimes(0.0)
    )


def tokens(
    request: RequestMachine,
    first_index: int,
    *token_ids: int,
    end: FinishReason | None = None,
    prefill_s: float | None = None,
) -> TokensGenerated:
    return TokensGenerated(request.key, token_ids, len(PROMPT) + first_index, end, prefill_s)


def transferred(request: RequestMachine) -> KvTransferred:
    return KvTransferred(request.key, 1000, 2, 0.5, 0.1)


def submits(actions: Sequence[Action]) -> dict[str, Submit]:
    sends = [action for action in actions if isinstance(action, Send)]
    return {s.worker.worker_id: s.command for s in sends if isinstance(s.command, Submit)}


def aborted(actions: Sequence[Action]) -> set[str]:
    sends = [action for action in actions if isinstance(action, Send)]
    return {s.worker.worker_id for s in sends if isinstance(s.command, Abort)}


def test_every_state_has_its_transitions_and_an_end_has_none() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    assert not TRANSITIONS[RequestState.FINISHED] | TRANSITIONS[RequestState.FAILED]


def test_on_one_worker_there_is_no_hand_off() -> None:
    request = machine()
    (submit,) = submits(request.routed(TOGETHER, 7, 1.0)).values()
    assert submit == Submit(
        RequestKey(RequestId("r"), 7),
        frozenset({Phase.PREFILL, Phase.DECODE}),
        PROMPT,
        request.sampling,
        timeout_s=99.0,
    )
    assert request.worker_event(B.worker_id, PrefillStarted(request.key, 0.25), 1.5) == []
    assert request.worker_event(B.worker_id, tokens(request, 0, 11, prefill_s=0.5), 2.0) == [
        Deliver((11,), 0, None)
    ]
    assert request.state is RequestState.DECODE
    last = tokens(request, 1, 12, 13, 14, end=FinishReason.LENGTH)
    assert request.worker_event(B.worker_id, last, 4.0) == [Deliver((12, 13, 14), 1, FinishReason.LENGTH)]
    times = request.times
    assert (times.submitted_at_s, times.first_token_at_s, times.last_token_at_s) == (1.0, 2.0, 4.0)
    assert (times.worker_queue_s, times.prefill_s) == (0.25, 0.5)
    request.check_invariants()


def test_workers_are_told_the_targets_and_what_is_left_of_them() -> None:
    request = machine()
    request.slo, request.tenant_weight = Slo(2.0, 0.1), 3.0
    sent = submits(request.routed(SPLIT, 7, 0.5))
    assert {(one.ttft_left_s, one.tpot_target_s, one.tenant_weight) for one in sent.values()} == {
        (1.5, 0.1, 3.0)
    }
    # What was late before it came to a worker is so there.
    late = machine()
    late.slo = Slo(2.0, 0.1)
    assert submits(late.routed(TOGETHER, 7, 3.0))["b-0"].ttft_left_s == -1.0


def test_the_reason_of_the_order_is_that_of_the_attempt_that_gave_the_first_token() -> None:
    request = machine()
    request.routed(TOGETHER, 7, 1.0)
    request.worker_event(B.worker_id, PrefillStarted(request.key, 0.25, "before 2"), 1.5)
    assert request.order_reason == "before 2"
    request.worker_event(B.worker_id, tokens(request, 0, 11, prefill_s=0.5), 2.0)
    request.worker_lost(B, "gone", 3.0)
    request.routed(TOGETHER, 8, 3.0)
    request.worker_event(B.worker_id, PrefillStarted(request.key, 0.25, "after 1"), 3.5)
    assert request.order_reason == "before 2"


def test_apart_both_workers_get_the_same_transfer_and_decode_is_told_first() -> None:
    request = machine()
    actions = request.routed(SPLIT, 7, 0.0)
    assert [a.worker.worker_id for a in actions if isinstance(a, Send)] == ["d-0", "p-0"]
    sent = submits(actions)
    assert sent["d-0"].handoff == Handoff("r/7")
    assert sent["p-0"].handoff == Handoff("r/7", "d-0:1", 1)
    assert (sent["d-0"].phases, sent["p-0"].phases) == (D.phases, P.phases)


def test_tokens_of_decode_that_overtake_the_first_are_held_back() -> None:
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    assert request.worker_event(D.worker_id, tokens(request, 1, 12), 1.0) == []
    assert request.worker_event(D.worker_id, tokens(request, 2, 13), 1.0) == []
    assert request.worker_event(P.worker_id, tokens(request, 0, 11), 2.0) == [Deliver((11, 12, 13), 0, None)]
    assert request.worker_event(P.worker_id, transferred(request), 2.0) == []
    assert request.times.kv_transfer is not None
    request.check_invariants()


def test_an_end_that_overtakes_the_first_token_ends_it_when_that_has_come() -> None:
    request = machine(2)
    request.routed(SPLIT, 1, 0.0)
    assert request.worker_event(D.worker_id, tokens(request, 1, 12, end=FinishReason.STOP), 1.0) == []
    assert request.worker_lost(D, "gone after its last word", 1.0) == []
    actions = request.worker_event(P.worker_id, tokens(request, 0, 11), 2.0)
    assert actions[0] == Deliver((11, 12), 0, FinishReason.STOP)
    assert aborted(actions) == set()
    request.check_invariants()


def test_a_first_token_that_ends_it_frees_the_decode_worker() -> None:
    request = machine(1)
    request.routed(SPLIT, 1, 0.0)
    actions = request.worker_event(P.worker_id, tokens(request, 0, 11, end=FinishReason.LENGTH), 1.0)
    assert actions[0] == Deliver((11,), 0, FinishReason.LENGTH)
    assert aborted(actions) == {"d-0"}


def test_a_first_token_that_ends_it_after_a_failover_frees_the_decode_worker_too() -> None:
    request = machine(3)
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    request.worker_event(D.worker_id, tokens(request, 1, 12), 1.0)
    assert request.worker_lost(D, "gone", 1.0)[-1] == WantRoute("d-0: gone")
    request.routed(SPLIT, 2, 2.0)
    actions = request.worker_event(P.worker_id, tokens(request, 2, 13, end=FinishReason.LENGTH), 3.0)
    assert actions[0] == Deliver((13,), 2, FinishReason.LENGTH)
    assert aborted(actions) == {"d-0"}


@pytest.mark.parametrize("is_reported", [False, True])
def test_an_end_from_decode_aborts_nobody_since_prefill_has_only_its_report_to_give(
    is_reported: bool,
) -> None:
    request = machine(2)
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    if is_reported:
        request.worker_event(P.worker_id, transferred(request), 1.0)
    actions = request.worker_event(D.worker_id, tokens(request, 1, 12, end=FinishReason.LENGTH), 2.0)
    assert aborted(actions) == set()


def test_after_a_loss_the_next_attempt_prefills_what_was_delivered_and_goes_on() -> None:
    request = machine(4)
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    request.worker_event(D.worker_id, tokens(request, 1, 12), 2.0)
    assert request.worker_lost(D, "its stream broke", 1.0) == [
        Send(P, Abort(RequestKey(RequestId("r"), 1))),
        WantRoute("d-0: its stream broke"),
    ]
    assert request.num_prefill_tokens == 5
    stale = tokens(request, 2, 99)
    (submit,) = submits(request.routed(TOGETHER, 2, 3.0)).values()
    assert submit.token_ids == (*PROMPT, 11, 12)
    assert submit.sampling == replace(request.sampling, max_new_tokens=2)
    assert submit.num_delivered == 2
    assert request.worker_event(D.worker_id, stale, 3.0) == []
    assert request.worker_event(B.worker_id, tokens(request, 2, 13), 4.0) == [Deliver((13,), 2, None)]
    assert request.times.submitted_at_s == 0.0
    request.check_invariants()


def test_before_the_first_token_a_new_attempt_starts_its_times_anew() -> None:
    request = machine()
    request.routed(SPLIT, 1, 1.0)
    request.worker_lost(P, "gone", 1.0)
    request.routed(SPLIT, 2, 5.0)
    assert request.times.submitted_at_s == 5.0


def test_a_prefill_worker_that_has_handed_off_may_die() -> None:
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    request.worker_event(P.worker_id, transferred(request), 1.0)
    assert request.worker_lost(P, "gone", 1.0) == []
    assert request.state is RequestState.DECODE


def test_the_loss_of_an_earlier_incarnation_concerns_nobody() -> None:
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    assert request.worker_lost(replace(P, incarnation=0), "gone", 1.0) == []
    assert request.state is RequestState.PREFILL


def test_a_transfer_reported_where_there_is_none_changes_nothing() -> None:
    request = machine()
    request.routed(TOGETHER, 1, 0.0)
    assert request.worker_event(B.worker_id, transferred(request), 1.0) == []
    assert request.worker_lost(B, "gone", 1.0) == [WantRoute("b-0: gone")]


def test_only_so_many_attempts_are_made() -> None:
    request = machine()
    for attempt in range(1, MAX_ATTEMPTS):
        request.routed(TOGETHER, attempt, 0.0)
        assert request.worker_lost(B, "gone", 1.0) == [WantRoute("b-0: gone")]
    request.routed(TOGETHER, MAX_ATTEMPTS, 0.0)
    assert request.worker_lost(B, "gone", 1.0) == [Fail(FailureKind.UNAVAILABLE, "b-0: gone")]
    request.check_invariants()


@pytest.mark.parametrize(
    ("code", "kind", "is_final", "avoided"),
    [
        (FailureCode.INVALID, FailureKind.INVALID, True, "p-0"),
        (FailureCode.DEADLINE, FailureKind.DEADLINE, True, "p-0"),
        (FailureCode.OVERLOADED, FailureKind.OVERLOADED, False, "p-0"),
        (FailureCode.TRANSFER, FailureKind.UNAVAILABLE, False, "d-0"),
        (FailureCode.INTERNAL, FailureKind.UNAVAILABLE, False, "p-0"),
    ],
)
def test_a_worker_s_failure_is_final_or_tried_elsewhere(
    code: FailureCode, kind: FailureKind, is_final: bool, avoided: str
) -> None:
    request = machine()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        request.routed(SPLIT, attempt, 0.0)
        actions = request.worker_event(P.worker_id, RequestFailed(request.key, code, "why"), 1.0)
        assert aborted(actions) == {"d-0"}
        assert request.avoided == {avoided}
        if is_final or attempt == MAX_ATTEMPTS:
            assert actions[-1] == Fail(kind, "p-0: why")
            break
        assert actions[-1] == WantRoute("p-0: why")


def test_a_worker_that_ends_a_request_early_is_tried_elsewhere() -> None:
    request = machine()
    request.routed(TOGETHER, 1, 0.0)
    actions = request.worker_event(B.worker_id, tokens(request, 2, 13, end=FinishReason.STOP), 1.0)
    assert actions == [WantRoute("b-0: tokens are missing")]


def test_a_worker_that_does_not_stop_is_stopped() -> None:
    request = machine(2)
    request.routed(TOGETHER, 1, 0.0)
    actions = request.worker_event(B.worker_id, tokens(request, 0, 11, 12, 13), 1.0)
    assert actions == [Deliver((11, 12), 0, FinishReason.LENGTH), Send(B, Abort(request.key))]


def test_doubled_and_overlapping_tokens_are_delivered_once() -> None:
    request = machine(6)
    request.routed(TOGETHER, 1, 0.0)
    request.worker_event(B.worker_id, tokens(request, 0, 11, 12), 1.0)
    assert request.worker_event(B.worker_id, tokens(request, 0, 11, 12), 1.0) == []
    assert request.worker_event(B.worker_id, tokens(request, 1, 12, 13), 1.0) == [Deliver((13,), 2, None)]


def test_nothing_follows_an_end() -> None:
    request = machine(1)
    request.routed(TOGETHER, 1, 0.0)
    request.worker_event(B.worker_id, tokens(request, 0, 11, end=FinishReason.STOP), 1.0)
    assert request.worker_event(B.worker_id, tokens(request, 1, 12), 1.0) == []
    assert request.cancelled("late") == request.deadline_passed() == request.worker_lost(B, "late", 1.0) == []
    assert request.delivered == [11]


def test_time_that_is_up_when_a_route_comes_ends_it_without_a_submit() -> None:
    request = machine(deadline_s=5.0)
    (failed,) = request.routed(TOGETHER, 1, 5.0)
    assert isinstance(failed, Fail)
    assert failed.kind is FailureKind.DEADLINE


def test_cancelling_frees_both_workers_in_every_state() -> None:
    request = machine()
    assert request.cancelled("left") == [Fail(FailureKind.CANCELLED, "left")]
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    assert aborted(request.cancelled("left")) == {"p-0", "d-0"}
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    request.worker_event(P.worker_id, transferred(request), 1.0)
    assert aborted(request.cancelled("left")) == {"d-0"}


def scored(*token_ids: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in token_ids)


def test_what_the_client_has_is_not_asked_again() -> None:
    request = machine(6)
    request.sampling = replace(request.sampling, min_new_tokens=3, num_prompt_logprobs=1, num_logprobs=2)
    request.priority, request.cache_salt = 7, "salt"
    (first,) = submits(request.routed(TOGETHER, 1, 0.0)).values()
    assert (first.sampling, first.num_delivered) == (request.sampling, 0)
    assert (first.priority, first.cache_salt) == (7, "salt")
    request.worker_event(B.worker_id, PromptScored(request.key, 1, scored(6)), 1.0)
    request.worker_lost(B, "gone", 1.0)
    (again,) = submits(request.routed(TOGETHER, 2, 0.0)).values()
    assert again.sampling.num_prompt_logprobs == 1
    assert request.worker_event(B.worker_id, PromptScored(request.key, 1, scored(6, 7)), 1.0) == [
        DeliverPrompt(scored(7))
    ]
    request.worker_event(B.worker_id, tokens(request, 0, 11, 12, 13, 14), 1.0)
    request.worker_lost(B, "gone", 1.0)
    (last,) = submits(request.routed(TOGETHER, 3, 0.0)).values()
    assert last.sampling == replace(
        request.sampling, max_new_tokens=2, min_new_tokens=0, num_prompt_logprobs=None
    )
    assert (last.num_delivered, last.priority, last.cache_salt) == (4, 7, "salt")
    request.check_invariants()


def test_prompt_logprobs_of_what_is_no_prompt_or_leaves_a_gap_are_left_out() -> None:
    request = machine()
    request.routed(TOGETHER, 1, 0.0)
    assert request.worker_event(B.worker_id, PromptScored(request.key, 2, scored(7)), 1.0) == []
    assert request.worker_event(B.worker_id, PromptScored(request.key, 1, scored(6, 7, 8)), 1.0) == [
        DeliverPrompt(scored(6, 7))
    ]
    assert request.worker_event(B.worker_id, PromptScored(request.key, 3, scored(8)), 1.0) == []
    request.check_invariants()


def test_logprobs_that_overtake_stay_with_their_tokens() -> None:
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    late = replace(tokens(request, 1, 12, 13), logprobs=scored(12, 13))
    assert request.worker_event(D.worker_id, late, 1.0) == []
    first = replace(tokens(request, 0, 11, prefill_s=0.5), logprobs=scored(11), num_cached_tokens=2)
    first = replace(first, num_fetched_tokens=1, num_reused_tokens=5, prefix_fetch_s=0.25)
    assert request.worker_event(P.worker_id, first, 1.0) == [
        Deliver((11, 12, 13), 0, None, scored(11, 12, 13))
    ]
    assert (request.num_cached_tokens, request.num_fetched_tokens, request.num_reused_tokens) == (2, 1, 5)
    assert request.prefix_fetch_s == 0.25


def test_drafts_are_all_there_is_and_end_it() -> None:
    request = machine()
    request.routed(SPLIT, 1, 0.0)
    report = DecodingReport(request.key, 3, 3, 9)
    assert request.worker_event(D.worker_id, report, 1.0) == []
    actions = request.worker_event(
        D.worker_id, DraftsGenerated(request.key, ((1, 2), (3,)), (-1.0, -2.0)), 1.0
    )
    assert actions[0] == DeliverDrafts(((1, 2), (3,)), (-1.0, -2.0))
    assert aborted(actions) == set()
    assert (request.state, request.decoding_report) == (RequestState.FINISHED, report)
    request.check_invariants()


def test_the_report_of_an_attempt_that_was_given_up_is_forgotten() -> None:
    request = machine()
    request.routed(TOGETHER, 1, 0.0)
    request.worker_event(B.worker_id, DecodingReport(request.key, 3, 3, 9), 1.0)
    request.worker_lost(B, "gone", 1.0)
    request.routed(TOGETHER, 2, 0.0)
    assert request.decoding_report is None


def test_text_that_stops_ends_it_with_the_tokens_that_count() -> None:
    request = machine(6)
    request.routed(SPLIT, 1, 0.0)
    request.worker_event(P.worker_id, tokens(request, 0, 11), 1.0)
    request.worker_event(D.worker_id, tokens(request, 1, 12, 13), 1.0)
    assert aborted(request.text_stopped(2)) == {"d-0"}
    assert (request.state, request.delivered) == (RequestState.FINISHED, [11, 12])
    assert request.cancelled("late") == []
    request.check_invariants()


def test_text_may_stop_while_it_waits_for_a_route_and_after_its_end() -> None:
    request = machine(6)
    request.routed(TOGETHER, 1, 0.0)
    request.worker_event(B.worker_id, tokens(request, 0, 11, 12), 1.0)
    request.worker_lost(B, "gone", 1.0)
    assert request.text_stopped(1) == []
    assert (request.state, request.delivered) == (RequestState.FINISHED, [11])
    request = machine(2)
    request.routed(TOGETHER, 1, 0.0)
    request.worker_event(B.worker_id, tokens(request, 0, 11, 12, end=FinishReason.LENGTH), 1.0)
    assert request.text_stopped(1) == []
    assert request.delivered == [11]


def decoding_on(worker_of_route: Route) -> RequestMachine:
    """A request for four tokens that decodes, with two of them delivered and no KV on its way."""
    request = machine()
    request.routed(worker_of_route, 1, 0.0)
    request.worker_event(worker_of_route.prefill.worker_id, tokens(request, 0, 11), 1.0)
    if not worker_of_route.is_colocated:
        request.worker_event(worker_of_route.prefill.worker_id, transferred(request), 1.0)
    request.worker_event(worker_of_route.decode.worker_id, tokens(request, 1, 12), 1.0)
    assert request.can_migrate
    return request


@pytest.mark.parametrize("route", [SPLIT, TOGETHER], ids=["apart", "together"])
def test_a_sequence_that_moves_ends_where_it_went_and_nobody_is_aborted(route: Route) -> None:
    request = decoding_on(route)
    submit, migrate = request.migrated(E, "test", 2.0)
    assert isinstance(submit, Send)
    assert isinstance(migrate, Send)
    assert (submit.worker, migrate.worker) == (E, route.decode)
    assert migrate.command == Migrate(request.key, Handoff("r/1.1", "d-1:1", 1), len(PROMPT) + 2)
    request.check_invariants()
    # The end overtakes the report of the worker that it came from, which then tells on its own.
    last = tokens(request, 2, 13, 14, end=FinishReason.LENGTH)
    assert request.worker_event(E.worker_id, last, 3.0) == [Deliver((13, 14), 2, FinishReason.LENGTH)]
    assert request.migrations[-1].pause_s == 2.0
    request.check_invariants()


def test_a_sequence_that_ends_before_it_moves_frees_where_it_was_to_go() -> None:
    request = decoding_on(SPLIT)
    request.migrated(E, "test", 2.0)
    actions = request.worker_event(D.worker_id, tokens(request, 2, 13, 14, end=FinishReason.LENGTH), 3.0)
    assert actions[0] == Deliver((13, 14), 2, FinishReason.LENGTH)
    assert aborted(actions) == {"d-1"}
    request.check_invariants()


def test_text_that_stops_while_it_moves_frees_both_sides() -> None:
    request = decoding_on(SPLIT)
    request.migrated(E, "test", 2.0)
    assert aborted(request.text_stopped(2)) == {"d-0", "d-1"}


@pytest.mark.parametrize("lost", [D, E], ids=["from", "to"])
def test_a_move_that_breaks_takes_no_attempt_and_frees_the_other_side(lost: WorkerView) -> None:
    request = decoding_on(SPLIT)
    request.migrated(E, "test", 2.0)
    actions = request.worker_lost(lost, "gone", 3.0)
    assert actions[-1] == WantRoute(f"{lost.worker_id}: gone")
    assert aborted(actions) == {"d-0", "d-1"} - {lost.worker_id}
    assert request.num_attempts == 0
    request.check_invariants()


class World:
    """Workers that hold requests, and a client; any schedule of events must leave them consistent."""

    def __init__(self, max_new_tokens: int, stop_at: int | None) -> None:
        self.request = machine(max_new_tokens)
        self.length = max_new_tokens if stop_at is None else min(stop_at, max_new_tokens)
        self.reason = (
            FinishReason.STOP if stop_at is not None and stop_at <= max_new_tokens else (FinishReason.LENGTH)
        )
        #: What each worker still has to say, for each (worker, attempt) that it holds.
        self.held: dict[tuple[str, int], list[Event]] = {}
        self.received: list[int] = []
        self.ends: list[object] = []
        self.wants_route = True
        #: Tokens that a sequence still gets where it was, once it has been told to move.
        self.num_before_leaving = 0

    def apply(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(to, Submit() as submit):
                    self.held[to.worker_id, submit.key.attempt] = self.script(submit)
                case Send(to, Migrate() as migrate):
                    self.move(to, migrate)
                case Send(to, Abort(key)):
                    assert (to.worker_id, key.attempt) in self.held
                    del self.held[to.worker_id, key.attempt]
                case Deliver():
                    assert not self.ends
                    assert action.first_index == len(self.received)
                    self.received += action.token_ids
                    if action.finish_reason is not None:
                        self.ends.append(action.finish_reason)
                case Fail():
                    self.ends.append(action)
                case WantRoute():
                    self.wants_route = True
        self.request.check_invariants()
        assert len(self.ends) <= 1

    def script(self, submit: Submit) -> list[Event]:
        first = len(submit.token_ids) - len(PROMPT)

        def token(i: int) -> TokensGenerated:
            is_last = i == self.length - 1
            return TokensGenerated(submit.key, (100 + i,), len(PROMPT) + i, self.reason if is_last else None)

        is_handed_off = submit.handoff is not None
        events: list[Event] = []
        if Phase.PREFILL in submit.phases:
            events = [PrefillStarted(submit.key, 0.0), token(first)]
            if is_handed_off:
                return [*events, KvTransferred(submit.key, 1, 1, 0.1, 0.1)]
            first += 1
        elif is_handed_off:
            first += 1
        return events + [token(i) for i in range(first, self.length)]

    def move(self, source: WorkerView, migrate: Migrate) -> None:
        """It may compute more before it leaves, or all; what it leaves is the other one's to say."""
        assert self.request.route is not None
        attempt, target = migrate.key.attempt, self.request.route.decode.worker_id
        said_here = self.held[source.worker_id, attempt]
        self.held[target, attempt] = said_here[self.num_before_leaving :]
        del said_here[self.num_before_leaving :]
        if self.held[target, attempt]:
            said_here.append(KvTransferred(migrate.key, 1, 1, 0.1, 0.1))

    def migrate(self, num_before_leaving: int) -> None:
        route = self.request.route
        if route is not None and self.request.can_migrate:
            self.num_before_leaving = num_before_leaving
            target = next(one for one in (D, E, B) if one != route.decode)
            self.apply(self.request.migrated(target, "test", 1.0))

    def hear(self, choice: int, is_doubled: bool) -> None:
        holders = sorted(holder for holder, events in self.held.items() if events)
        if not holders:
            return
        holder = holders[choice % len(holders)]
        events = self.held[holder]
        event = events.pop(0)
        is_end = isinstance(event, KvTransferred) or (
            isinstance(event, TokensGenerated) and event.finish_reason is not None
        )
        if is_end:
            del self.held[holder]
        for _ in range(2 if is_doubled else 1):
            self.apply(self.request.worker_event(WorkerId(holder[0]), event, 1.0))

    def fail(self, choice: int, code: FailureCode) -> None:
        if self.held:
            holder = sorted(self.held)[choice % len(self.held)]
            del self.held[holder]
            key = RequestKey(self.request.request_id, holder[1])
            self.apply(self.request.worker_event(WorkerId(holder[0]), RequestFailed(key, code, "test"), 1.0))

    def lose(self, lost: WorkerView) -> None:
        self.held = {key: events for key, events in self.held.items() if key[0] != lost.worker_id}
        self.apply(self.request.worker_lost(lost, "test", 1.0))

    def stop_text(self) -> None:
        """As when a stop string ends with the last token that the client has."""
        if self.received and not self.request.is_over:
            self.length, self.reason = len(self.received), FinishReason.STOP
            self.apply(self.request.text_stopped(len(self.received)))
            self.ends.append(FinishReason.STOP)
            self.wants_route = False

    def send_back(self) -> None:
        if self.request.is_prefill_waiting:
            self.apply(self.request.sent_back("test"))

    def route(self, route: Route) -> None:
        if self.wants_route and not self.request.is_over:
            self.wants_route = False
            self.apply(self.request.routed(route, self.request.attempt + 1, 1.0))


steps = st.one_of(
    st.tuples(st.just("hear"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("hear"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("hear"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("route"), st.sampled_from([SPLIT, TOGETHER])),
    st.tuples(st.just("migrate"), st.integers(0, 3)),
    st.tuples(st.just("migrate"), st.integers(0, 3)),
    st.tuples(st.just("send back")),
    st.tuples(st.just("lose"), st.sampled_from([P, D, E, B])),
    st.tuples(st.just("fail"), st.integers(0, 3), st.sampled_from(FailureCode)),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("stop")),
    st.tuples(st.just("deadline")),
)


@given(st.integers(1, 6), st.none() | st.integers(1, 6), st.lists(steps, max_size=40), st.booleans())
def test_on_any_schedule_tokens_come_once_in_order_and_nobody_is_left_holding(
    max_new_tokens: int, stop_at: int | None, schedule: list[tuple[object, ...]], goes_on: bool
) -> None:
    world = World(max_new_tokens, stop_at)
    for step in schedule:
        match step:
            case "hear", int(choice), bool(is_doubled):
                world.hear(choice, is_doubled)
            case "route", Route() as route:
                world.route(route)
            case "migrate", int(num_before_leaving):
                world.migrate(num_before_leaving)
            case ("send back",):
                world.send_back()
            case "lose", WorkerView() as lost:
                world.lose(lost)
            case "fail", int(choice), FailureCode() as code:
                world.fail(choice, code)
            case ("cancel",):
                world.apply(world.request.cancelled("test"))
            case ("stop",):
                world.stop_text()
            case ("deadline",):
                world.apply(world.request.deadline_passed())
    # Faults have stopped: it ends, and well unless it had failed before.
    while not world.request.is_over:
        world.route(SPLIT if goes_on else TOGETHER)
        world.hear(0, False)
    assert len(world.ends) == 1
    # Who sent KV may still report it, unless it was told to stop; nothing else is held.
    left = [event for (event,) in world.held.values()]
    assert all(isinstance(event, KvTransferred) for event in left)
    while world.held:
        world.hear(0, False)
    assert world.received == [100 + i for i in range(len(world.received))]
    if isinstance(world.ends[0], FinishReason):
        assert len(world.received) == world.length
        assert world.ends[0] is world.reason
