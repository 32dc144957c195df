"""A sequence that goes on in another engine, and an engine whose phases change."""

from dataclasses import replace

import pytest

from kvtransfer.digest import token_digest
from tests.support.engine_fakes import (
    BOTH,
    CONFIG,
    DECODE,
    PREFILL,
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
    EngineConfig,
    FailureCode,
    FinishReason,
    Handoff,
    KvTransferred,
    Migrate,
    Phase,
    RequestFailed,
    Submit,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.engine.engine import Engine
from workers.engine.messages import (
    BlocksReserved,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    ReleaseTransfer,
    ReserveBlocks,
    StartTransfer,
    TransferFailed,
    TransferSent,
)

AWAY = Handoff("r1/1.1", "d:2", 4)


def decoding_engine(
    num_tokens: int = 3, config: EngineConfig = CONFIG, request: Submit | None = None
) -> Engine:
    """r1 has its prompt of 5 and so many tokens: 50, 51 and so on."""
    engine = make_engine(config=config)
    engine.handle(request or submit(max_new=10), 0.0)
    for i in range(num_tokens):
        run_step(engine, 0.0, 50 + i)
    engine.take_outputs()
    return engine


def leave(engine: Engine, num_known: int, handoff: Handoff = AWAY) -> tuple[StartTransfer, FinishTransfer]:
    engine.handle(Migrate(key("r1"), handoff, num_known), 1.0)
    engine.check_invariants()
    return what_left(engine)


def what_left(engine: Engine) -> tuple[StartTransfer, FinishTransfer]:
    start, ready, finish = outputs_of(engine, StartTransfer, KvReady, FinishTransfer)
    assert isinstance(start, StartTransfer)
    assert isinstance(ready, KvReady)
    assert isinstance(finish, FinishTransfer)
    assert (ready.token_lo, ready.token_hi) == (0, start.num_tokens)
    assert ready.transfer_id == start.transfer_id == finish.transfer_id
    return start, finish


def arrive(start: StartTransfer, finish: FinishTransfer, there: Submit) -> Engine:
    """What left comes to an engine that serves decode alone."""
    engine = make_engine(DECODE)
    engine.handle(there, 1.0)
    engine.handle(ReserveBlocks(start.transfer_id, start.num_tokens, start.max_tokens, 60.0), 1.0)
    [reserved] = outputs_of(engine, BlocksReserved)
    assert isinstance(reserved, BlocksReserved)
    engine.handle(
        CommitTransfer(start.transfer_id, reserved.block_ids, finish.token_ids, start.token_digest), 1.0
    )
    engine.check_invariants()
    return engine


def there(num_known: int, max_new: int = 10) -> Submit:
    """What the other worker is given: the prompt and the tokens that the client has."""
    request = submit(phases=DECODE, max_new=max_new - (num_known - 5), transfer_id=AWAY.transfer_id)
    tokens = (*request.token_ids, *range(50, 50 + num_known - 5))
    return replace(request, token_ids=tokens, num_delivered=num_known - 5)


@pytest.mark.parametrize("num_known", [5, 6, 8])
def test_a_sequence_goes_on_where_it_is_sent(num_known: int) -> None:
    engine = decoding_engine()
    start, finish = leave(engine, num_known)
    assert (start.decode_address, start.decode_incarnation, start.num_tokens) == ("d:2", 4, 7)
    assert start.token_digest == token_digest([*range(100, 105), 50, 51, 52][:num_known])
    assert finish.token_ids == (50, 51, 52)[num_known - 5 :]
    assert len(start.block_ids) == 2
    assert engine.num_running == 0
    assert run_step(engine, 1.0) is None

    other = arrive(start, finish, there(num_known))
    positions = []
    for i in range(7):
        run_step(other, 2.0, 53 + i)
        for event in outputs_of(other, TokensGenerated):
            assert isinstance(event, TokensGenerated)
            positions.append((event.first_position, *event.token_ids))
    assert positions == [(8 + i, 53 + i) for i in range(7)]
    assert event.finish_reason is FinishReason.LENGTH
    assert_empty(other)

    engine.handle(ReleaseTransfer(start.transfer_id, start.block_ids, "committed"), 2.0)
    engine.handle(TransferSent(start.transfer_id, REPORT), 2.0)
    [event] = outputs_of(engine, KvTransferred, RequestFailed)
    assert isinstance(event, KvTransferred)
    assert event.key == key("r1")
    assert_empty(engine)


def test_a_sequence_that_came_from_elsewhere_goes_on_again() -> None:
    start, finish = leave(decoding_engine(), 6)
    second = arrive(start, finish, there(6))
    run_step(second, 2.0, 53)
    second.take_outputs()
    again, finished = leave(second, 9, Handoff("r1/1.2", "d:3", 5))
    assert (again.transfer_id, again.num_tokens, finished.token_ids) == ("r1/1.2", 8, ())
    # The first transfer's name is free again.
    second.handle(replace(there(6), key=key("r2")), 2.0)
    assert not outputs_of(second, RequestFailed)


def test_one_whose_prompt_is_not_computed_leaves_with_its_first_token() -> None:
    engine = make_engine(config=replace(CONFIG, token_budget=4))
    engine.handle(submit(max_new=10), 0.0)
    engine.handle(Migrate(key("r1"), AWAY, 5), 0.0)
    run_step(engine, 0.0)
    assert not outputs_of(engine, StartTransfer)
    run_step(engine, 0.0)
    start, finish = what_left(engine)
    assert (start.num_tokens, finish.token_ids) == (5, (50,))


def test_one_that_tries_branches_leaves_when_the_choice_is_made() -> None:
    request = submit(max_new=10)
    cautious = CautiousDecoding(max_branches=2, min_entropy=0.0, max_branch_tokens=1)
    request = replace(request, sampling=replace(request.sampling, decoding=cautious))
    engine = decoding_engine(1, request=request)
    start, _ = leave(engine, 6)
    assert start.num_tokens == 5


def test_a_superposed_decoding_stays() -> None:
    request = submit(max_new=4)
    request = replace(request, sampling=replace(request.sampling, decoding=SuperposedDecoding(2)))
    engine = make_engine()
    engine.handle(request, 0.0)
    engine.handle(Migrate(key("r1"), AWAY, 5), 0.0)
    run_step(engine, 0.0)
    assert not outputs_of(engine, StartTransfer)


def test_one_that_does_not_arrive_fails_so_that_its_gateway_tries_anew() -> None:
    engine = decoding_engine()
    start, _ = leave(engine, 6)
    engine.handle(ReleaseTransfer(start.transfer_id, start.block_ids, "refused"), 2.0)
    engine.handle(TransferFailed(start.transfer_id, "no blocks came free in time"), 2.0)
    [failed] = outputs_of(engine, RequestFailed)
    assert failed == RequestFailed(key("r1"), FailureCode.TRANSFER, "no blocks came free in time")
    assert_empty(engine)


def test_one_that_is_aborted_on_its_way_ends_its_transfer() -> None:
    engine = decoding_engine()
    start, _ = leave(engine, 6)
    engine.handle(Abort(key("r1")), 2.0)
    [end] = outputs_of(engine, EndTransfer)
    assert end == EndTransfer("r1/1.1", "aborted")
    engine.handle(ReleaseTransfer(start.transfer_id, start.block_ids, "aborted"), 2.0)
    assert_empty(engine)


@pytest.mark.parametrize("num_known", [4, 9])
def test_tokens_that_cannot_be_known_are_refused(num_known: int) -> None:
    engine = decoding_engine()
    engine.handle(Migrate(key("r1"), AWAY, num_known), 1.0)
    [failed] = outputs_of(engine, RequestFailed)
    reason = f"num_known_tokens: is {num_known}; allowed: 5 to 8"
    assert failed == RequestFailed(key("r1"), FailureCode.INVALID, reason)
    assert_empty(engine)


def test_a_transfer_that_is_in_use_is_refused() -> None:
    engine = decoding_engine()
    engine.handle(submit("r2", PREFILL, transfer_id=AWAY.transfer_id), 1.0)
    engine.handle(Migrate(key("r1"), AWAY, 6), 1.0)
    [failed] = outputs_of(engine, RequestFailed)
    assert failed == RequestFailed(key("r1"), FailureCode.INVALID, "transfer r1/1.1 is in use here")


def test_one_that_is_not_here_is_ignored() -> None:
    engine = make_engine()
    engine.handle(Migrate(key("r1"), AWAY, 6), 1.0)
    assert not engine.take_outputs()


# Phases.


def test_a_phase_goes_when_nobody_needs_it_any_more() -> None:
    engine = decoding_engine()
    assert engine.set_phases(PREFILL, 1.0) == "1 requests here still need {decode}"
    # Nobody waits for a prompt, so that may go at once.
    assert engine.set_phases(DECODE, 1.0) is None
    assert engine.set_phases(BOTH, 1.0) is None
    start, _ = leave(engine, 6)
    # Its KV is still on its way out.
    assert engine.set_phases(PREFILL, 1.0) is None
    assert engine.work().of(frozenset(Phase)) == 0
    engine.handle(submit("r2"), 1.0)
    [failed] = outputs_of(engine, RequestFailed)
    assert failed == RequestFailed(
        key("r2"), FailureCode.INTERNAL, "asked for {decode, prefill}; serves {prefill}"
    )
    engine.handle(ReleaseTransfer(start.transfer_id, start.block_ids, "committed"), 2.0)


def test_kv_that_is_promised_is_work_for_decode() -> None:
    engine = make_engine(DECODE)
    engine.handle(ReserveBlocks("t-r1", 5, 8, 60.0), 0.0)
    engine.take_outputs()
    assert engine.set_phases(PREFILL, 0.0) == "1 requests here still need {decode}"
    # Its request is the same one, and counts once.
    engine.handle(submit(phases=DECODE), 0.0)
    assert engine.work().num_decodes == 1


def test_the_first_step_in_a_new_phase_is_told_once() -> None:
    engine = make_engine(PREFILL)
    assert engine.first_step_s is None
    engine.set_phases(BOTH, 10.0)
    engine.handle(submit(), 11.0)
    run_step(engine, 12.0)
    # Prefill was not new.
    assert engine.first_step_s is None
    run_step(engine, 13.0)
    run_step(engine, 14.0)
    assert engine.first_step_s == 3.0
    engine.set_phases(PREFILL, 20.0)
    assert engine.first_step_s is None
