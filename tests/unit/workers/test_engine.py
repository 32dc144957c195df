"""The engine: messages in, steps, outputs out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.digest import token_digest
from kvtransfer.layout import blocks_needed
from tests.support.engine_fakes import (
    BOTH,
    CLAIM_S,
    CONFIG,
    DECODE,
    PREFILL,
    STOP_TOKEN,
    assert_empty,
    key,
    make_engine,
    outputs_of,
    run_step,
    submit,
)
from tests.support.engine_pair import REPORT
from workers.api import (
    Abort,
    CautiousDecoding,
    DraftsGenerated,
    FailureCode,
    FinishReason,
    KvBlocksRemoved,
    KvBlocksStored,
    Phase,
    PhaseSet,
    PrefillStarted,
    RequestFailed,
    Submit,
    SubscribeKvEvents,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.engine.engine import Engine
from workers.engine.messages import (
    BlocksReserved,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
    TransferFailed,
    TransferSent,
)
from workers.engine.sequence import NO_TOKEN
from workers.engine.step_result import RowDetail, StepResult


def failure(engine: Engine) -> tuple[FailureCode, str]:
    [failed] = outputs_of(engine, RequestFailed)
    assert isinstance(failed, RequestFailed)
    return failed.code, failed.reason


def refusal(engine: Engine) -> tuple[str, bool]:
    [refused] = outputs_of(engine, ReservationRefused)
    assert isinstance(refused, ReservationRefused)
    return refused.reason, refused.is_retryable


#: Of the tokens of a request of 5 tokens.
DIGEST = token_digest(range(100, 105))


def reserve(
    engine: Engine,
    transfer_id: str = "t-r1",
    *,
    num_tokens: int = 5,
    max_tokens: int = 8,
    deadline_s: float = 50.0,
    now_s: float = 0.0,
) -> tuple[int, ...]:
    """The blocks; none when they are not granted at once."""
    engine.take_outputs()
    engine.handle(ReserveBlocks(transfer_id, num_tokens, max_tokens, deadline_s), now_s)
    granted = [o for o in engine.take_outputs() if isinstance(o, BlocksReserved)]
    return granted[0].block_ids if granted else ()


def start_prefill(engine: Engine, *, num_prompt: int = 5, max_new: int = 3) -> StartTransfer:
    """A hand-off whose prefill's first step has run."""
    engine.handle(submit(phases=PREFILL, num_prompt=num_prompt, max_new=max_new), 0.0)
    run_step(engine, 1.0)
    [start] = [o for o in engine.take_outputs() if isinstance(o, StartTransfer)]
    return start


# One worker for both phases.


def test_a_request_runs_from_prompt_to_its_last_token() -> None:
    engine = make_engine()
    engine.handle(submit(num_prompt=5, max_new=3), 1.0)
    run_step(engine, 2.0)
    assert outputs_of(engine) == [
        PrefillStarted(key("r1"), 1.0),
        TokensGenerated(key("r1"), (50,), 5, None, 0.0),
    ]
    run_step(engine, 3.0)
    run_step(engine, 4.0)
    assert outputs_of(engine) == [
        TokensGenerated(key("r1"), (50,), 6),
        TokensGenerated(key("r1"), (50,), 7, FinishReason.LENGTH),
    ]
    assert run_step(engine, 5.0) is None
    assert_empty(engine)


def test_a_prompt_longer_than_the_budget_takes_steps_and_then_yields_one_token() -> None:
    engine = make_engine()
    engine.handle(submit(num_prompt=40, max_new=2), 0.0)
    ends = [plan.slices[0].end for plan in (run_step(engine, float(i)) for i in range(3)) if plan]
    assert ends == [16, 32, 40]
    [started, tokens] = outputs_of(engine)
    assert started == PrefillStarted(key("r1"), 0.0)
    assert tokens == TokensGenerated(key("r1"), (50,), 40, None, 2.0)


@pytest.mark.parametrize(("max_new", "token"), [(1, 50), (3, STOP_TOKEN)])
def test_the_first_token_may_be_the_last(max_new: int, token: int) -> None:
    engine = make_engine()
    engine.handle(submit(max_new=max_new), 0.0)
    run_step(engine, 0.0, token)
    reason = FinishReason.STOP if token == STOP_TOKEN else FinishReason.LENGTH
    assert outputs_of(engine, TokensGenerated) == [TokensGenerated(key("r1"), (token,), 5, reason, 0.0)]
    assert_empty(engine)


def test_a_row_without_usable_logits_fails_alone() -> None:
    engine = make_engine()
    engine.handle(submit("r1"), 0.0)
    engine.handle(submit("r2"), 0.0)
    run_step(engine, 0.0, lambda index: NO_TOKEN if index == 0 else 50)
    outputs = outputs_of(engine, RequestFailed, TokensGenerated)
    assert outputs == [
        TokensGenerated(key("r2"), (50,), 5, None, 0.0),
        RequestFailed(
            key("r1"), FailureCode.INTERNAL, "the model computed no usable logits for its next token"
        ),
    ]


def test_a_step_that_breaks_fails_its_own_sequences_and_frees_their_blocks() -> None:
    engine = make_engine(num_blocks=4)
    engine.handle(submit("r1"), 0.0)
    engine.handle(submit("r2"), 0.0)
    # It has to wait for blocks.
    engine.handle(submit("r3"), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    engine.fail_step(plan, "broke", 0.0)
    failed = [o.key for o in outputs_of(engine, RequestFailed) if isinstance(o, RequestFailed)]
    assert failed == [key("r1"), key("r2")]
    engine.check_invariants()
    assert engine.block_counts().free == 4
    assert run_step(engine, 1.0) is not None


def test_a_transfer_that_waits_gets_what_a_broken_step_frees() -> None:
    engine = make_engine(num_blocks=2)
    engine.handle(submit("r1"), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    assert reserve(engine, "t9") == ()
    engine.fail_step(plan, "broke", 0.0)
    assert [type(o) for o in outputs_of(engine)] == [RequestFailed, BlocksReserved]


def test_an_aborted_request_says_no_more() -> None:
    engine = make_engine()
    for name in ("waiting", "prefill", "decode"):
        engine.handle(submit(name, num_prompt=5), 0.0)
        if name != "waiting":
            run_step(engine, 0.0)
        if name == "decode":
            run_step(engine, 0.0)
        engine.take_outputs()
        engine.handle(Abort(key(name)), 0.0)
        assert outputs_of(engine) == []
        assert_empty(engine)
    engine.handle(Abort(key("unknown")), 0.0)
    assert outputs_of(engine) == []


# What is refused.


@pytest.mark.parametrize(
    ("engine_phases", "request_", "code", "reason"),
    [
        (BOTH, submit(num_prompt=0), FailureCode.INVALID, "the prompt is empty"),
        (
            BOTH,
            submit(num_prompt=60, max_new=5),
            FailureCode.INVALID,
            "65 tokens with the output; the context holds 64",
        ),
        (
            BOTH,
            submit(num_prompt=30, max_new=3),
            FailureCode.INVALID,
            "needs 9 KV blocks; the pool has 8",
        ),
        (
            DECODE,
            submit(phases=PREFILL),
            FailureCode.INTERNAL,
            "asked for {prefill}; serves {decode}",
        ),
        (
            BOTH,
            replace(submit(phases=PREFILL), handoff=None),
            FailureCode.INVALID,
            "{prefill} alone needs a hand-off",
        ),
        (
            BOTH,
            replace(submit(phases=DECODE), handoff=None),
            FailureCode.INVALID,
            "{decode} alone needs a hand-off",
        ),
        (
            BOTH,
            submit(phases=BOTH, transfer_id="t1"),
            FailureCode.INVALID,
            "prefill and decode on one worker take no hand-off",
        ),
        (
            BOTH | {Phase.ENCODE},
            submit(phases=frozenset({Phase.ENCODE})),
            FailureCode.INVALID,
            "{encode} yields no token; ask for prefill or decode",
        ),
        (
            BOTH,
            replace(submit(), phases=frozenset()),
            FailureCode.INTERNAL,
            "asked for {}; serves {decode, prefill}",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(
    engine_phases: PhaseSet, request_: Submit, code: FailureCode, reason: str
) -> None:
    engine = make_engine(engine_phases, num_blocks=8)
    engine.handle(request_, 0.0)
    assert failure(engine) == (code, reason)
    assert_empty(engine)


def test_a_prefill_worker_needs_blocks_for_the_prompt_alone() -> None:
    engine = make_engine(PREFILL, num_blocks=2)
    engine.handle(submit(phases=PREFILL, num_prompt=8, max_new=30), 0.0)
    assert outputs_of(engine) == []


def test_one_request_more_than_may_wait_is_refused_as_overloaded() -> None:
    engine = make_engine()
    for i in range(CONFIG.max_waiting_requests - 1):
        engine.handle(submit(f"r{i}"), 0.0)
    engine.handle(submit("kv", DECODE), 0.0)
    assert engine.num_waiting == CONFIG.max_waiting_requests
    engine.handle(submit("more"), 0.0)
    code, reason = failure(engine)
    assert (code, code.is_retryable, reason) == (
        FailureCode.OVERLOADED,
        True,
        "6 requests are waiting already",
    )
    engine.handle(Abort(key("kv")), 0.0)
    engine.handle(submit("more"), 0.0)
    assert outputs_of(engine, RequestFailed) == []


def test_the_same_attempt_twice_is_refused_and_the_first_goes_on() -> None:
    engine = make_engine()
    engine.handle(submit("r1"), 0.0)
    engine.handle(submit("r1"), 0.0)
    assert failure(engine) == (FailureCode.INVALID, "this attempt is already running here")
    assert run_step(engine, 0.0) is not None


@pytest.mark.parametrize("phases", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_transfer_id_is_used_once(phases: PhaseSet) -> None:
    engine = make_engine()
    engine.handle(submit("r1", PREFILL, transfer_id="t1"), 0.0)
    engine.handle(submit("r2", phases, transfer_id="t1"), 0.0)
    assert failure(engine) == (FailureCode.INVALID, "transfer t1 is in use here")
    run_step(engine, 0.0)
    engine.handle(Abort(key("r1")), 0.0)
    engine.take_outputs()
    # Its blocks are still the transfer's.
    engine.handle(submit("r3", phases, transfer_id="t1"), 0.0)
    assert failure(engine) == (FailureCode.INVALID, "transfer t1 is in use here")


# Deadlines.


def test_a_request_past_its_deadline_fails_wherever_it_is() -> None:
    engine = make_engine()
    engine.handle(submit("running", timeout_s=10.0), 0.0)
    run_step(engine, 0.0)
    engine.handle(submit("queued", timeout_s=10.0), 0.0)
    engine.handle(submit("kv", DECODE, timeout_s=10.0), 0.0)
    engine.take_outputs()
    engine.expire(9.9)
    assert outputs_of(engine) == []
    engine.expire(10.0)
    failed = [o for o in outputs_of(engine) if isinstance(o, RequestFailed)]
    assert {o.key for o in failed} == {key("running"), key("queued"), key("kv")}
    assert {o.code for o in failed} == {FailureCode.DEADLINE}
    assert_empty(engine)


def test_the_next_deadline_is_never_later_than_the_first_thing_to_expire() -> None:
    engine = make_engine()
    assert engine.next_deadline_s() is None
    engine.handle(submit("r1", timeout_s=10.0), 0.0)
    engine.handle(submit("r2", timeout_s=30.0), 0.0)
    assert engine.next_deadline_s() == 10.0
    engine.handle(Abort(key("r1")), 0.0)
    # What it stood for is gone: to expire then finds nothing, and moves it on.
    engine.expire(10.0)
    assert outputs_of(engine) == []
    assert engine.next_deadline_s() == 30.0
    engine.handle(Abort(key("r2")), 0.0)
    engine.expire(30.0)
    assert engine.next_deadline_s() is None


def test_prompts_that_came_later_do_not_overtake_a_reservation() -> None:
    engine = make_engine(num_blocks=4)
    engine.handle(submit("before"), 0.0)
    run_step(engine, 0.0)
    assert reserve(engine, "big", max_tokens=16) == ()
    # There is room for it, but it would never end that way: another would come, and another.
    engine.handle(submit("later"), 1.0)
    for _ in range(2):
        run_step(engine, 1.0)
    assert [type(o) for o in outputs_of(engine)][-1] is BlocksReserved
    assert engine.num_waiting == 1
    engine.handle(ReleaseTransfer("big", tuple(engine._incoming.leased_block_ids()), "over"), 2.0)
    run_step(engine, 2.0)
    assert engine.num_waiting == 0


@given(
    begun=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=3),
    num_steps=st.integers(0, 6),
    reserved=st.integers(0, 16),
    growth_reserve=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_what_has_room_by_what_is_told_begins_with_the_next_step(
    begun: list[tuple[int, int]], num_steps: int, reserved: int, growth_reserve: float
) -> None:
    engine = make_engine(config=replace(CONFIG, growth_reserve=growth_reserve))
    for number, (num_prompt, max_new) in enumerate(begun):
        engine.handle(submit(f"r{number}", num_prompt=num_prompt, max_new=max_new), 0.0)
    for _ in range(num_steps):
        if not run_step(engine, 0.0):
            break
    if reserved:
        reserve(engine, max_tokens=4 * reserved, num_tokens=1)
    room = engine.room_tokens()
    if engine.num_waiting or not room:
        return
    engine.handle(submit("new", num_prompt=room - room // 2, max_new=max(1, room // 2)), 1.0)
    assert engine.schedule(1.0) is not None
    assert engine.num_waiting == 0
    engine.check_invariants()


def test_there_is_no_room_without_a_place_and_while_kv_waits_for_blocks() -> None:
    engine = make_engine()
    assert engine.room_tokens() == 64
    assert len(reserve(engine, max_tokens=32)) == 8
    assert engine.room_tokens() == 32
    # Prompts do not pass it, whatever is free.
    assert reserve(engine, "big", max_tokens=36) == ()
    assert engine.room_tokens() == 0
    engine.handle(CancelReservation("big"), 0.0)
    assert engine.room_tokens() == 32
    for number in range(3):
        reserve(engine, f"t{number}", max_tokens=4)
    assert engine.block_counts().free == 5
    assert engine.room_tokens() == 0


def test_a_reservation_that_waits_too_long_is_refused_and_the_next_one_moves_up() -> None:
    engine = make_engine(num_blocks=4)
    assert len(reserve(engine, "t0", max_tokens=8)) == 2
    # The first in line needs more than is free, and nobody overtakes it.
    assert reserve(engine, "big", max_tokens=16, deadline_s=5.0) == ()
    assert reserve(engine, "small", max_tokens=8, deadline_s=9.0) == ()
    engine.expire(5.0)
    outputs = outputs_of(engine)
    assert outputs[0] == ReservationRefused("big", "no blocks came free in time", True)
    assert [type(o) for o in outputs] == [ReservationRefused, BlocksReserved]


# Prefill here, decode elsewhere.


def test_prefill_tells_its_transfer_what_to_send_and_when() -> None:
    engine = make_engine(PREFILL)
    engine.handle(submit(phases=PREFILL, num_prompt=18, max_new=6, timeout_s=60.0), 0.0)
    plan = engine.schedule(2.0)
    assert plan is not None
    started, start = outputs_of(engine)
    assert isinstance(started, PrefillStarted)
    assert isinstance(start, StartTransfer)
    assert (start.transfer_id, start.decode_address, start.decode_incarnation) == ("t-r1", "d:1", 3)
    assert (start.num_tokens, start.max_tokens, start.timeout_s) == (18, 24, 58.0)
    assert len(start.block_ids) == blocks_needed(18, CONFIG.block_size)
    assert engine.kv_ready(plan, 0, 2) == [KvReady("t-r1", 0, 2, 0, 16)]
    engine.complete(plan, StepResult([]), 3.0)
    plan = engine.schedule(3.0)
    assert plan is not None
    assert engine.kv_ready(plan, 0, 2) == [KvReady("t-r1", 0, 2, 16, 18)]
    engine.complete(plan, StepResult([50]), 4.0)
    assert outputs_of(engine) == [
        TokensGenerated(key("r1"), (50,), 18, None, 2.0),
        FinishTransfer("t-r1", (50,)),
    ]
    assert engine.num_running == 0
    assert engine.num_leases == 1
    engine.check_invariants()


def test_blocks_come_back_by_the_transfers_word_alone() -> None:
    engine = make_engine(PREFILL)
    start = start_prefill(engine)
    engine.handle(Abort(key("r1")), 2.0)
    assert outputs_of(engine) == [EndTransfer("t-r1", "aborted")]
    engine.check_invariants()
    assert engine.block_counts().leased == len(start.block_ids)
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "aborted"), 3.0)
    engine.handle(TransferFailed("t-r1", "aborted"), 3.0)
    assert outputs_of(engine) == []
    assert_empty(engine)


def test_a_handed_off_request_ends_with_the_report_of_its_transfer() -> None:
    engine = make_engine(PREFILL)
    start = start_prefill(engine)
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "committed"), 2.0)
    assert outputs_of(engine) == []
    engine.handle(TransferSent("t-r1", REPORT), 2.0)
    assert outputs_of(engine) == [TransferSent("t-r1", REPORT).event(key("r1"))]
    assert_empty(engine)


def test_a_transfer_that_fails_after_prefill_fails_the_request() -> None:
    engine = make_engine(PREFILL)
    start = start_prefill(engine)
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "no such peer"), 2.0)
    engine.handle(TransferFailed("t-r1", "no such peer"), 2.0)
    assert outputs_of(engine) == [RequestFailed(key("r1"), FailureCode.TRANSFER, "no such peer")]
    assert_empty(engine)


def test_a_transfer_that_ends_before_prefill_does_ends_the_request() -> None:
    engine = make_engine(PREFILL)
    start = start_prefill(engine, num_prompt=30)
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "no such peer"), 2.0)
    assert outputs_of(engine) == [RequestFailed(key("r1"), FailureCode.TRANSFER, "no such peer")]
    engine.handle(TransferFailed("t-r1", "no such peer"), 2.0)
    assert outputs_of(engine) == []
    assert_empty(engine)


@pytest.mark.parametrize(("max_new", "token"), [(1, 50), (3, STOP_TOKEN)])
def test_a_first_token_that_is_the_last_ends_the_transfer(max_new: int, token: int) -> None:
    engine = make_engine(PREFILL)
    engine.handle(submit(phases=PREFILL, max_new=max_new), 0.0)
    run_step(engine, 0.0, token)
    [_, start, tokens, end] = outputs_of(engine)
    assert isinstance(start, StartTransfer)
    assert isinstance(tokens, TokensGenerated)
    assert tokens.finish_reason is not None
    assert end == EndTransfer("t-r1", f"finished: {tokens.finish_reason}")
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "aborted"), 1.0)
    engine.handle(TransferFailed("t-r1", "aborted"), 1.0)
    assert outputs_of(engine) == []
    assert_empty(engine)


def test_an_unknown_or_doubled_release_changes_nothing() -> None:
    engine = make_engine(PREFILL)
    start = start_prefill(engine)
    engine.handle(ReleaseTransfer("unknown", (0, 1), "?"), 2.0)
    engine.check_invariants()
    assert engine.num_leases == 1
    for _ in range(2):
        engine.handle(ReleaseTransfer("t-r1", start.block_ids, "committed"), 2.0)
        engine.check_invariants()
    assert engine.num_leases == 0


# Prefill elsewhere, decode here.


def test_kv_that_arrives_is_decoded_from_the_token_it_came_with() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE, num_prompt=5, max_new=3), 0.0)
    blocks = reserve(engine)
    assert len(blocks) == 2
    engine.handle(CommitTransfer("t-r1", blocks, (50,), DIGEST), 1.0)
    plan = run_step(engine, 1.0, 51)
    assert plan is not None
    assert [(part.start, part.end) for part in plan.slices] == [(5, 6)]
    run_step(engine, 2.0, 52)
    assert outputs_of(engine) == [
        TokensGenerated(key("r1"), (51,), 6),
        TokensGenerated(key("r1"), (52,), 7, FinishReason.LENGTH),
    ]
    assert_empty(engine)


def test_kv_may_arrive_before_its_request() -> None:
    engine = make_engine(DECODE)
    blocks = reserve(engine)
    engine.handle(CommitTransfer("t-r1", blocks, (50,), DIGEST), 1.0)
    assert (engine.num_leases, engine.num_running) == (1, 0)
    engine.check_invariants()
    engine.handle(submit(phases=DECODE), 2.0)
    assert (engine.num_leases, engine.num_running) == (0, 1)
    engine.check_invariants()


def test_kv_that_nobody_claims_is_freed_and_its_request_is_told_when_it_comes() -> None:
    engine = make_engine(DECODE)
    blocks = reserve(engine)
    engine.handle(CommitTransfer("t-r1", blocks, (50,), DIGEST), 1.0)
    engine.expire(1.0 + CLAIM_S)
    assert_empty(engine)
    engine.handle(submit(phases=DECODE), 7.0)
    code, reason = failure(engine)
    assert (code, code.is_retryable) == (FailureCode.TRANSFER, True)
    assert reason == "its KV is not kept any more: the request came too late for it"
    # It is not remembered for ever.
    engine.expire(1.0 + 2 * CLAIM_S)
    assert engine.next_deadline_s() is None


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "token_ids", "max_new", "reason"),
    [
        (4, 8, (50,), 3, "KV of 4 tokens and 1 new ones came for a prompt of 5"),
        (5, 8, (50,), 4, "2 blocks were reserved; 9 tokens need more"),
        (5, 8, (), 3, "KV of 5 tokens and 0 new ones came for a prompt of 5"),
        (5, 8, (50, 51), 3, "KV of 5 tokens and 2 new ones came for a prompt of 5"),
        (6, 8, (50,), 3, "KV of 6 tokens and 1 new ones came for a prompt of 5"),
        (5, 8, (50,), 1, "all 1 tokens that were asked for came with its KV"),
        (6, 8, (50, 51), 2, "all 2 tokens that were asked for came with its KV"),
    ],
)
def test_kv_that_does_not_fit_its_request_is_never_used(
    num_tokens: int, max_tokens: int, token_ids: tuple[int, ...], max_new: int, reason: str
) -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE, num_prompt=5, max_new=max_new), 0.0)
    blocks = reserve(engine, num_tokens=num_tokens, max_tokens=max_tokens)
    engine.handle(CommitTransfer("t-r1", blocks, token_ids, DIGEST), 1.0)
    assert failure(engine) == (FailureCode.INTERNAL, reason)
    assert_empty(engine)


def test_kv_of_other_tokens_is_never_used() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE, num_prompt=5), 0.0)
    blocks = reserve(engine)
    engine.handle(CommitTransfer("t-r1", blocks, (50,), token_digest(range(101, 106))), 1.0)
    reason = "the KV that came is of other tokens than the request's"
    assert failure(engine) == (FailureCode.INTERNAL, reason)
    assert_empty(engine)


def test_a_transfer_asks_once() -> None:
    engine = make_engine(DECODE, num_blocks=4)
    in_use = ("this transfer id is in use here already", False)
    blocks = reserve(engine, "t-r1", max_tokens=16)
    reserve_again = ReserveBlocks("t-r1", 5, 8, 50.0)
    engine.handle(reserve_again, 0.0)
    assert refusal(engine) == in_use
    assert reserve(engine, "waits") == ()
    engine.handle(ReserveBlocks("waits", 5, 8, 50.0), 0.0)
    assert refusal(engine) == in_use
    engine.handle(CommitTransfer("t-r1", blocks, (50,), DIGEST), 0.0)
    engine.handle(reserve_again, 0.0)
    assert refusal(engine) == in_use
    # A sequence that runs must never be handed a second set of blocks.
    engine.handle(submit(phases=DECODE, num_prompt=5), 0.0)
    engine.handle(reserve_again, 0.0)
    assert refusal(engine) == in_use


def test_a_reservation_that_can_never_be_granted_is_refused_at_once() -> None:
    engine = make_engine(DECODE, num_blocks=4)
    engine.handle(ReserveBlocks("t1", 5, 17, 50.0), 0.0)
    assert refusal(engine) == ("needs 5 KV blocks; the pool has 4", False)
    engine.handle(ReserveBlocks("t1", 5, 8, 1.0), 1.0)
    assert refusal(engine) == ("its deadline has passed", False)
    short = make_engine(DECODE, num_blocks=16, max_context_tokens=16)
    short.handle(ReserveBlocks("t1", 5, 17, 50.0), 0.0)
    assert refusal(short) == ("needs 5 KV blocks; a sequence has at most 4", False)
    prefill_only = make_engine(PREFILL)
    prefill_only.handle(ReserveBlocks("t1", 5, 8, 50.0), 0.0)
    assert refusal(prefill_only) == ("this worker serves {prefill}, not decode", False)


def test_one_transfer_more_than_may_wait_is_refused() -> None:
    engine = make_engine(DECODE, num_blocks=4)
    reserve(engine, "t0", max_tokens=16)
    for i in range(CONFIG.max_waiting_requests):
        reserve(engine, f"w{i}")
    engine.handle(ReserveBlocks("more", 5, 8, 50.0), 0.0)
    assert refusal(engine) == ("6 transfers wait for blocks already", True)


def test_a_cancelled_reservation_gets_no_answer_and_lets_the_next_one_pass() -> None:
    engine = make_engine(DECODE, num_blocks=4)
    reserve(engine, "t0", max_tokens=8)
    assert reserve(engine, "big", max_tokens=16) == ()
    assert reserve(engine, "small") == ()
    engine.handle(CancelReservation("big"), 1.0)
    [granted] = outputs_of(engine)
    assert isinstance(granted, BlocksReserved)
    assert granted.transfer_id == "small"


def test_an_abort_while_blocks_are_granted_waits_for_the_transfer() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE), 0.0)
    blocks = reserve(engine)
    engine.handle(Abort(key("r1")), 1.0)
    assert outputs_of(engine) == [EndTransfer("t-r1", "aborted")]
    assert engine.block_counts().leased == len(blocks)
    # The commit was on its way already.
    engine.handle(CommitTransfer("t-r1", blocks, (50,), DIGEST), 1.0)
    assert_empty(engine)


def test_an_abort_while_its_reservation_waits_answers_the_reservation() -> None:
    engine = make_engine(DECODE, num_blocks=2)
    reserve(engine, "t0")
    engine.handle(submit(phases=DECODE), 0.0)
    assert reserve(engine, "t-r1") == ()
    engine.handle(Abort(key("r1")), 1.0)
    assert outputs_of(engine) == [
        EndTransfer("t-r1", "aborted"),
        ReservationRefused("t-r1", "the request was aborted here", False),
    ]
    engine.handle(CancelReservation("t-r1"), 1.0)
    assert outputs_of(engine) == []


def test_a_transfer_whose_request_is_over_gets_no_blocks() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE), 0.0)
    engine.handle(Abort(key("r1")), 1.0)
    engine.handle(ReserveBlocks("t-r1", 5, 8, 50.0), 2.0)
    assert refusal(engine) == ("the request was aborted here", False)
    assert_empty(engine)


def test_kv_on_its_way_keeps_its_place_in_the_batch() -> None:
    engine = make_engine(num_blocks=40)
    granted = [reserve(engine, f"t{i}") for i in range(2)]
    for i in range(4):
        engine.handle(submit(f"r{i}"), 0.0)
    run_step(engine, 0.0)
    # Four places, two of them kept.
    assert (engine.num_running, engine.num_waiting) == (2, 2)
    assert reserve(engine, "t2") == ()
    for i, blocks in enumerate(granted):
        engine.handle(CommitTransfer(f"t{i}", blocks, (50,), DIGEST), 0.0)
        engine.handle(submit(f"d{i}", DECODE, transfer_id=f"t{i}"), 0.0)
    assert engine.num_running == CONFIG.max_running_sequences
    engine.check_invariants()


def test_a_released_reservation_leaves_the_request_waiting_for_its_deadline() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE, timeout_s=9.0), 0.0)
    blocks = reserve(engine)
    engine.handle(ReleaseTransfer("t-r1", blocks, "the sender is gone"), 1.0)
    # Its owner hears of the failure from the prefill worker, and aborts; at worst this ends it.
    assert outputs_of(engine) == []
    engine.expire(9.0)
    assert failure(engine)[0] is FailureCode.DEADLINE
    assert_empty(engine)


# The prefix cache and its events.


def cached_engine(phases: PhaseSet = BOTH, **options: int) -> Engine:
    return make_engine(phases, config=replace(CONFIG, is_prefix_cache_on=True), **options)


def test_cached_blocks_of_a_hand_off_are_sent_with_its_first_chunk() -> None:
    engine = cached_engine(PREFILL, num_blocks=32)
    for name in ("r1", "r2"):
        engine.handle(submit(name, phases=PREFILL, num_prompt=10), 0.0)
        plan = engine.schedule(0.0)
        assert plan is not None
        ready = engine.kv_ready(plan, 0, 2)
        assert [(one.token_lo, one.token_hi) for one in ready] == [(0, 10)]
        engine.complete(plan, StepResult([50]), 0.0)
        engine.check_invariants()
    # Two whole blocks and, in a copy, a part of the third are known to the second one.
    assert [(part.start, part.end) for part in plan.chunks] == [(8, 10)]
    first, second = outputs_of(engine, StartTransfer)
    assert isinstance(first, StartTransfer)
    assert isinstance(second, StartTransfer)
    assert first.block_ids[:2] == second.block_ids[:2]
    for start in (first, second):
        engine.handle(ReleaseTransfer(start.transfer_id, start.block_ids, "sent"), 1.0)
        engine.handle(TransferSent(start.transfer_id, REPORT), 1.0)
    assert_empty(engine)
    assert engine.block_counts().cached == 2


def test_kv_that_arrived_is_found_by_prompts_that_begin_alike() -> None:
    engine = cached_engine(BOTH)
    block_ids = reserve(engine, num_tokens=9, max_tokens=12)
    engine.handle(submit(phases=DECODE, num_prompt=9), 1.0)
    engine.handle(CommitTransfer("t-r1", block_ids, (50,), token_digest(range(100, 109))), 1.0)
    engine.handle(submit("r2", num_prompt=10), 1.0)
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert [(part.start, part.end) for part in plan.chunks] == [(8, 10)]


def test_whoever_subscribes_is_told_what_is_cached_and_what_changes() -> None:
    engine = cached_engine(num_blocks=3)
    engine.handle(submit("r1", num_prompt=8, max_new=1), 0.0)
    run_step(engine, 0.0)
    assert outputs_of(engine, KvBlocksStored) == []
    engine.handle(SubscribeKvEvents(), 0.0)
    stored = outputs_of(engine, KvBlocksStored)
    # One after the other, in one event.
    assert [len(one.hashes) for one in stored if isinstance(one, KvBlocksStored)] == [2]
    engine.handle(replace(submit("r2", num_prompt=8, max_new=1), cache_salt="other"), 0.0)
    run_step(engine, 0.0)
    outputs = outputs_of(engine, KvBlocksStored, KvBlocksRemoved)
    assert [len(one.hashes) for one in outputs if isinstance(one, KvBlocksStored)] == [2]
    removed = [name for one in outputs if isinstance(one, KvBlocksRemoved) for name in one.hashes]
    assert set(removed) <= {name for one in stored if isinstance(one, KvBlocksStored) for name in one.hashes}
    assert removed


def test_a_step_that_fails_leaves_nothing_in_the_cache() -> None:
    engine = cached_engine()
    engine.handle(SubscribeKvEvents(), 0.0)
    engine.handle(submit("r1", num_prompt=8), 0.0)
    engine.handle(submit("r2", num_prompt=8), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    assert len(plan.chunks) == 2
    engine.fail_step(plan, "broke", 0.0)
    assert outputs_of(engine, KvBlocksStored, KvBlocksRemoved) == []
    assert engine.block_counts().cached == 0
    assert_empty(engine)


def test_a_step_that_fails_takes_those_along_who_began_without_a_chunk() -> None:
    """They rely on blocks that the step was to compute."""
    engine = Engine(
        replace(CONFIG, token_budget=10, is_prefix_cache_on=True),
        BOTH,
        num_blocks=16,
        max_context_tokens=64,
        claim_s=CLAIM_S,
        attention_tokens=4.0,
    )
    engine.handle(submit("r1", num_prompt=8), 0.0)
    engine.handle(submit("r2", num_prompt=9), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    # Behind the eight tokens that it shares a token costs three, and two are left.
    assert [part.sequence.key for part in plan.chunks] == [key("r1")]
    assert [one.key for one in plan.admitted] == [key("r1"), key("r2")]
    engine.fail_step(plan, "broke", 0.0)
    failed = [one.key for one in outputs_of(engine, RequestFailed) if isinstance(one, RequestFailed)]
    assert failed == [key("r1"), key("r2")]
    assert_empty(engine)


# Room to grow.


def test_kv_that_arrives_leaves_room_for_what_running_requests_may_generate() -> None:
    engine = make_engine(BOTH, num_blocks=4)
    engine.handle(submit("r1", num_prompt=4, max_new=8), 0.0)
    run_step(engine, 0.0)
    # Two blocks are free or, in time, those of r1.
    assert reserve(engine, "t", num_tokens=4, max_tokens=8) == ()
    while engine.num_running:
        run_step(engine, 0.0)
    assert [type(one) for one in outputs_of(engine, BlocksReserved)] == [BlocksReserved]
    assert engine.num_preemptions == 0


CAUTIOUS = CautiousDecoding(max_branches=2, max_branch_tokens=2)


def branching_engine(
    decoding: CautiousDecoding, branches: tuple[tuple[int, float], ...], **options: int
) -> Engine:
    """A request whose second token is uncertain."""
    engine = make_engine(BOTH, **options)
    request = submit("r1", num_prompt=5, max_new=8)
    engine.handle(replace(request, sampling=replace(request.sampling, decoding=decoding)), 0.0)
    run_step(engine, 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    engine.complete(plan, StepResult([branches[0][0]], {0: RowDetail(branches=branches)}), 0.0)
    engine.check_invariants()
    return engine


def test_a_superposed_decoding_begins_when_there_are_blocks_for_all_of_it() -> None:
    """Preempted it loses all, so with too few blocks it would begin again and again."""
    engine = make_engine(BOTH, config=replace(CONFIG, growth_reserve=0.0), num_blocks=4)
    block_ids = reserve(engine, "t", num_tokens=4, max_tokens=8)
    request = submit("r1", num_prompt=4, max_new=8)
    superposed = replace(request.sampling, decoding=SuperposedDecoding(1))
    engine.handle(replace(request, sampling=superposed), 0.0)
    assert engine.schedule(0.0) is None
    engine.handle(ReleaseTransfer("t", block_ids, "gone"), 0.0)
    for _ in range(8):
        plan = engine.schedule(0.0)
        assert plan is not None
        engine.complete(plan, StepResult([50], {0: RowDetail(top=((50, -0.1), (51, -2.0), (52, -3.0)))}), 0.0)
    assert engine.num_preemptions == 0
    assert_empty(engine)


def test_branches_leave_room_for_what_other_requests_may_generate() -> None:
    decoding = replace(CAUTIOUS, max_branch_tokens=6)
    engine = make_engine(BOTH, num_blocks=8)
    engine.handle(submit("r2", num_prompt=4, max_new=12), 0.0)
    request = submit("r1", num_prompt=5, max_new=8)
    engine.handle(replace(request, sampling=replace(request.sampling, decoding=decoding)), 0.0)
    run_step(engine, 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    assert len(plan.decodes) == 2
    index = [one.key for one in plan.decodes].index(key("r1"))
    details = {index: RowDetail(branches=((50, -0.1), (51, -0.1)))}
    engine.complete(plan, StepResult([50, 50], details), 0.0)
    assert not any(one.parent for one in engine._batch.running())
    while engine.num_running:
        run_step(engine, 0.0)
    assert engine.num_preemptions == 0


def test_branches_that_end_with_their_first_token_need_no_copies() -> None:
    """The originals are free then, and may be written to by whoever gets them before the next step."""
    engine = branching_engine(replace(CAUTIOUS, max_branch_tokens=1), ((50, -0.5), (51, -0.1)))
    [*_, generated] = outputs_of(engine, TokensGenerated)
    assert isinstance(generated, TokensGenerated)
    assert generated.token_ids == (51,)
    plan = engine.schedule(0.0)
    assert plan is not None
    assert (plan.copies, len(plan.decodes)) == ({}, 1)


def test_a_sequence_that_ends_by_one_branch_gets_no_tokens_of_another() -> None:
    engine = branching_engine(CAUTIOUS, ((50, -9.0), (51, -0.01)))
    plan = engine.schedule(0.0)
    assert plan is not None
    assert len(plan.decodes) == 2
    engine.take_outputs()
    # The second one's end makes the first one hopeless.
    engine.complete(plan, StepResult([NO_TOKEN, STOP_TOKEN], {0: RowDetail(), 1: RowDetail()}), 0.0)
    assert [type(one) for one in outputs_of(engine)] == [RequestFailed]
    assert_empty(engine)


def test_superposed_drafts_need_the_row_of_the_prompts_end_on_the_decode_worker() -> None:
    superposed = replace(submit().sampling, decoding=SuperposedDecoding(2), max_new_tokens=1)
    engine = make_engine(PREFILL)
    engine.handle(replace(submit(phases=PREFILL), sampling=superposed), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    engine.complete(plan, StepResult([50], {0: RowDetail(top=((50, -0.1), (51, -2.0)))}), 0.0)
    # No token: the drafts come from the other worker.
    assert [type(one) for one in outputs_of(engine)] == [PrefillStarted, StartTransfer, FinishTransfer]

    engine = make_engine(DECODE)
    block_ids = reserve(engine, max_tokens=6)
    engine.handle(replace(submit(phases=DECODE), sampling=superposed), 1.0)
    engine.handle(CommitTransfer("t-r1", block_ids, (50,), DIGEST), 1.0)
    plan = engine.schedule(1.0)
    assert plan is not None
    assert [(part.start, part.end, part.yields_token) for part in plan.chunks] == [(4, 5, True)]
    engine.complete(plan, StepResult([50], {0: RowDetail(top=((50, -0.1), (51, -2.0)))}), 1.0)
    [drafts] = outputs_of(engine, DraftsGenerated)
    assert isinstance(drafts, DraftsGenerated)
    assert drafts.drafts == ((50,), (51,))
    assert_empty(engine)
