"""Beginnings of prompts that come from other workers, and those that others get from here."""

from dataclasses import replace

import pytest

from tests.support.engine_fakes import (
    BOTH,
    PREFILL,
    assert_empty,
    assert_ledger,
    key,
    make_engine,
    outputs_of,
    run_step,
    submit,
)
from tests.support.kv_memory import FactPacker, KvMemory
from workers.api import Abort, EngineConfig, LedgerKind, PrefixPeer, Submit
from workers.engine import fetching
from workers.engine.block_pool import BlockPool
from workers.engine.engine import Engine
from workers.engine.fetching import PrefixFetching
from workers.engine.host_tier import HostTier
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FetchPrefix,
    FindCached,
    PrefixFetched,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
)

PEERS = (PrefixPeer("w:1", 4),)
CONFIG = EngineConfig(block_size=4, token_budget=64, max_running_sequences=4)


def engine_of(num_blocks: int = 40) -> Engine:
    return make_engine(BOTH, config=CONFIG, num_blocks=num_blocks)


def with_peers(name: str = "r1", num_prompt: int = 18) -> Submit:
    return replace(submit(name, num_prompt=num_prompt), prefix_peers=PEERS)


def wanted_by(engine: Engine, request: Submit) -> FetchPrefix:
    engine.handle(request, 0.0)
    [wanted] = outputs_of(engine, FetchPrefix)
    assert isinstance(wanted, FetchPrefix)
    return wanted


def reserved(engine: Engine, wanted: FetchPrefix, num_tokens: int) -> tuple[int, ...]:
    engine.handle(ReserveBlocks(wanted.transfer_id, num_tokens, num_tokens, 50.0), 0.0)
    [granted] = outputs_of(engine)
    assert isinstance(granted, BlocksReserved)
    return granted.block_ids


def test_a_prompt_waits_for_its_beginning_and_computes_the_rest() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    # Four whole blocks of four; the last two tokens are always computed.
    assert (wanted.peers, len(wanted.block_hashes)) == (PEERS, 4)
    assert engine.schedule(0.0) is None
    assert engine.num_waiting == 1
    blocks = reserved(engine, wanted, 12)
    engine.check_invariants()
    assert_ledger(engine, 1.0)
    [entry] = [e for e in engine.ledger(1.0).entries if e.kind is LedgerKind.RECEIVING]
    assert (entry.owner, entry.num_blocks) == (wanted.transfer_id, 3)
    engine.handle(CommitTransfer(wanted.transfer_id, blocks, (), wanted.block_hashes[2]), 1.0)
    engine.handle(PrefixFetched(wanted.transfer_id, 12), 1.0)
    engine.check_invariants()
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert [(part.start, part.end) for part in plan.chunks] == [(12, 18)]


def test_what_is_of_other_tokens_is_not_kept() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    blocks = reserved(engine, wanted, 12)
    engine.handle(CommitTransfer(wanted.transfer_id, blocks, (), b"something else"), 1.0)
    engine.handle(PrefixFetched(wanted.transfer_id, 12), 1.0)
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert [(part.start, part.end) for part in plan.chunks] == [(0, 18)]


def test_a_prompt_whose_beginning_does_not_come_is_computed() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 1.0)
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert [(part.start, part.end) for part in plan.chunks] == [(0, 18)]
    # Twice changes nothing.
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 1.0)
    engine.check_invariants()


def test_an_aborted_request_ends_its_fetch_and_the_blocks_come_back_by_the_transfers_word() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    blocks = reserved(engine, wanted, 16)
    engine.handle(Abort(key("r1")), 1.0)
    assert outputs_of(engine) == [EndTransfer(wanted.transfer_id, "aborted")]
    engine.check_invariants()
    assert engine.block_counts().leased == len(blocks)
    engine.handle(ReleaseTransfer(wanted.transfer_id, blocks, "aborted"), 1.0)
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 1.0)
    assert_empty(engine)


def test_a_fetch_that_ends_before_its_blocks_are_back_keeps_them_until_they_are() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    blocks = reserved(engine, wanted, 16)
    # As when its time is over while the blocks are on their way to it.
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 1.0)
    engine.handle(CancelReservation(wanted.transfer_id), 1.0)
    engine.check_invariants()
    assert_ledger(engine, 1.0)
    assert engine.block_counts().leased == len(blocks)
    engine.handle(ReleaseTransfer(wanted.transfer_id, blocks, "nobody waits for these blocks any more"), 1.0)
    assert engine.block_counts().leased == 0
    engine.check_invariants()
    assert run_step(engine, 1.0) is not None


def test_a_fetch_that_is_named_like_a_hand_off_is_refused() -> None:
    engine = engine_of()
    engine.handle(submit("r1", PREFILL, num_prompt=18), 0.0)
    run_step(engine, 0.0)
    outputs_of(engine)
    engine.handle(FindCached("t-r1", (b"x",), 1), 0.0)
    [refused] = outputs_of(engine)
    assert isinstance(refused, ReservationRefused)
    assert refused.reason == "this transfer id is in use here already"


def test_a_deadline_ends_a_request_that_waits_for_its_beginning() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    engine.expire(1000.0)
    assert [type(one).__name__ for one in outputs_of(engine)] == ["EndTransfer", "RequestFailed"]
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 1000.0)
    assert_empty(engine)


@pytest.mark.parametrize("num_tokens", [0, 3, 20])
def test_other_than_what_was_asked_for_is_refused(num_tokens: int) -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    engine.handle(ReserveBlocks(wanted.transfer_id, num_tokens, num_tokens, 50.0), 0.0)
    [refused] = outputs_of(engine)
    assert isinstance(refused, ReservationRefused)
    assert "not what was asked for" in refused.reason


def test_without_room_nothing_is_fetched() -> None:
    engine = engine_of(num_blocks=8)
    engine.handle(replace(submit("busy", num_prompt=25), cache_salt="another"), 0.0)
    run_step(engine, 0.0)
    outputs_of(engine)
    wanted = wanted_by(engine, with_peers())
    engine.handle(ReserveBlocks(wanted.transfer_id, 16, 16, 50.0), 0.0)
    engine.handle(CancelReservation(wanted.transfer_id), 0.0)
    [refused] = outputs_of(engine)
    assert isinstance(refused, ReservationRefused)
    assert refused.reason == "there are no blocks for it"
    engine.check_invariants()


@pytest.mark.parametrize("num_prompt", [1, 8])
def test_too_little_is_not_asked_for(num_prompt: int) -> None:
    engine = engine_of()
    engine.handle(with_peers(num_prompt=num_prompt), 0.0)
    assert outputs_of(engine, FetchPrefix) == []
    assert run_step(engine, 0.0) is not None


def test_what_is_here_is_not_asked_for() -> None:
    engine = engine_of()
    engine.handle(submit("r0", num_prompt=9), 0.0)
    while run_step(engine, 0.0) is not None:
        pass
    outputs_of(engine)
    wanted = wanted_by(engine, with_peers(num_prompt=18))
    assert len(wanted.block_hashes) == 2


def test_cached_blocks_are_lent_and_come_back() -> None:
    engine = engine_of()
    wanted = wanted_by(engine, with_peers())
    engine.handle(PrefixFetched(wanted.transfer_id, 0), 0.0)
    while run_step(engine, 0.0) is not None:
        pass
    outputs_of(engine)
    engine.handle(FindCached("f1", wanted.block_hashes, 8), 1.0)
    [found] = outputs_of(engine)
    assert isinstance(found, CachedFound)
    assert (found.num_tokens, found.block_hash) == (16, wanted.block_hashes[3])
    assert engine.block_counts().leased == 4
    engine.check_invariants()
    assert_ledger(engine, 1.0)
    engine.handle(FindCached("f1", wanted.block_hashes, 8), 1.0)
    [again] = outputs_of(engine)
    assert isinstance(again, ReservationRefused)
    engine.handle(ReleaseTransfer("f1", found.block_ids, "sent"), 1.0)
    assert engine.block_counts().leased == 0
    engine.check_invariants()


def test_too_few_blocks_are_not_lent() -> None:
    engine = engine_of()
    engine.handle(FindCached("f1", (b"x",), 4), 0.0)
    [refused] = outputs_of(engine)
    assert isinstance(refused, ReservationRefused)
    assert refused.reason == "0 tokens of it are cached here; 4 are wanted"


def test_blocks_that_a_step_is_computing_are_not_lent() -> None:
    engine = engine_of()
    request = submit("r1", num_prompt=18)
    engine.handle(request, 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    hashes = tuple(plan.chunks[0].sequence.block_hashes[1:])
    engine.handle(FindCached("f1", hashes, 4), 0.0)
    assert isinstance(outputs_of(engine)[-1], ReservationRefused)


@pytest.mark.parametrize(("num_free", "num_lent"), [(40, 20), (9, 9), (0, 0)])
def test_no_more_saved_blocks_are_checked_than_may_be_put_back(
    num_free: int, num_lent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_PUT_BACK", 20)
    memory = KvMemory(40, 4)
    tier = HostTier(memory.packer, 400 * FactPacker.block_bytes)
    names = [i.to_bytes(16, "little") for i in range(101)]
    for i in range(100):
        tier.save(0, names[i + 1], names[i], (0, 0, 0, 0))
    checked: list[object] = []
    is_whole = memory.packer.is_whole
    monkeypatch.setattr(memory.packer, "is_whole", lambda packed: checked.append(packed) or is_whole(packed))
    pool = BlockPool(40, 4, tier)
    lending = PrefixFetching(pool)
    found = lending.find(FindCached("f1", tuple(names[1:]), 4), num_kept=40 - num_free, now_s=0.0)
    assert isinstance(found, CachedFound) == (num_lent > 0)
    assert len({id(one) for one in checked}) == num_lent
    assert pool.counts().leased == num_lent
