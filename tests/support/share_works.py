"""Work of a phase for tests of its processes: counts steps, on blocks that it takes; on a GPU it computes with them."""

import os
from typing import Any

import torch

from workers.device.resident_memory import AttachedMemory
from workers.device.share_process import Opened
from workers.device.shared_blocks import SharedBlocks


class CountingWork:
    """State: (steps so far, the blocks of them, numbers of the processes that had it)."""

    def __init__(self, memory: AttachedMemory, blocks: SharedBlocks, number: int) -> None:
        self._memory, self._blocks, self._number = memory, blocks, number
        self._state: tuple[int, list[int], list[int]] = (0, [], [])

    def warm_up(self) -> None:
        """Nothing."""

    def adopt(self, state: Any) -> None:
        """Its own number is the last one."""
        steps, blocks, numbers = state or (0, [], [])
        self._state = (steps, blocks, [*numbers, self._number])

    def step(self) -> bool:
        """Takes a block while there are any."""
        steps, blocks, numbers = self._state
        taken = self._blocks.allocate(1, self._number) if len(blocks) < 8 else None
        self._state = (steps + 1, [*blocks, *(taken or [])], numbers)
        return True

    def hand_over(self) -> Any:
        """The state."""
        return self._state


class ProductWork(CountingWork):
    """On a GPU: each step multiplies the shared weight, and writes the number of steps into the KV of its blocks."""

    def __init__(self, memory: AttachedMemory, blocks: SharedBlocks, number: int) -> None:
        super().__init__(memory, blocks, number)
        self._input = torch.ones((64, memory.tensors["weight"].shape[0]), device="cuda", dtype=torch.bfloat16)

    def warm_up(self) -> None:
        """The library's start."""
        self._product()

    def step(self) -> bool:
        """Until it is in memory. Raises AssertionError when the product is wrong."""
        super().step()
        assert self._product() == self._memory.tensors["weight"].shape[0]
        steps, blocks, _ = self._state
        self._memory.tensors["kv"][blocks] = steps
        torch.cuda.synchronize()
        return True

    def _product(self) -> float:
        return float((self._input @ self._memory.tensors["weight"])[0, 0])


def make_counting(memory: AttachedMemory, blocks: SharedBlocks, number: int) -> CountingWork:
    """See the class."""
    return CountingWork(memory, blocks, number)


def make_product(memory: AttachedMemory, blocks: SharedBlocks, number: int) -> ProductWork:
    """See the class."""
    return ProductWork(memory, blocks, number)


def make_failing(memory: AttachedMemory, blocks: SharedBlocks, number: int) -> CountingWork:
    """Does not come so far, but for its first process."""
    if number % 1_000_000 > 1:
        os._exit(3)
    return CountingWork(memory, blocks, number)


def open_nothing(_manifest: bytes) -> Opened:
    """For machines without a GPU."""
    nothing: Any = None
    return Opened(nothing, 0.0, 0.0, 132)
