"""What the model would find in its KV cache, as facts in place of numbers: whose token, after which others."""

from collections.abc import Callable

import numpy as np

from workers.api import CautiousDecoding, NgramDrafts, SuperposedDecoding
from workers.engine.decoding.acceptance import walk
from workers.engine.decoding.superposed import mix_settings
from workers.engine.host_tier import PackedBlock
from workers.engine.sequence import NO_TOKEN, Sequence
from workers.engine.step_plan import Slice, StepPlan
from workers.engine.step_result import RowDetail, StepResult

#: What a slot holds: the root of its sequence and all tokens up to its own.
Fact = tuple[object, ...]
NOTHING: Fact = ()


def fact_of(sequence: Sequence, position: int) -> Fact:
    """What the KV of this token of the sequence is."""
    if position >= sequence.num_kept_tokens:
        return ("mixed", sequence.key, position)
    return (sequence.block_hashes[0], *sequence.token_ids[: position + 1])


class FactPacker:
    """Packs blocks of a KvMemory: into a number that stands for their facts, and is its own checksum."""

    block_bytes = 8

    def __init__(self, memory: "KvMemory") -> None:
        self._memory = memory
        self._packed: list[list[Fact]] = []
        self.is_failing = False
        self.is_lossy = False

    def pack(self, block_id: int) -> PackedBlock | None:
        if self.is_failing:
            return None
        self._packed.append(list(self._memory.slots[block_id]))
        number = len(self._packed) - 1
        return PackedBlock(np.array([number]).view(np.uint8), number, self.is_lossy)

    def is_whole(self, packed: PackedBlock) -> bool:
        return self._number(packed) == packed.checksum

    def unpack(self, packed: PackedBlock, block_id: int) -> None:
        assert self.is_whole(packed)
        self._memory.slots[block_id] = list(self._packed[packed.checksum])

    def _number(self, packed: PackedBlock) -> int:
        return int(packed.data.view(np.int64)[0])


class KvMemory:
    """Blocks of facts, and a runner of plans on them that checks what each slice reads."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.packer = FactPacker(self)

    def fill(self, block_ids: tuple[int, ...], facts: list[Fact]) -> None:
        """As a transfer does: these facts, and nothing after them."""
        for i, block_id in enumerate(block_ids):
            facts_here = facts[i * self.block_size : (i + 1) * self.block_size]
            self.slots[block_id] = facts_here + [NOTHING] * (self.block_size - len(facts_here))

    def read(self, block_ids: tuple[int, ...], num_tokens: int) -> list[Fact]:
        """The first facts of these blocks."""
        facts = [fact for block_id in block_ids for fact in self.slots[block_id]]
        return facts[:num_tokens]

    def break_step(self, plan: StepPlan) -> None:
        """The step fails before anything is copied, and leaves nonsense where it would have written."""
        for part in plan.slices:
            for position in range(part.start, part.end):
                self._write(part.sequence, position, ("broken",))

    def run(self, plan: StepPlan, choose: Callable[[int], int], tokens: tuple[int, ...]) -> StepResult:
        """choose(n): any number below n. tokens: what may be sampled."""
        for target, source in plan.copies.items():
            self.slots[target] = list(self.slots[source])
        for block_id, packed in plan.restores.items():
            self.packer.unpack(packed, block_id)
        for part in plan.slices:
            for position in range(part.start, part.end):
                self._write(part.sequence, position, fact_of(part.sequence, position))
        for i, tree in plan.drafts.items():
            sequence = plan.decodes[i]
            for j in range(1, tree.num_drafts + 1):
                self._write(sequence, len(sequence.token_ids) - 1 + j, ("draft", sequence.key, j))
        for part in plan.slices:
            self._check(part, plan)
        sampled = [part for part in plan.slices if part.yields_token]
        details: dict[int, RowDetail] = {}
        token_ids = [tokens[choose(len(tokens))] for _ in sampled]
        for i, part in enumerate(sampled):
            detail = self._detail(part.sequence, i, token_ids, plan, choose, tokens)
            if detail is not None:
                details[i] = detail
        return StepResult(token_ids, details)

    def _detail(
        self,
        sequence: Sequence,
        index: int,
        token_ids: list[int],
        plan: StepPlan,
        choose: Callable[[int], int],
        tokens: tuple[int, ...],
    ) -> RowDetail | None:
        usable = [token for token in tokens if token != NO_TOKEN]
        token_id = token_ids[index]
        match sequence.sampling.decoding:
            case NgramDrafts() if index in plan.drafts:
                tree = plan.drafts[index]
                rows = [token_id, *(usable[choose(len(usable))] for _ in range(tree.num_drafts))]
                left = sequence.max_tokens - len(sequence.token_ids)
                accepted = walk(tree, rows, stop_token_ids=sequence.stop_token_ids, max_tokens=left)
                known = [*sequence.token_ids, *accepted.token_ids]
                begin = len(sequence.token_ids) - 1
                for i in range(len(accepted.rows)):
                    self._write(sequence, begin + i, (sequence.block_hashes[0], *known[: begin + i + 1]))
                return RowDetail(accepted=accepted, num_rows=tree.num_drafts + 1)
            case CautiousDecoding(max_branches) if token_id != NO_TOKEN:
                is_first = len(sequence.token_ids) == sequence.num_prompt_tokens
                if sequence.parent is not None:
                    return RowDetail(warped_logprob=-0.1 * choose(10))
                if is_first or sequence.is_handed_off:
                    return RowDetail()
                others = [usable[choose(len(usable))] for _ in range(choose(max_branches))]
                return RowDetail(branches=tuple((one, -0.1 * choose(10)) for one in (token_id, *others)))
            case SuperposedDecoding(num_drafts) if token_id != NO_TOKEN:
                num = mix_settings(num_drafts).num_candidates
                first = choose(50)
                return RowDetail(top=tuple((50 + first + i, -1.0 - i) for i in range(num)))
        return None

    def _check(self, part: Slice, plan: StepPlan) -> None:
        sequence = part.sequence
        row = plan.block_tables[sequence.row]
        for position in range(part.end):
            found = self.slots[row[position // self.block_size]][position % self.block_size]
            assert found == fact_of(sequence, position), (sequence.key, part.start, part.end, position)

    def _write(self, sequence: Sequence, position: int, fact: Fact) -> None:
        block_id = sequence.block_table[position // self.block_size]
        self.slots[block_id][position % self.block_size] = fact
