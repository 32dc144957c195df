"""Who holds which blocks, by name; and blocks that nobody will give back, found whatever the pool says."""

from dataclasses import replace

import pytest

from kvtransfer.digest import token_digest
from tests.support.engine_fakes import (
    CONFIG,
    DECODE,
    PREFILL,
    assert_ledger,
    make_engine,
    outputs_of,
    run_step,
    submit,
)
from workers.api import KvLedger, LedgerEntry, LedgerKind
from workers.engine.engine import Engine
from workers.engine.ledger import MAX_NAMED_BLOCKS, ledger_text, with_leases
from workers.engine.messages import BlocksReserved, CommitTransfer, ReleaseTransfer, ReserveBlocks
from workers.engine.step_result import StepResult

NOBODYS = (LedgerKind.CACHED, LedgerKind.FREE)


def held(engine: Engine, now_s: float) -> tuple[LedgerEntry, ...]:
    """The entries of those that hold blocks or wait for some."""
    return tuple(entry for entry in assert_ledger(engine, now_s).entries if entry.kind not in NOBODYS)


def test_a_sequence_is_named_by_its_request_with_its_attempt_and_age() -> None:
    engine = make_engine()
    engine.handle(submit("r1", num_prompt=5, attempt=7), 1.0)
    assert held(engine, 1.5) == ()
    run_step(engine, 2.0)
    assert held(engine, 3.5) == (LedgerEntry("r1", LedgerKind.SEQUENCE, 2, generation=7, age_s=1.5),)


def test_blocks_that_several_hold_are_counted_once() -> None:
    engine = make_engine(config=replace(CONFIG, is_prefix_cache_on=True))
    engine.handle(submit("r1", num_prompt=9, max_new=8), 0.0)
    run_step(engine, 0.0)
    engine.handle(submit("r2", num_prompt=9, max_new=8), 1.0)
    run_step(engine, 1.0)
    first, second = held(engine, 1.0)
    assert (first.owner, first.num_blocks, first.num_shared_blocks) == ("r1", 3, 0)
    assert (second.owner, second.num_blocks, second.num_shared_blocks) == ("r2", 3, 2)


def test_a_transfer_that_sends_holds_its_blocks_after_its_sequence_has_gone() -> None:
    engine = make_engine(PREFILL)
    engine.handle(submit(phases=PREFILL), 0.0)
    run_step(engine, 1.0)
    # Prefill is over; the transfer alone holds them.
    assert held(engine, 4.0) == (
        LedgerEntry("t-r1", LedgerKind.SENDING, 2, generation=3, age_s=3.0, peer="d:1"),
    )


def test_a_transfer_that_receives_goes_from_waiting_to_unclaimed() -> None:
    engine = make_engine(DECODE, num_blocks=4)
    engine.handle(ReserveBlocks("t1", 9, 12, 50.0, "p:1", 5), 1.0)
    engine.handle(ReserveBlocks("t2", 9, 12, 50.0), 2.0)
    assert held(engine, 3.0) == (
        LedgerEntry("t1", LedgerKind.RECEIVING, 3, generation=5, age_s=2.0, peer="p:1"),
        LedgerEntry("t2", LedgerKind.WAITING, 0, age_s=1.0),
    )
    [reserved] = outputs_of(engine, BlocksReserved)
    assert isinstance(reserved, BlocksReserved)
    engine.handle(CommitTransfer("t1", reserved.block_ids, (50,), b""), 4.0)
    unclaimed, waiting = held(engine, 5.0)
    # Its age counts from the first block on, not from the commit.
    assert unclaimed == LedgerEntry("t1", LedgerKind.UNCLAIMED, 3, generation=5, age_s=4.0, peer="p:1")
    assert waiting.kind is LedgerKind.WAITING


def test_kv_that_its_request_took_over_is_the_sequences() -> None:
    engine = make_engine(DECODE)
    engine.handle(submit(phases=DECODE), 0.0)
    engine.handle(ReserveBlocks("t-r1", 5, 8, 50.0), 1.0)
    [reserved] = outputs_of(engine, BlocksReserved)
    assert isinstance(reserved, BlocksReserved)
    engine.handle(CommitTransfer("t-r1", reserved.block_ids, (50,), token_digest(range(100, 105))), 2.0)
    assert held(engine, 3.0) == (LedgerEntry("r1", LedgerKind.SEQUENCE, 2, generation=1, age_s=2.0),)


def test_leases_are_added_to_transfers_that_receive() -> None:
    receiving = LedgerEntry("t1", LedgerKind.RECEIVING, 3)
    sending = LedgerEntry("t1", LedgerKind.SENDING, 3)
    ledger = KvLedger((sending, receiving), make_engine().block_counts())
    found = with_leases(ledger, {"t1": 42, "t2": 43}).entries
    assert [entry.lease_id for entry in found] == [None, 42]
    assert [entry.lease_id for entry in with_leases(ledger, {}).entries] == [None, None]


def test_blocks_taken_behind_the_engines_back_are_leaked() -> None:
    engine = make_engine()
    engine.handle(submit("r1"), 0.0)
    run_step(engine, 0.0)
    planted = engine.pool.allocate(2)
    ledger = engine.ledger(1.0)
    assert ledger.leaked_block_ids == tuple(sorted(planted))
    assert ledger.leaked_blocks == 2
    # The pool's own counts see nothing.
    engine.pool.check_invariants()
    assert ledger.num_accounted_blocks == ledger.counts.total - 2
    assert f"leaked: {min(planted)}, {max(planted)}" in ledger_text(ledger)


def test_a_forgotten_release_is_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(PREFILL)
    engine.handle(submit(phases=PREFILL), 0.0)
    run_step(engine, 0.0)
    (sending,) = held(engine, 0.0)
    block_ids = tuple(engine._outgoing.block_ids())
    monkeypatch.setattr(engine.pool, "release", lambda _block_ids: None)
    engine.handle(ReleaseTransfer(sending.owner, block_ids, "sent"), 1.0)
    assert engine.ledger(1.0).leaked_block_ids == tuple(sorted(block_ids))


def test_a_sequence_that_leaves_its_blocks_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.handle(submit("r1", max_new=2), 0.0)
    run_step(engine, 0.0)
    (sequence,) = held(engine, 0.0)
    monkeypatch.setattr(engine.pool, "free", lambda _block_ids: None)
    assert run_step_unchecked(engine) is not None
    ledger = engine.ledger(1.0)
    assert ledger.leaked_blocks == sequence.num_blocks
    assert "held: none" in ledger_text(ledger)


def test_the_text_names_owners_and_a_few_of_many_leaked_blocks() -> None:
    engine = make_engine(num_blocks=40)
    engine.handle(submit("r1", attempt=3), 0.0)
    run_step(engine, 0.0)
    engine.pool.allocate(MAX_NAMED_BLOCKS + 1)
    text = ledger_text(engine.ledger(2.0))
    assert "sequence r1/3 2 blocks for 2.0 s" in text
    assert text.endswith(", ...")
    assert "\n" not in text


def run_step_unchecked(engine: Engine) -> object:
    """A step of an engine whose invariants do not hold."""
    plan = engine.schedule(1.0)
    assert plan is not None
    engine.complete(plan, StepResult([50] * len(plan.slices)), 1.0)
    return plan
