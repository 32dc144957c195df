"""The sequences of one engine that wait or run, and the blocks and rows that they hold. Pure."""

from bisect import insort
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvtransfer.layout import blocks_needed
from workers.api import CautiousDecoding, EngineConfig, LedgerKind, SuperposedDecoding
from workers.engine.block_pool import BlockPool
from workers.engine.flights import Flights
from workers.engine.host_tier import PackedBlock
from workers.engine.ledger import Holder
from workers.engine.prefix_index import NO_MATCH, PrefixMatch
from workers.engine.sequence import NO_ROW, Sequence, SequenceState
from workers.engine.span_reuse.lookup import find_reuse
from workers.engine.span_reuse.rule import SpanReuse


class Batch:
    """Whoever runs has a row in `block_tables`; whoever waits has neither row nor blocks.

    max_blocks: of one sequence.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, max_blocks: int) -> None:
        self.pool = pool
        #: State WAITING, by rank.
        self.waiting: list[Sequence] = []
        #: State PREFILL, in order of admission.
        self.prefills: list[Sequence] = []
        #: State DECODE, branches included. Those of one step keep their order until one leaves.
        self.decodes: list[Sequence] = []
        #: State BRANCHED.
        self.branched: list[Sequence] = []
        #: Block -> the block that it must get a copy of before the next step computes.
        self.copies: dict[int, int] = {}
        #: Block -> what is put into it before the next step computes, and after its copies: a block that is still
        #: to be copied may have been taken for this.
        self.restores: dict[int, PackedBlock] = {}
        #: Blocks of others that the next step reads, and that are held until it has run.
        self.sources: list[int] = []
        #: Steps beside each other; none where one follows on the other.
        self.flights = Flights(pool)
        #: The step that is planned may run beside another: what it copies from is held too.
        self.is_split = False
        #: Places of the running sequences; see `places`.
        self.num_places = 0
        #: Running sequences, branches not counted.
        self.num_running = 0
        #: Blocks of each row in order; what is beyond a sequence's blocks means nothing. [rows, max_blocks] int32.
        self.block_tables: NDArray[np.int32] = np.zeros((config.max_running_sequences, max_blocks), np.int32)
        self._free_rows = list(range(config.max_running_sequences - 1, -1, -1))
        self._is_cache_on = config.is_prefix_cache_on
        self._growth_reserve = config.growth_reserve
        self._span_reuse = config.span_reuse

    @property
    def is_empty(self) -> bool:
        """Nobody waits or runs."""
        return not (self.decodes or self.prefills or self.waiting or self.branched)

    def running(self) -> Iterator[Sequence]:
        """All that hold blocks for the steps, branches included."""
        yield from self.decodes
        yield from self.prefills
        yield from self.branched

    def holders(self) -> Iterator[Holder]:
        """Each sequence that runs, with its blocks and those of its branches."""
        found: dict[Sequence, list[int]] = {}
        for running in self.running():
            found.setdefault(running.parent or running, []).extend(running.block_table)
        yield from self.flights.holders()
        for sequence, block_ids in found.items():
            key = sequence.key
            yield Holder(
                key.request_id, LedgerKind.SEQUENCE, block_ids, sequence.holds_since_s, generation=key.attempt
            )

    # Waiting and running.

    def wait(self, sequence: Sequence) -> None:
        """It waits from now on."""
        insort(self.waiting, sequence, key=_rank)

    def match(self, sequence: Sequence) -> PrefixMatch:
        """What is known of a waiting sequence's tokens."""
        if not self._may_reuse(sequence):
            return NO_MATCH
        size = self.pool.block_size
        # Whoever waits has no tokens but those whose KV means the same to others.
        sequence.hash_blocks(len(sequence.token_ids) // size, size)
        return self.pool.index.match(sequence.block_hashes, sequence.named_tokens(0, len(sequence.token_ids)))

    def num_known_blocks(self, sequence: Sequence) -> int | None:
        """Whole blocks of a waiting sequence that need not be computed; None when all have to be."""
        if not self._may_reuse(sequence):
            return None
        num_found = len(self.match(sequence).block_ids)
        if not self.pool.has_tier:
            return num_found
        named = sequence.named_tokens(0, len(sequence.token_ids))
        return num_found + len(self.pool.find_saved(sequence.block_hashes, named, num_found))

    def num_known_tokens(self, sequence: Sequence) -> int:
        """Of a waiting sequence, those of the blocks that need not be computed."""
        return (self.num_known_blocks(sequence) or 0) * self.pool.block_size

    def admit(self, sequence: Sequence, match: PrefixMatch) -> None:
        """A waiting sequence begins to run with what is known of its tokens. Blocks for the rest come chunk by chunk."""
        self.waiting.remove(sequence)
        sequence.move_to(SequenceState.PREFILL)
        self.enter(sequence, ())
        self.pool.share(match.block_ids)
        self._extend(sequence, match.block_ids)
        size = self.pool.block_size
        num_cached = len(match.block_ids) * size
        # Restored blocks enter the index with its first chunk: before that it may leave, and they hold nothing yet.
        sequence.num_stored_blocks = len(match.block_ids)
        sequence.num_lossless_tokens = self._lossless_tokens(match)
        num_restored = self._restore(sequence)
        if num_restored > 0:
            # One token is always computed.
            num_cached = min(num_cached + num_restored * size, len(sequence.token_ids) - 1)
        elif match.partial is not None:
            # Held while the copy's block is taken, or that might be the same one.
            self.pool.share((match.partial,))
            if self.pool.num_available > 0:
                (copy,) = self.pool.allocate(1)
                self.copies[copy] = match.partial
                self._extend(sequence, (copy,))
                num_cached += match.num_partial
            self._copied_from(match.partial)
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_cached
        sequence.num_reused_tokens, sequence.num_exact_tokens = 0, None
        if sequence.is_handed_off:
            # Its transfer is told all blocks at once.
            self.grow(sequence, sequence.num_prompt_tokens)

    def enter(self, sequence: Sequence, block_ids: tuple[int, ...]) -> None:
        """Give a row to a sequence that begins to run, with these blocks, which it holds already."""
        if not self._free_rows:
            # Branches and KV that arrived may need more rows than there are places.
            num_rows = len(self.block_tables)
            self.block_tables = np.concatenate([self.block_tables, np.zeros_like(self.block_tables)])
            self._free_rows = list(range(2 * num_rows - 1, num_rows - 1, -1))
        sequence.row = self._free_rows.pop()
        sequence.num_entries += 1
        sequence.block_table = []
        sequence.capacity = 0
        self._extend(sequence, block_ids)
        self._list_of(sequence).append(sequence)
        self.num_places += places(sequence)
        self.num_running += sequence.parent is None

    def move(self, sequence: Sequence, state: SequenceState) -> None:
        """To another of the states in which it runs."""
        self._list_of(sequence).remove(sequence)
        sequence.move_to(state)
        self._list_of(sequence).append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It runs no more, and gives up row and blocks. The caller changes its state."""
        self._list_of(sequence).remove(sequence)
        self.num_places -= places(sequence)
        self.num_running -= sequence.parent is None
        if self.copies or self.restores:
            # A transfer may fill these blocks before the next step.
            for block_id in sequence.block_table:
                self.copies.pop(block_id, None)
                self.restores.pop(block_id, None)
        self.flights.give_up(sequence)
        self._free_rows.append(sequence.row)
        sequence.block_table = []
        sequence.capacity = 0
        sequence.row = NO_ROW

    def preempt(self, sequence: Sequence) -> None:
        """It waits again, and will compute all its tokens anew but those whose blocks are still known then."""
        assert sequence.is_preemptible, sequence
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """The same, of one that may have been admitted just now: no transfer knows its blocks."""
        self.leave(sequence)
        sequence.move_to(SequenceState.WAITING)
        sequence.num_computed_tokens = 0
        sequence.num_known_tokens = None
        sequence.num_stored_blocks = 0
        del sequence.token_ids[sequence.num_kept_tokens :]
        sequence.begin_anew()
        self.wait(sequence)

    # Blocks that are kept for later.

    def future_blocks(self, sequence: Sequence) -> int:
        """Blocks kept for what it may still generate."""
        size = self.pool.block_size
        growth = blocks_needed(sequence.max_tokens_here, size) - blocks_needed(len(sequence.token_ids), size)
        # A superposed decoding begins anew when it is preempted, so it gets all that it needs, or might never end.
        is_superposed = isinstance(sequence.sampling.decoding, SuperposedDecoding)
        return growth if is_superposed else int(self._growth_reserve * growth + 0.999999)

    def reserved_blocks(self, sequence: Sequence) -> int:
        """Blocks that a running sequence will still take, as far as they are kept for it."""
        if not sequence.is_preemptible or sequence.parent is not None:
            return 0
        num_known = blocks_needed(len(sequence.token_ids), self.pool.block_size)
        return max(0, num_known + self.future_blocks(sequence) - len(sequence.block_table))

    def num_reserved_blocks(self) -> int:
        """The same of all that run."""
        return sum(self.reserved_blocks(one) for one in self.running())

    # Blocks of a running sequence.

    def num_blocks_for_decodes(self, num_more: int = 0) -> int:
        """That a step of all decodes takes when each has so many more tokens than now."""
        return sum(
            self.num_blocks_to_grow(one, len(one.token_ids) + num_more)
            for one in self.decodes
            if len(one.token_ids) + num_more > one.capacity or one.is_tail_shared
        )

    def num_blocks_to_grow(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `grow` will take."""
        missing = blocks_needed(num_tokens, self.pool.block_size) - len(sequence.block_table)
        return max(0, missing) + sum(self.pool.is_shared(block_id) for block_id in self._tail(sequence))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give it blocks for this many tokens, all of which it may write from its next token on.

        The caller has checked `num_blocks_to_grow` against `num_available`.
        """
        if sequence.is_tail_shared:
            self._own_tail(sequence)
        # As blocks_needed.
        missing = -(-num_tokens // self.pool.block_size) - len(sequence.block_table)
        if missing > 0:
            self._extend(sequence, self.pool.allocate(missing))

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """It gives up the blocks beyond those of so many tokens; nobody else has them."""
        rest = sequence.block_table[blocks_needed(num_tokens, self.pool.block_size) :]
        del sequence.block_table[len(sequence.block_table) - len(rest) :]
        sequence.capacity = len(sequence.block_table) * self.pool.block_size
        self.pool.free(rest)

    def fork(self, sequence: Sequence, *, stream: int) -> Sequence:
        """A branch with the same tokens, that shares all blocks; each side copies the last one before it writes."""
        branch = Sequence(
            key=sequence.key,
            phases=sequence.phases,
            sampling=sequence.sampling,
            handoff=sequence.handoff,
            deadline_s=sequence.deadline_s,
            tpot_target_s=sequence.tpot_target_s,
            arrived_s=sequence.arrived_s,
            rank=sequence.rank,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_delivered=sequence.num_delivered,
            max_tokens=sequence.max_tokens,
            stop_token_ids=sequence.stop_token_ids,
            state=SequenceState.DECODE,
            block_hashes=list(sequence.block_hashes),
            num_computed_tokens=sequence.num_computed_tokens,
            num_stored_blocks=sequence.num_stored_blocks,
            num_exact_tokens=sequence.num_exact_tokens,
            num_lossless_tokens=sequence.num_lossless_tokens,
            images=sequence.images,
            reduction=sequence.reduction,
            num_dropped_tokens=sequence.num_dropped_tokens,
            stream=stream,
            parent=sequence,
        )
        used = sequence.block_table[: blocks_needed(sequence.num_computed_tokens, self.pool.block_size)]
        self.pool.share(used)
        self.enter(branch, tuple(used))
        branch.is_tail_shared = branch.num_computed_tokens % self.pool.block_size > 0
        sequence.is_tail_shared |= branch.is_tail_shared
        return branch

    def become(self, sequence: Sequence, branch: Sequence) -> None:
        """The branch's tokens and blocks become those of the sequence it was forked from; the branch is gone.

        Blocks that the sequence had beyond those of the branch stay with it.
        """
        num_blocks = len(branch.block_table)
        table = branch.block_table + sequence.block_table[num_blocks:]
        branch.block_table = sequence.block_table[:num_blocks]
        sequence.block_table = []
        sequence.capacity = 0
        self._extend(sequence, table)
        sequence.token_ids = branch.token_ids
        sequence.num_computed_tokens = branch.num_computed_tokens
        sequence.block_hashes = branch.block_hashes
        sequence.num_stored_blocks = branch.num_stored_blocks
        sequence.is_tail_shared = branch.is_tail_shared
        self.leave(branch)
        branch.move_to(SequenceState.FINISHED)

    def truncate(self, sequence: Sequence, num_tokens: int, *, num_computed: int) -> None:
        """Forget its tokens from `num_tokens` on and the KV from `num_computed` on; blocks stay with it."""
        size = self.pool.block_size
        del sequence.token_ids[num_tokens:]
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_computed)
        num_whole = sequence.num_computed_tokens // size
        del sequence.block_hashes[num_tokens // size + 1 :]
        sequence.num_stored_blocks = min(sequence.num_stored_blocks, num_whole)
        # What is written next may be in a block that others read, or that the index knows.
        sequence.is_tail_shared = num_whole < len(sequence.block_table)

    def store_blocks(self, sequence: Sequence, num_computed: int, *, is_pending: bool) -> None:
        """Tell the prefix index of its blocks that are whole with so many tokens computed."""
        size = self.pool.block_size
        num_whole = min(num_computed, sequence.num_storable_tokens) // size
        if not self._is_cache_on or num_whole <= sequence.num_stored_blocks:
            return
        sequence.hash_blocks(num_whole, size)
        hashes, table, num_before = sequence.block_hashes, sequence.block_table, sequence.num_stored_blocks
        sequence.num_stored_blocks = num_whole
        tokens = sequence.named_tokens(num_before * size, num_whole * size)
        spans, lossless = self.pool.index.spans, sequence.num_lossless_tokens
        if spans is None and lossless is None:
            if num_whole == num_before + 1:
                # As nearly always.
                block_id, parent, name = table[num_before], hashes[num_before], hashes[num_whole]
                self.pool.index.store(block_id, name, parent, tokens, is_pending=is_pending)
                return
            names = hashes[num_before : num_whole + 1]
            self.pool.index.store_chain(table[num_before:num_whole], names, tokens, is_pending=is_pending)
            return
        for i in range(num_before, num_whole):
            own = tokens[(i - num_before) * size : (i - num_before + 1) * size]
            is_lossy = lossless is not None and (i + 1) * size > lossless
            is_new = self.pool.index.store(
                table[i], hashes[i + 1], hashes[i], own, is_pending=is_pending, is_lossy=is_lossy
            )
            if is_new and spans is not None and sequence.images is None:
                chained = {"root": hashes[0], "name": hashes[i + 1], "parent": hashes[i]}
                spans.add(table[i], **chained, position=i * size, token_ids=own)

    # KV of other contexts.

    def find_spans(self, sequence: Sequence) -> SpanReuse | None:
        """What is known, from other contexts, of the tokens that it has not computed; None if that is too little."""
        spans, config = self.pool.index.spans, self._span_reuse
        if spans is None or config is None:
            return None
        return find_reuse(spans, sequence, config, self.pool.index.is_computed)

    def begin_reuse(self, sequence: Sequence, reuse: SpanReuse) -> None:
        """The next step computes all its tokens with these spans: it gets blocks for them, and holds what is read.

        The caller has seen that there are enough.
        """
        sources = reuse.source_block_ids
        self.pool.share(sources)
        self.sources += sources
        self.grow(sequence, len(sequence.token_ids))
        sequence.num_exact_tokens = sequence.num_computed_tokens
        sequence.num_reused_tokens = reuse.num_reused

    def end_step(self) -> None:
        """The step has run or failed: it reads nothing any more."""
        self.pool.free(self.sources)
        self.sources = []

    def check_invariants(self) -> None:
        """Each sequence is in one list, by its state, and rows are used once."""
        for sequence in self.running():
            sequence.check_invariants(self.pool.block_size)
            row = self.block_tables[sequence.row, : len(sequence.block_table)]
            assert row.tolist() == sequence.block_table, sequence
        for state, members in (
            (SequenceState.WAITING, self.waiting),
            (SequenceState.PREFILL, self.prefills),
            (SequenceState.DECODE, self.decodes),
            (SequenceState.BRANCHED, self.branched),
        ):
            assert all(sequence.state is state for sequence in members), state
            assert len(set(map(id, members))) == len(members), state
        assert self.waiting == sorted(self.waiting, key=_rank)
        assert all(not one.block_table and one.row == NO_ROW for one in self.waiting)
        prompts = [one.images for one in self.prefills if one.images is not None]
        assert all(images.is_granted or images.is_complete for images in prompts)
        rows = [sequence.row for sequence in self.running()]
        assert sorted(rows + self._free_rows) == list(range(len(self.block_tables)))
        assert self.num_running == sum(one.parent is None for one in self.running())
        assert self.num_places == sum(places(sequence) for sequence in self.running())
        held = {block_id for sequence in self.running() for block_id in sequence.block_table}
        assert self.copies.keys() <= held
        assert self.restores.keys() <= held - self.copies.keys()

    def _may_reuse(self, sequence: Sequence) -> bool:
        """It need not compute what is known. Logprobs of the prompt need all of it computed, and so does a filter."""
        if sequence.reduction is not None:
            return False
        is_scored = sequence.sampling.num_prompt_logprobs is None or (
            sequence.num_scored_tokens >= sequence.num_prompt_tokens
        )
        return self._is_cache_on and is_scored

    def _lossless_tokens(self, match: PrefixMatch) -> int | None:
        """Tokens of what was found before the first lossy block; None without one."""
        found = match.block_ids if match.partial is None else (*match.block_ids, match.partial)
        num_exact = self.pool.index.num_exact_of(found)
        return num_exact * self.pool.block_size if num_exact < len(found) else None

    def _restore(self, sequence: Sequence) -> int:
        """Give it blocks for what the host tier holds after those that it has; returns how many."""
        pool = self.pool
        if not (pool.has_tier and self._may_reuse(sequence)):
            return 0
        # All are found before a block is taken: what that evicts may drop them from the tier.
        named = sequence.named_tokens(0, len(sequence.token_ids))
        found = pool.find_saved(sequence.block_hashes, named, len(sequence.block_table))
        found = found[: pool.num_available]
        block_ids = pool.allocate(len(found))
        self.restores.update(zip(block_ids, found, strict=True))
        num_exact = next((i for i, packed in enumerate(found) if packed.is_lossy), None)
        if num_exact is not None and sequence.num_lossless_tokens is None:
            sequence.num_lossless_tokens = (len(sequence.block_table) + num_exact) * pool.block_size
        self._extend(sequence, block_ids)
        return len(found)

    def _list_of(self, sequence: Sequence) -> list[Sequence]:
        match sequence.state:
            case SequenceState.PREFILL:
                return self.prefills
            case SequenceState.DECODE:
                return self.decodes
            case _:
                assert sequence.state is SequenceState.BRANCHED, sequence
                return self.branched

    def _extend(self, sequence: Sequence, block_ids: list[int] | tuple[int, ...]) -> None:
        table = sequence.block_table
        begin = len(table)
        table.extend(block_ids)
        if len(block_ids) == 1:
            # As nearly always, and much faster.
            self.block_tables[sequence.row, begin] = block_ids[0]
        else:
            self.block_tables[sequence.row, begin : len(table)] = block_ids
        sequence.capacity = len(table) * self.pool.block_size

    def _tail(self, sequence: Sequence) -> list[int]:
        """Blocks that it has from its next token on and that it may have to copy; mostly none."""
        if not sequence.is_tail_shared:
            return []
        return sequence.block_table[sequence.num_computed_tokens // self.pool.block_size :]

    def _own_tail(self, sequence: Sequence) -> None:
        """Make the blocks from its next token on such that it may write to them."""
        tail = self._tail(sequence)
        sequence.is_tail_shared = False
        for index, old in enumerate(tail, start=len(sequence.block_table) - len(tail)):
            if self.pool.prepare_to_write(old):
                continue
            (new,) = self.pool.allocate(1)
            self.copies[new] = old
            self._copied_from(old)
            sequence.block_table[index] = new
            self.block_tables[sequence.row, index] = new

    def _copied_from(self, block_id: int) -> None:
        """Its copy is to be made before anybody can write to it: by the next step, or one that runs beside others."""
        if self.is_split:
            self.sources.append(block_id)
        else:
            self.pool.free((block_id,))


def places(sequence: Sequence) -> int:
    """Sequences of a step that a request counts as: one that may split counts all its branches from the start."""
    if sequence.parent is not None:
        return 0
    decoding = sequence.sampling.decoding
    return decoding.max_branches if isinstance(decoding, CautiousDecoding) else 1


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank
