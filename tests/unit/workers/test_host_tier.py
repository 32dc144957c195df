"""Evicted blocks in host memory: which are kept, when they are packed, and who gets them back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.codecs.codec import CodecId, PageShape
from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from tests.support.engine_fakes import BOTH, CLAIM_S, CONFIG, DECODE, PREFILL, expanded, submit
from tests.support.engine_model import PLAIN, EngineWithModel
from tests.support.kv_memory import FactPacker, KvMemory
from tests.support.tiny_model import write_tiny_gguf
from workers.api import (
    EngineConfig,
    HostCacheCodec,
    KvBlocksRemoved,
    KvBlocksStored,
    PhaseSet,
    RequestFailed,
    SamplingParams,
    SubscribeKvEvents,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.block_hash import block_hash, root_hash
from workers.engine.batch import Batch
from workers.engine.block_pool import BlockPool
from workers.engine.engine import Engine
from workers.engine.fetching import PrefixFetching
from workers.engine.host_tier import HostTier, HostTierCounts, PackedBlock
from workers.engine.kv_packer import KvPacker
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    FindCached,
    ReleaseTransfer,
    ReserveBlocks,
    StartTransfer,
)
from workers.engine.prefix_index import NO_MATCH
from workers.engine.sequence import Sequence
from workers.engine.step_plan import StepPlan
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare

SIZE = 4
ROOT = root_hash("model", "tokenizer", "")
BLOCK_BYTES = FactPacker.block_bytes


class NumberPacker:
    """What is packed of a block is how many were packed before it."""

    block_bytes = 8

    def __init__(self) -> None:
        self.packed: list[int] = []
        self.is_failing = False

    def pack(self, block_id: int) -> PackedBlock | None:
        if self.is_failing:
            return None
        self.packed.append(block_id)
        number = len(self.packed) - 1
        return PackedBlock(np.array([number]).view(np.uint8), number)

    def is_whole(self, packed: PackedBlock) -> bool:
        return int(packed.data.view(np.int64)[0]) == packed.checksum

    def unpack(self, packed: PackedBlock, block_id: int) -> None:
        assert self.is_whole(packed)


def chain(token_ids: list[int]) -> list[tuple[bytes, bytes, tuple[int, ...]]]:
    """Hash, parent and tokens of each full block."""
    blocks, parent = [], ROOT
    for i in range(0, len(token_ids) - SIZE + 1, SIZE):
        tokens = tuple(token_ids[i : i + SIZE])
        name = block_hash(parent, tokens)
        blocks.append((name, parent, tokens))
        parent = name
    return blocks


def save(tier: HostTier, blocks: list[tuple[bytes, bytes, tuple[int, ...]]]) -> None:
    """As the pool evicts them: ends before beginnings."""
    for name, parent, tokens in reversed(blocks):
        tier.save(0, name, parent, tokens)


def find(tier: HostTier, blocks: list[tuple[bytes, bytes, tuple[int, ...]]]) -> list[PackedBlock]:
    return tier.find((name, tokens) for name, _, tokens in blocks)


# The tier.


def test_what_is_saved_is_found_from_its_beginning_on() -> None:
    tier = HostTier(NumberPacker(), 80)
    blocks = chain(list(range(12)))
    save(tier, blocks)
    assert [one.checksum for one in find(tier, blocks)] == [2, 1, 0]
    assert find(tier, [*blocks[:1], *chain(list(range(50, 54))), *blocks[1:]]) == find(tier, blocks[:1])
    assert tier.counts() == HostTierCounts(num_entries=3, num_bytes=24, num_saved=3, num_hits=5)


def test_the_limit_counts_bytes_and_the_one_used_longest_ago_goes_first() -> None:
    tier = HostTier(NumberPacker(), 3 * 8 + 7)
    old, new = chain([1] * 8), chain([2] * 8)
    save(tier, old)
    assert len(find(tier, old)) == 2
    save(tier, new)
    # The end of the old one went; its beginning is still of use.
    assert tier.take_dropped() == [old[1][0]]
    assert len(find(tier, old)) == 1
    assert len(find(tier, new)) == 2
    tier.check_invariants()


def test_less_than_a_block_keeps_none() -> None:
    packer = NumberPacker()
    tier = HostTier(packer, 7)
    save(tier, chain([1] * 4))
    assert packer.packed == []
    assert tier.counts() == HostTierCounts()


def test_what_is_kept_is_not_packed_again() -> None:
    packer = NumberPacker()
    tier = HostTier(packer, 80)
    save(tier, chain([1] * 4))
    save(tier, chain([1] * 4))
    assert len(packer.packed) == tier.counts().num_saved == 1


def test_what_cannot_be_packed_is_not_kept() -> None:
    packer = NumberPacker()
    packer.is_failing = True
    tier = HostTier(packer, 80)
    save(tier, chain([1] * 4))
    assert tier.counts() == HostTierCounts()


def test_other_tokens_of_the_same_hash_are_not_found() -> None:
    tier = HostTier(NumberPacker(), 80)
    [(name, parent, tokens)] = chain([1] * 4)
    tier.save(0, name, parent, tokens)
    assert tier.find([(name, (9, 9, 9, 9))]) == []


def test_a_damaged_block_is_dropped_and_counted_and_ends_what_is_found() -> None:
    tier = HostTier(NumberPacker(), 80)
    blocks = chain([1] * 12)
    save(tier, blocks)
    find(tier, blocks)[1].data[0] ^= 0xFF
    assert len(find(tier, blocks)) == 1
    assert tier.take_dropped() == [blocks[1][0]]
    assert blocks[1][0] not in tier
    assert tier.counts().num_corrupt == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40), st.integers(1, 5))
def test_the_tier_keeps_what_was_used_last(acts: list[tuple[bool, int]], max_entries: int) -> None:
    tier = HostTier(NumberPacker(), max_entries * 8)
    blocks = [chain([i] * 4)[0] for i in range(8)]
    kept: list[int] = []
    for is_save, i in acts:
        if is_save:
            save(tier, [blocks[i]])
        else:
            assert len(find(tier, [blocks[i]])) == (i in kept)
        if is_save or i in kept:
            kept = [*(one for one in kept if one != i), i][-max_entries:]
        assert [name in tier for name, _, _ in blocks] == [i in kept for i in range(8)]
        tier.check_invariants()


# The pool and the tier.


class TieredPool(RuleBasedStateMachine):
    """Whoever watches knows at any time just the blocks that can be found, in the pool or in the tier."""

    @initialize(max_entries=st.integers(0, 6))
    def start(self, max_entries: int) -> None:
        self.packer = NumberPacker()
        self.tier = HostTier(self.packer, 8 * max_entries)
        self.pool = BlockPool(6, SIZE, self.tier)
        self.sequences: list[list[int]] = []
        self.told: set[bytes] = set()
        self.is_watched = False

    @rule(
        text=st.integers(0, 3),
        num_blocks=st.integers(1, 3),
        is_pending=st.booleans(),
        is_lossy=st.booleans(),
    )
    def compute(self, text: int, num_blocks: int, is_pending: bool, is_lossy: bool) -> None:
        if num_blocks > self.pool.num_available:
            return
        block_ids = self.pool.allocate(num_blocks)
        for block_id, (name, parent, tokens) in zip(
            block_ids, chain([text] * SIZE * num_blocks), strict=True
        ):
            self.pool.index.store(block_id, name, parent, tokens, is_pending=is_pending, is_lossy=is_lossy)
        self.sequences.append(block_ids)
        self.pool.index.settle(self.pool.index.pending)

    @rule(text=st.integers(0, 3), num_blocks=st.integers(1, 3))
    def break_step(self, text: int, num_blocks: int) -> None:
        if num_blocks > self.pool.num_available:
            return
        block_ids = self.pool.allocate(num_blocks)
        blocks = chain([text] * SIZE * num_blocks)
        for block_id, (name, parent, tokens) in zip(block_ids, blocks, strict=True):
            self.pool.index.store(block_id, name, parent, tokens, is_pending=True)
        self.pool.free(block_ids)
        self.pool.forget_pending()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        self.pool.prepare_to_write(data.draw(st.sampled_from(self.sequences))[-1])

    @rule(text=st.integers(0, 3), damaged=st.integers(0, 5), num_kept=st.integers(0, 6))
    def lend(self, text: int, damaged: int, num_kept: int) -> None:
        """Another worker gets the beginning that is counted, as far as there is room, and gives it back."""
        names = tuple(name for name, _, _ in chain([text] * SIZE * 3))
        if damaged < 3 and names[damaged] in self.tier._entries:
            self.tier._entries[names[damaged]].packed.data[0] ^= 1
        num_known, num_saved = self.pool.count_exact(names)
        leased = self.pool.counts().leased
        found = PrefixFetching(self.pool).find(FindCached("f", names, SIZE), num_kept=num_kept, now_s=0.0)
        if isinstance(found, CachedFound):
            assert len(found.block_ids) <= num_known
            assert [self.pool.index.names[i] for i in found.block_ids] == list(names[: len(found.block_ids)])
            assert self.pool.index.num_exact_of(found.block_ids) == len(found.block_ids)
            self.pool.check_invariants()
            self.pool.release(found.block_ids)
        else:
            # What is damaged is found to be so only now.
            assert num_known == 0 or num_saved > 0
        assert self.pool.counts().leased == leased

    @rule(text=st.integers(0, 3), damaged=st.integers(0, 5))
    def look(self, text: int, damaged: int) -> None:
        blocks = chain([text] * SIZE * 3)
        parents = [ROOT, *(name for name, _, _ in blocks)]
        found = self.pool.find_saved(parents, [text] * SIZE * 3, 0)
        if damaged < len(found):
            found[damaged].data[0] ^= 0xFF
            assert len(self.pool.find_saved(parents, [text] * SIZE * 3, 0)) == damaged

    @rule()
    def watch(self) -> None:
        self.is_watched = True
        self.pool.watch()

    @rule(is_failing=st.booleans())
    def fail_to_pack(self, is_failing: bool) -> None:
        self.packer.is_failing = is_failing

    @invariant()
    def all_that_can_be_found_is_told(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        for event in self.pool.take_events():
            match event:
                case KvBlocksStored():
                    self.told |= set(event.hashes)
                case KvBlocksRemoved():
                    assert set(event.hashes) <= self.told
                    self.told -= set(event.hashes)
        if self.is_watched:
            assert self.told == set(self.pool.index._by_hash) | set(self.tier.parents())


TestTieredPool = TieredPool.TestCase


# The engine.


class Fed:
    """An engine over a memory of facts, fed with prompts one after the other."""

    def __init__(
        self,
        config: EngineConfig = CONFIG,
        *,
        num_blocks: int = 6,
        host_blocks: int = 40,
        phases: PhaseSet = BOTH,
    ) -> None:
        self.memory = KvMemory(num_blocks, config.block_size)
        config = replace(config, is_prefix_cache_on=True, host_cache_bytes=host_blocks * BLOCK_BYTES)
        self.engine = Engine(
            config,
            phases,
            num_blocks=num_blocks,
            max_context_tokens=64,
            claim_s=CLAIM_S,
            packer=self.memory.packer if host_blocks else None,
        )
        self.num_requests = 0
        self.tokens: dict[str, list[int]] = {}
        self.num_cached: dict[str, int] = {}
        self.failed: set[str] = set()
        self.outputs: list[object] = []

    def submit(
        self,
        token_ids: list[int],
        *,
        max_new: int = 1,
        sampling: SamplingParams | None = None,
        salt: str = "",
    ) -> str:
        self.num_requests += 1
        name = f"r{self.num_requests}"
        request = submit(name, max_new=max_new)
        request = replace(
            request, token_ids=tuple(token_ids), cache_salt=salt, sampling=sampling or request.sampling
        )
        self.tokens[name] = []
        self.engine.handle(request, 0.0)
        return name

    def step(self, *, is_broken: bool = False) -> StepPlan | None:
        plan = self.engine.schedule(0.0)
        if plan is not None and is_broken:
            self.memory.break_step(plan)
            self.engine.fail_step(plan, "broke", 0.0)
        elif plan is not None:
            # A function of what came before: whatever the schedule, the same request gets the same tokens.
            sums = iter([sum(one.sequence.token_ids) for one in plan.slices if one.yields_token])
            tokens = tuple(range(50, 97))
            result = self.memory.run(plan, lambda n: next(sums, 0) % n, tokens)
            self.engine.complete(plan, result, 0.0)
        self.read()
        self.engine.check_invariants()
        return plan

    def read(self) -> None:
        for output in expanded(self.engine.take_outputs()):
            self.outputs.append(output)
            match output:
                case TokensGenerated():
                    name = output.key.request_id
                    self.tokens[name] += output.token_ids
                    if output.prefill_s is not None:
                        self.num_cached[name] = output.num_cached_tokens
                case RequestFailed():
                    self.failed.add(output.key.request_id)

    def run(self) -> None:
        for _ in range(500):
            if self.step() is None:
                return
        raise AssertionError("steps without end")

    def ask(self, token_ids: list[int], *, sampling: SamplingParams | None = None, salt: str = "") -> int:
        """Tokens of a prompt that were not computed."""
        name = self.submit(token_ids, sampling=sampling, salt=salt)
        self.run()
        return self.num_cached[name]


def text(first: int, num_tokens: int = 18) -> list[int]:
    return list(range(first, first + num_tokens))


def test_a_prompt_whose_blocks_were_evicted_is_restored() -> None:
    fed = Fed()
    assert [fed.ask(text(i)) for i in (100, 200, 100)] == [0, 0, 16]
    counts = fed.engine.host_tier_counts()
    assert counts.num_hits >= 3
    assert counts.num_bytes == counts.num_entries * BLOCK_BYTES


def test_without_a_tier_it_is_computed_again() -> None:
    fed = Fed(host_blocks=0)
    assert [fed.ask(text(i)) for i in (100, 200, 100)] == [0, 0, 4]
    assert fed.engine.host_tier_counts() == HostTierCounts()


def test_the_last_token_is_computed_though_all_of_the_prompt_is_kept() -> None:
    fed = Fed()
    assert [fed.ask(text(i, 16)) for i in (100, 200, 300, 100)] == [0, 0, 0, 15]


def test_a_block_that_is_kept_is_better_than_part_of_another() -> None:
    fed = Fed(num_blocks=12)
    other = [*text(100, 6), 1, 2, *text(900, 8)]
    fed.ask(text(100))
    fed.ask(text(500, 40))
    # Two tokens of its second block are in the pool; all of the first text is in the tier.
    fed.ask(other)
    assert fed.ask(text(100)) == 16


def test_another_salt_gets_nothing_back() -> None:
    fed = Fed()
    assert [fed.ask(text(i), salt="a") for i in (100, 200)] == [0, 0]
    assert fed.ask(text(100), salt="b") == 0
    assert fed.ask(text(100), salt="a") == 16


def test_a_prompt_with_logprobs_is_computed_whole() -> None:
    fed = Fed()
    fed.ask(text(100))
    fed.ask(text(200))
    assert fed.ask(text(100), sampling=SamplingParams(1, num_prompt_logprobs=0)) == 0
    assert fed.engine.host_tier_counts().num_hits == 0


def test_a_damaged_block_is_computed_and_told_of() -> None:
    fed = Fed()
    fed.engine.handle(SubscribeKvEvents(), 0.0)
    fed.ask(text(100))
    fed.ask(text(200, 22))
    tier = fed.engine.pool._tier
    assert tier is not None
    [name] = [one for one, entry in tier._entries.items() if entry.token_ids == (100, 101, 102, 103)]
    tier._entries[name].packed.data[0] ^= 0xFF
    fed.outputs.clear()
    assert fed.ask(text(100)) == 0
    assert fed.engine.host_tier_counts().num_corrupt == 1
    removed = [one for one in fed.outputs if isinstance(one, KvBlocksRemoved)]
    assert name in {hash_ for one in removed for hash_ in one.hashes}
    # It was stored anew when it had been computed.
    stored = [one for one in fed.outputs if isinstance(one, KvBlocksStored)]
    assert name in {hash_ for one in stored for hash_ in one.hashes}


def waiting(batch: Batch, token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
    """A sequence that was here before: the hashes of its blocks are known."""
    request = replace(submit(), token_ids=tuple(token_ids))
    request = replace(request, sampling=sampling or request.sampling)
    sequence = Sequence.from_submit(request, 0.0, root=ROOT, number=1)
    sequence.hash_blocks(len(token_ids) // SIZE, SIZE)
    batch.wait(sequence)
    return sequence


def test_who_leaves_before_the_step_takes_its_restores_along() -> None:
    tier = HostTier(NumberPacker(), 80)
    save(tier, chain(text(100, 8)))
    pool = BlockPool(6, SIZE, tier)
    batch = Batch(replace(CONFIG, is_prefix_cache_on=True), pool, 6)
    sequence = waiting(batch, text(100, 10))
    batch.admit(sequence, batch.match(sequence))
    assert sequence.num_cached_tokens == 8
    assert list(batch.restores) == sequence.block_table
    batch.check_invariants()
    batch.preempt(sequence)
    assert batch.restores == {}
    assert batch.match(sequence) == NO_MATCH
    assert pool.counts().free == 6
    batch.check_invariants()


def test_a_prompt_with_logprobs_that_was_preempted_is_computed_whole() -> None:
    tier = HostTier(NumberPacker(), 80)
    save(tier, chain(text(100, 8)))
    batch = Batch(replace(CONFIG, is_prefix_cache_on=True), BlockPool(6, SIZE, tier), 6)
    sequence = waiting(batch, text(100, 10), SamplingParams(1, num_prompt_logprobs=0))
    batch.admit(sequence, batch.match(sequence))
    assert sequence.num_cached_tokens == 0
    assert tier.counts().num_hits == 0


#: Fills a pool of six blocks; five blocks; and three tokens, of which two begin the first one.
BIG, WHOLE, BRANCH = text(200, 23), text(100, 20), [200, 201, 9]


def test_a_block_that_is_to_be_copied_can_be_taken_for_what_is_restored() -> None:
    fed = Fed(replace(CONFIG, growth_reserve=0.0))
    fed.ask(WHOLE)
    fed.ask(BIG)
    names = [fed.submit(token_ids) for token_ids in (BRANCH, WHOLE)]
    plan = fed.step()
    assert plan is not None
    assert set(plan.copies.values()) < set(plan.restores)
    fed.run()
    assert [fed.num_cached[name] for name in names] == [2, 19]


def test_two_prompts_of_one_step_share_what_is_restored() -> None:
    fed = Fed(num_blocks=9)
    fed.ask(text(100))
    fed.ask(text(200, 30))
    num_hits = fed.engine.host_tier_counts().num_hits
    names = [fed.submit([*text(100, 16), i]) for i in (1, 2)]
    plan = fed.step()
    assert plan is not None
    assert len(plan.chunks) == 2
    fed.run()
    assert [fed.num_cached[name] for name in names] == [16, 16]
    assert fed.engine.host_tier_counts().num_hits - num_hits == len(plan.restores) <= 4


def test_a_block_is_packed_before_a_transfer_may_fill_it() -> None:
    fed = Fed(phases=BOTH, num_blocks=6)
    fed.ask(text(100))
    fed.engine.handle(ReserveBlocks("t", 20, 24, 60.0), 0.0)
    [reserved] = [one for one in fed.engine.take_outputs() if isinstance(one, BlocksReserved)]
    fed.memory.fill(reserved.block_ids, [("late",)] * 24)
    assert fed.engine.host_tier_counts().num_saved == 4
    fed.engine.handle(ReleaseTransfer("t", reserved.block_ids, "gone"), 0.0)
    # Every token that is read is checked by the memory.
    assert fed.ask(text(100)) == 16


def test_a_hand_off_sends_what_was_restored_with_its_first_chunk() -> None:
    fed = Fed(phases=PREFILL | DECODE, num_blocks=6)
    fed.ask(text(100))
    fed.ask(text(200))
    request = submit("h", PREFILL, max_new=3)
    fed.engine.handle(replace(request, token_ids=tuple(text(100))), 0.0)
    plan = fed.engine.schedule(0.0)
    assert plan is not None
    [start] = [one for one in fed.engine.take_outputs() if isinstance(one, StartTransfer)]
    assert set(plan.restores) <= set(start.block_ids)
    [ready] = fed.engine.kv_ready(plan, 0, 2)
    assert (ready.token_lo, ready.token_hi) == (0, 18)
    fed.engine.complete(plan, fed.memory.run(plan, lambda _n: 0, (50,)), 0.0)
    fed.engine.check_invariants()


def test_a_step_that_breaks_leaves_nothing_that_it_was_to_restore() -> None:
    fed = Fed()
    fed.ask(text(100))
    fed.ask(text(200))
    name = fed.submit(text(100))
    fed.step(is_broken=True)
    assert fed.failed == {name}
    assert fed.ask(text(100)) == 16


PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 20),
        st.integers(0, 3),
        st.integers(1, 6),
        st.booleans(),
        st.sampled_from([None, None, SuperposedDecoding(2)]),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=150)
@given(
    prompts=PROMPTS,
    num_blocks=st.integers(8, 14),
    host_blocks=st.sampled_from([1, 3, 10, 60]),
    token_budget=st.sampled_from([4, 9, 16]),
    growth_reserve=st.sampled_from([0.0, 1.0]),
    damage=st.sets(st.integers(0, 30), max_size=3),
    can_fail=st.booleans(),
)
def test_whatever_is_evicted_and_restored_tokens_are_the_same(
    prompts: list[tuple[int, int, int, int, bool, SuperposedDecoding | None]],
    num_blocks: int,
    host_blocks: int,
    token_budget: int,
    growth_reserve: float,
    damage: set[int],
    can_fail: bool,
) -> None:
    """Every token that a step reads is checked by the memory; damage is never read."""
    config = replace(
        CONFIG, token_budget=token_budget, growth_reserve=growth_reserve, max_waiting_requests=20
    )
    runs = []
    for host in (0, host_blocks):
        fed = Fed(config, num_blocks=num_blocks, host_blocks=host)
        tier = fed.engine.pool._tier
        for number, (text_number, num_shared, other, max_new, is_alone, decoding) in enumerate(prompts):
            tokens = [*text(100 * text_number, num_shared), *[other] * (20 - num_shared)]
            sampling = SamplingParams(max_new, decoding=decoding)
            fed.submit(tokens[: 20 - other], sampling=sampling, salt="s" if other == 3 else "")
            fed.memory.packer.is_failing = can_fail and number % 5 == 4
            if tier is not None and number in damage:
                for entry in list(tier._entries.values())[::2]:
                    entry.packed.data[0] ^= 0xFF
            if is_alone:
                fed.run()
            else:
                fed.step()
        fed.run()
        assert fed.engine.num_running + fed.engine.num_waiting == 0
        runs.append((fed.tokens, fed.failed))
    assert runs[0] == runs[1]


# Bytes.


def cache_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """3 layers, 5 blocks of 4 tokens, 2 heads of 8; of 16 in four bits."""
    generator = torch.Generator().manual_seed(1)
    head_dim = 16 if dtype == PACKED_DTYPE else 8
    return convert(torch.randn(3, 2, 5, SIZE, 2, head_dim, generator=generator), dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, PACKED_DTYPE]
)
def test_a_packed_block_comes_back_into_any_block(dtype: torch.dtype) -> None:
    kv_cache = cache_of(dtype)
    packer = KvPacker(kv_cache)
    before = kv_cache.clone().view(torch.uint8)
    packed = packer.pack(3)
    assert packed is not None
    assert packed.data.nbytes == packer.block_bytes == kv_cache.nbytes // 5
    kv_cache[:, :, 3] = 0
    assert packer.is_whole(packed)
    packer.unpack(packed, 1)
    after = kv_cache.view(torch.uint8)
    assert torch.equal(after[:, :, 1], before[:, :, 3])
    for untouched in (0, 2, 4):
        assert torch.equal(after[:, :, untouched], before[:, :, untouched])


def test_one_flipped_bit_is_found(caplog: pytest.LogCaptureFixture) -> None:
    packer = KvPacker(cache_of())
    packed = packer.pack(0)
    assert packed is not None
    packed.data[100] ^= 1
    assert not packer.is_whole(packed)
    assert "packed_block_damaged" in caplog.text


class HalfCodec:
    """Two bytes a number; refuses NaN, as codecs do."""

    id = CodecId.FP8

    def packed_bytes(self, shape: PageShape) -> int:
        return 2 * shape.num_layers * 2 * shape.num_tokens * shape.num_heads * shape.head_dim

    def pack(self, kv: torch.Tensor, out: memoryview) -> None:
        if not kv.float().isfinite().all():
            raise ValueError("no numbers")
        assert kv.is_contiguous()
        out[:] = memoryview(kv.half().numpy().tobytes())

    def unpack(self, packed: memoryview, shape: PageShape) -> torch.Tensor:
        kv = torch.from_numpy(np.frombuffer(packed, np.float16).copy()).float()
        return kv.view(shape.num_layers, 2, shape.num_tokens, shape.num_heads, shape.head_dim)


def test_what_a_codec_rounds_up_beyond_fp8_is_its_largest_number() -> None:
    class Growing(HalfCodec):
        def unpack(self, packed: memoryview, shape: PageShape) -> torch.Tensor:
            return super().unpack(packed, shape) * 1.1

    kv_cache = cache_of().mul(200).clamp(-448, 448).to(torch.float8_e4m3fn)
    packer = KvPacker(kv_cache, Growing())
    packed = packer.pack(3)
    assert packed is not None
    packer.unpack(packed, 1)
    assert kv_cache.float().isfinite().all()
    assert kv_cache[:, :, 1].float().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codec_packs_and_unpacks(dtype: torch.dtype) -> None:
    kv_cache = cache_of(dtype)
    packer = KvPacker(kv_cache, HalfCodec())
    assert packer.block_bytes == 3 * 2 * SIZE * 2 * 8 * 2
    packed = packer.pack(3)
    assert packed is not None
    packer.unpack(packed, 1)
    assert torch.equal(kv_cache[:, :, 1], kv_cache[:, :, 3].half().to(dtype))


def test_what_the_codec_cannot_pack_is_not_packed(caplog: pytest.LogCaptureFixture) -> None:
    kv_cache = cache_of()
    kv_cache[1, 0, 2] = float("nan")
    assert KvPacker(kv_cache, HalfCodec()).pack(2) is None
    assert "block_not_packed block_id=2" in caplog.text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder: Path = tmp_path_factory.mktemp("tier")
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=3)
    prepared = prepare(str(path), lambda *_progress: None, folder / "cache")
    return Llama(prepared.config, load_weights(prepared))


def test_a_model_says_the_same_from_what_was_restored(model: Llama) -> None:
    """Three prompts in turn, in a pool that holds one and a half."""
    prompts = [[first + i * 7 % 90 for i in range(41)] for first in (10, 120, 230)]
    runs = []
    for host_cache_bytes in (0, 2**20):
        engine = EngineWithModel(model, replace(PLAIN, host_cache_bytes=host_cache_bytes), num_blocks=18)
        for number in range(9):
            engine.submit(f"r{number}", prompts[number % 3], max_new=6)
            engine.run()
        assert not engine.failed
        runs.append(engine)
    plain, tiered = runs
    assert plain.tokens == tiered.tokens
    assert sum(plain.num_cached.values()) == 0
    assert list(tiered.num_cached.values()) == [0] * 3 + [40] * 6
    assert tiered.engine.host_tier_counts().num_hits > 30


def test_a_model_copies_a_block_before_another_is_restored_into_it(model: Llama) -> None:
    config = replace(PLAIN, growth_reserve=0.0, host_cache_bytes=2**20)
    engine = EngineWithModel(model, config, num_blocks=6)
    alone = EngineWithModel(model, PLAIN)
    for name, token_ids in (("whole", WHOLE), ("big", BIG)):
        engine.submit(name, token_ids, max_new=1)
        engine.run()
    for one in (engine, alone):
        one.submit("r0", BRANCH, max_new=1)
        one.submit("r1", WHOLE, max_new=1)
    plan = engine.step()
    assert plan is not None
    assert set(plan.copies.values()) < set(plan.restores)
    engine.run()
    alone.run()
    assert [engine.tokens[name] for name in ("r0", "r1")] == [alone.tokens[name] for name in ("r0", "r1")]
    assert engine.num_cached["r1"] == 19


@pytest.mark.parametrize("codec", [one for one in HostCacheCodec if one is not HostCacheCodec.NONE])
def test_every_codec_keeps_more_blocks_in_the_same_memory(model: Llama, codec: HostCacheCodec) -> None:
    num_bytes = {}
    for word in (HostCacheCodec.NONE, codec):
        config = replace(PLAIN, block_size=16, host_cache_bytes=2**20, host_cache_codec=word)
        engine = EngineWithModel(model, config, num_blocks=5)
        for number in range(4):
            engine.submit(f"r{number}", text(100 + number % 2 * 100, 70), max_new=6)
            engine.run()
        assert not engine.failed
        assert [engine.num_cached[name] for name in ("r2", "r3")] == [64, 64]
        counts = engine.engine.host_tier_counts()
        num_bytes[word] = counts.num_bytes / counts.num_entries
    assert num_bytes[codec] < 0.6 * num_bytes[HostCacheCodec.NONE]
