"""EncoderLoop: batches within the budget, first come first served; one tile at fault harms no other."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.api import ImageReduction
from workers.embeddings.batching import next_batch
from workers.embeddings.encoder_loop import EncoderLoop
from workers.embeddings.kept import KeptEmbeddings
from workers.model.vision.plan import ImagePlan


class Doubler:
    """Embeddings are the pixels twice over; negative pixels are at fault."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def prepare(self, image: NDArray[np.uint8], plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        raise NotImplementedError

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.batches.append([float(one[0]) for one in pixels])
        if any(one.min() < 0 for one in pixels):
            raise ValueError("negative")
        return [2 * one for one in pixels]

    def encode_reduced(
        self, pixels: torch.Tensor, reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        raise NotImplementedError


def run(scenario: Callable[[EncoderLoop, Doubler], Awaitable[None]], budget: int = 10) -> None:
    async def main() -> None:
        encoder = Doubler()
        loop = EncoderLoop(encoder, budget)
        running = asyncio.create_task(loop.run())
        try:
            await scenario(loop, encoder)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            loop.close()

    asyncio.run(main())


def tiles(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def test_tiles_of_several_requests_share_a_batch_within_the_budget() -> None:
    async def scenario(loop: EncoderLoop, encoder: Doubler) -> None:
        first, second = await asyncio.gather(
            loop.encode(tiles(1, 2, 3), [4, 4, 4]), loop.encode(tiles(4, 5), [4, 4])
        )
        assert [float(one) for one in first.embeddings] == [2, 4, 6]
        assert [float(one) for one in second.embeddings] == [8, 10]
        assert encoder.batches == [[1, 2], [3, 4], [5]]
        assert (loop.num_batches, loop.num_patches, loop.num_waiting) == (3, 20, 0)
        assert loop.latency.costs().num_batches == 3

    run(scenario)


def test_a_batch_is_shared_by_patches() -> None:
    async def scenario(loop: EncoderLoop, _encoder: Doubler) -> None:
        small, large = await asyncio.gather(loop.encode(tiles(1), [2]), loop.encode(tiles(2, 3), [4, 2]))
        assert large.encode_s == pytest.approx(3 * small.encode_s)

    run(scenario)


def test_one_tile_at_fault_harms_no_other() -> None:
    async def scenario(loop: EncoderLoop, encoder: Doubler) -> None:
        good, bad = await asyncio.gather(
            loop.encode(tiles(1), [1]), loop.encode(tiles(-1), [1]), return_exceptions=True
        )
        assert not isinstance(good, BaseException)
        assert float(good.embeddings[0]) == 2
        assert isinstance(bad, ValueError)
        assert encoder.batches == [[1, -1], [1], [-1]]

    run(scenario)


def test_what_is_cancelled_is_not_computed() -> None:
    async def scenario(loop: EncoderLoop, encoder: Doubler) -> None:
        given_up = asyncio.create_task(loop.encode(tiles(7), [1]))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await loop.encode(tiles(1), [1])
        assert encoder.batches == [[1]]

    run(scenario)


@given(sizes=st.lists(st.integers(1, 50), min_size=1), budget=st.integers(1, 100))
def test_a_batch_is_as_large_as_the_budget_lets_it_and_never_empty(sizes: list[int], budget: int) -> None:
    num = next_batch(sizes, budget)
    assert 1 <= num <= len(sizes)
    assert num == 1 or sum(sizes[:num]) <= budget
    assert num == len(sizes) or sum(sizes[: num + 1]) > budget
