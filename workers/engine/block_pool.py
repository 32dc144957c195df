"""Who owns which KV block. Pure."""

from collections.abc import Sequence
from enum import StrEnum

from workers.api import BlockCounts


class BlockState(StrEnum):
    """A block is in exactly one of these."""

    FREE = "free"
    IN_USE = "in_use"
    LEASED = "leased"


class BlockPool:
    """Hands out block ids 0..num_blocks-1.

    A block is FREE, IN_USE by one sequence, or LEASED to one transfer. Every act names the state it
    expects, so that freeing twice, or freeing what a transfer holds, fails at once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._states = [BlockState.FREE] * num_blocks
        # A stack: the block freed last is the one most likely still in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._counts = {BlockState.FREE: num_blocks, BlockState.IN_USE: 0, BlockState.LEASED: 0}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    @property
    def num_blocks(self) -> int:
        """All blocks, whatever their state."""
        return len(self._states)

    def counts(self) -> BlockCounts:
        """The four counts, whose sum is the total."""
        return BlockCounts(
            free=self._counts[BlockState.FREE],
            cached=0,
            in_use=self._counts[BlockState.IN_USE],
            leased=self._counts[BlockState.LEASED],
            total=len(self._states),
        )

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks for a sequence. The caller has checked `num_free`."""
        return self._take(num_blocks, BlockState.IN_USE)

    def lease(self, num_blocks: int) -> list[int]:
        """Take free blocks for a transfer that will fill them."""
        return self._take(num_blocks, BlockState.LEASED)

    def free(self, block_ids: Sequence[int]) -> None:
        """A sequence is done with these."""
        self._move(block_ids, BlockState.IN_USE, BlockState.FREE)

    def hand_over(self, block_ids: Sequence[int]) -> None:
        """A sequence leaves these to the transfer that is sending them."""
        self._move(block_ids, BlockState.IN_USE, BlockState.LEASED)

    def adopt(self, block_ids: Sequence[int]) -> None:
        """A sequence takes over what a transfer has filled."""
        self._move(block_ids, BlockState.LEASED, BlockState.IN_USE)

    def release(self, block_ids: Sequence[int]) -> None:
        """A transfer is done with these."""
        self._move(block_ids, BlockState.LEASED, BlockState.FREE)

    def check_invariants(self) -> None:
        """free + in_use + leased = total, and the free list holds each free block once."""
        for state, count in self._counts.items():
            assert count == self._states.count(state), f"{state}: counted {count}"
        assert sum(self._counts.values()) == len(self._states)
        assert sorted(self._free) == [i for i, state in enumerate(self._states) if state is BlockState.FREE]

    def check_owners(self, *, in_use: Sequence[int], leased: Sequence[int]) -> None:
        """The blocks that sequences and transfers name are exactly those that are not free, each once."""
        for state, named in ((BlockState.IN_USE, in_use), (BlockState.LEASED, leased)):
            assert sorted(named) == [i for i, held in enumerate(self._states) if held is state], state

    def _take(self, num_blocks: int, state: BlockState) -> list[int]:
        assert 0 <= num_blocks <= len(self._free), f"asked for {num_blocks} of {len(self._free)} free blocks"
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block_id in taken:
            self._states[block_id] = state
        self._counts[BlockState.FREE] -= num_blocks
        self._counts[state] += num_blocks
        return taken

    def _move(self, block_ids: Sequence[int], source: BlockState, target: BlockState) -> None:
        for block_id in block_ids:
            assert self._states[block_id] is source, (
                f"block {block_id} is {self._states[block_id]}, not {source}"
            )
            self._states[block_id] = target
        if target is BlockState.FREE:
            self._free.extend(block_ids)
        self._counts[source] -= len(block_ids)
        self._counts[target] += len(block_ids)
