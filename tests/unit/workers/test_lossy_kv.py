"""KV that is near to what was computed, and not the same, is for the worker's own prompts: nobody else gets it as exact."""

from dataclasses import replace

import pytest

from kvtransfer.digest import token_digest
from tests.support.engine_fakes import BOTH, CLAIM_S, CONFIG, DECODE, PREFILL, expanded, submit
from tests.support.kv_memory import FactPacker, KvMemory
from workers.api import PhaseSet, PrefixPeer, TokensGenerated
from workers.engine.engine import Engine
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    CommitTransfer,
    FetchPrefix,
    FindCached,
    Output,
    PrefixFetched,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
)
from workers.engine.step_result import StepResult

NUM_BLOCKS = 6


class World:
    """An engine with a host tier over a memory of facts."""

    def __init__(self, phases: PhaseSet = BOTH, *, is_lossy: bool = False) -> None:
        self.memory = KvMemory(NUM_BLOCKS, CONFIG.block_size)
        self.memory.packer.is_lossy = is_lossy
        config = replace(CONFIG, is_prefix_cache_on=True, host_cache_bytes=40 * FactPacker.block_bytes)
        self.engine = Engine(
            config,
            phases,
            num_blocks=NUM_BLOCKS,
            max_context_tokens=64,
            claim_s=CLAIM_S,
            packer=self.memory.packer,
        )
        self.outputs: list[Output] = []
        self.num_requests = 0

    def take(self, kind: type) -> Output:
        """The last one of its kind."""
        self.outputs += expanded(self.engine.take_outputs())
        return next(one for one in reversed(self.outputs) if isinstance(one, kind))

    def step(self) -> bool:
        plan = self.engine.schedule(0.0)
        if plan is None:
            return False
        result: StepResult = self.memory.run(plan, lambda _n: 0, (50,))
        self.engine.complete(plan, result, 0.0)
        self.engine.check_invariants()
        return True

    def ask(self, token_ids: list[int], *, phases: PhaseSet = BOTH) -> int:
        """Tokens of a prompt that were not computed; it ends with its first token."""
        self.num_requests += 1
        request = submit(f"r{self.num_requests}", phases, max_new=2 if phases != BOTH else 1)
        self.engine.handle(replace(request, token_ids=tuple(token_ids)), 0.0)
        while self.step():
            pass
        first = self.take(TokensGenerated)
        assert isinstance(first, TokensGenerated)
        return first.num_cached_tokens

    def hashes(self, token_ids: list[int]) -> tuple[bytes, ...]:
        """Of its full blocks short of the last token, as one that wants them names them; the request goes away again."""
        self.num_requests += 1
        request = replace(
            submit(f"r{self.num_requests}", max_new=1),
            token_ids=tuple(token_ids),
            prefix_peers=(PrefixPeer("w:1", 1),),
        )
        other = Engine(
            replace(CONFIG, is_prefix_cache_on=True),
            BOTH,
            num_blocks=9,
            max_context_tokens=64,
            claim_s=CLAIM_S,
        )
        other.handle(request, 0.0)
        [wanted] = [one for one in other.take_outputs() if isinstance(one, FetchPrefix)]
        return wanted.block_hashes

    def lent(self, hashes: tuple[bytes, ...], min_tokens: int = 4) -> CachedFound | ReservationRefused:
        self.engine.handle(FindCached("f", hashes, min_tokens), 0.0)
        self.engine.check_invariants()
        self.outputs += self.engine.take_outputs()
        found = self.outputs[-1]
        assert isinstance(found, CachedFound | ReservationRefused)
        return found


def text(first: int, num_tokens: int = 18) -> list[int]:
    return list(range(first, first + num_tokens))


# Blocks of the host tier for others.


def test_evicted_blocks_are_found_and_put_back_for_others() -> None:
    world = World()
    wanted = world.hashes(text(100))
    world.ask(text(100))
    assert world.engine.count_cached(wanted) == (4, 0)
    world.ask(text(200))
    num_blocks, num_host_blocks = world.engine.count_cached(wanted)
    assert num_blocks == 4
    assert num_host_blocks > 0
    found = world.lent(wanted)
    assert isinstance(found, CachedFound)
    assert (found.num_tokens, found.block_hash) == (16, wanted[3])
    assert [fact[-1] for fact in world.memory.read(found.block_ids, 16)] == text(100, 16)
    assert world.engine.count_cached(wanted) == (4, 0)
    assert world.engine.block_counts().leased == 4
    world.engine.handle(ReleaseTransfer("f", found.block_ids, "sent"), 0.0)
    world.engine.check_invariants()
    assert world.engine.block_counts().leased == 0
    assert world.ask(text(100)) == 16


def test_what_has_no_room_in_the_pool_is_refused_and_nothing_is_held() -> None:
    world = World()
    wanted = world.hashes(text(100))
    world.ask(text(100))
    # Another takes all blocks and runs on.
    world.engine.handle(replace(submit("busy", max_new=6), token_ids=tuple(text(300))), 0.0)
    world.step()
    world.step()
    found = world.lent(wanted, min_tokens=16)
    assert isinstance(found, ReservationRefused)
    assert "no room" in found.reason
    assert world.engine.block_counts().leased == 0


def test_a_damaged_block_ends_what_is_lent() -> None:
    world = World()
    wanted = world.hashes(text(100))
    for first in (100, 200, 300):
        world.ask(text(first))
    tier = world.engine.pool._tier
    assert tier is not None
    tier._entries[wanted[1]].packed.data[0] ^= 1
    assert world.engine.count_cached(wanted) == (4, 4)
    found = world.lent(wanted)
    assert isinstance(found, CachedFound)
    assert found.num_tokens == 4
    assert world.engine.reuse_counts().num_host_corrupt == 1


# The mark.


def test_what_is_lent_ends_at_the_first_lossy_block_in_host_memory() -> None:
    world = World()
    wanted = world.hashes(text(100))
    for first in (100, 200, 300):
        world.ask(text(first))
    tier = world.engine.pool._tier
    assert tier is not None
    saved = tier._entries[wanted[2]]
    tier._entries[wanted[2]] = replace(saved, packed=replace(saved.packed, is_lossy=True))
    assert world.engine.count_cached(wanted) == (2, 2)
    found = world.lent(wanted)
    assert isinstance(found, CachedFound)
    assert found.num_tokens == 8


def test_blocks_that_were_packed_lossily_are_restored_here_and_lent_to_nobody() -> None:
    world = World(is_lossy=True)
    wanted = world.hashes(text(100))
    world.ask(text(100))
    for first in (200, 300):
        world.ask(text(first))
    assert world.engine.count_cached(wanted) == (0, 0)
    assert isinstance(world.lent(wanted), ReservationRefused)
    assert world.ask(text(100)) == 16
    # In the pool again, and still not what was computed.
    assert world.engine.count_cached(wanted) == (0, 0)
    assert isinstance(world.lent(wanted), ReservationRefused)
    assert world.ask(text(100)) >= 16


def test_what_is_computed_after_lossy_blocks_is_lent_to_nobody() -> None:
    world = World(is_lossy=True)
    longer = text(100, 22)
    wanted = world.hashes(longer)
    world.ask(text(100, 10))
    for first in (200, 300):
        world.ask(text(first))
    assert world.ask(longer) == 8
    assert len(wanted) == 5
    assert world.engine.count_cached(wanted) == (0, 0)
    # It is kept for prompts of this worker.
    assert world.ask(longer) >= 20


def test_a_mark_outlives_a_tier_that_would_keep_it_exactly() -> None:
    world = World(is_lossy=True)
    wanted = world.hashes(text(100))
    for first in (100, 200, 300, 100):
        world.ask(text(first))
    world.memory.packer.is_lossy = False
    tier = world.engine.pool._tier
    assert tier is not None
    # Dropped from the tier while they are in the pool, and saved anew.
    for name in wanted:
        tier._drop(name)
    for first in (200, 300):
        world.ask(text(first))
    assert world.engine.count_cached(wanted) == (0, 0)


@pytest.mark.parametrize("is_lossy", [False, True])
@pytest.mark.parametrize("is_restored_before", [False, True])
def test_a_hand_off_of_lossy_kv_says_so(is_lossy: bool, is_restored_before: bool) -> None:
    world = World(BOTH, is_lossy=is_lossy)
    for first in (100, 200, 300):
        world.ask(text(first))
    if is_restored_before:
        # Its blocks are in the pool then.
        world.ask(text(100))
    request = submit("h", PREFILL, max_new=2)
    world.engine.handle(replace(request, token_ids=tuple(text(100))), 0.0)
    world.step()
    start = world.take(StartTransfer)
    assert isinstance(start, StartTransfer)
    assert (start.token_digest == token_digest(text(100))) == (not is_lossy)


@pytest.mark.parametrize("is_lossy", [False, True])
def test_kv_that_came_by_a_lossy_codec_is_decoded_from_and_not_kept(is_lossy: bool) -> None:
    world = World()
    wanted = world.hashes(text(100))
    request = replace(submit("h", DECODE, max_new=2), token_ids=tuple(text(100)))
    world.engine.handle(request, 0.0)
    world.engine.handle(ReserveBlocks("t-h", 18, 20, 50.0), 0.0)
    reserved = world.take(BlocksReserved)
    assert isinstance(reserved, BlocksReserved)
    root = world.engine._sequences[request.key].block_hashes[0]
    world.memory.fill(reserved.block_ids, [(root, *text(100)[: i + 1]) for i in range(18)])
    commit = CommitTransfer("t-h", reserved.block_ids, (50,), token_digest(text(100)), is_lossy)
    world.engine.handle(commit, 0.0)
    while world.step():
        pass
    assert world.engine.count_cached(wanted)[0] == (0 if is_lossy else 4)
    assert world.ask(text(100)) == (0 if is_lossy else 16)


# What is fetched.


@pytest.mark.parametrize(
    ("digest", "is_lossy", "num_wrong"), [("right", False, 0), ("wrong", False, 1), ("right", True, 0)]
)
def test_of_a_fetched_prefix_only_what_was_asked_for_is_kept(
    digest: str, is_lossy: bool, num_wrong: int
) -> None:
    world = World()
    request = replace(
        submit("r1", max_new=1), token_ids=tuple(text(100)), prefix_peers=(PrefixPeer("w:1", 1),)
    )
    world.engine.handle(request, 0.0)
    wanted = world.take(FetchPrefix)
    assert isinstance(wanted, FetchPrefix)
    world.engine.handle(ReserveBlocks(wanted.transfer_id, 8, 8, 50.0), 0.0)
    reserved = world.take(BlocksReserved)
    assert isinstance(reserved, BlocksReserved)
    root = world.engine._sequences[request.key].block_hashes[0]
    world.memory.fill(reserved.block_ids, [(root, *text(100)[: i + 1]) for i in range(8)])
    name = wanted.block_hashes[1] if digest == "right" else b"other tokens"
    world.engine.handle(CommitTransfer(wanted.transfer_id, reserved.block_ids, (), name, is_lossy), 0.0)
    world.engine.handle(PrefixFetched(wanted.transfer_id, 8), 2.5)
    while world.step():
        pass
    first = world.take(TokensGenerated)
    assert isinstance(first, TokensGenerated)
    is_kept = digest == "right" and not is_lossy
    assert (first.num_cached_tokens, first.num_fetched_tokens) == ((8, 8) if is_kept else (0, 0))
    assert first.prefix_fetch_s == 2.5
    assert world.engine.num_wrong_prefixes == num_wrong
    assert world.engine.reuse_counts().num_cached_tokens == (8 if is_kept else 0)
