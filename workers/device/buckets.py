"""Sizes of batches for which steps are captured. Pure."""

from bisect import bisect_left
from collections.abc import Sequence

from workers.limits import GPU_TILE_TOKENS

#: Batches between two sizes run as the larger one, with rows of padding: at most so much of a batch.
MAX_PADDED_SHARE = 0.25
#: Steps of more tokens take longer to compute than to launch.
MAX_MIXED_TOKENS = 2048
#: Tiles that a graph of the encoder computes at most: more of them take longer to compute than to launch.
MAX_GRAPH_TILES = 8
#: Sizes beyond the smallest are multiples of this.
SIZE_STEP = 8


def decode_buckets(max_sequences: int) -> tuple[int, ...]:
    """Sizes from 1 to max_sequences, ascending: 1, 2, 4, 8, then in steps that grow with the size.

    max_sequences: of one step, >= 1; always the last of them.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < max_sequences]
    size = 8
    while size < max_sequences:
        sizes.append(size)
        size += max(SIZE_STEP, int(size * MAX_PADDED_SHARE) // SIZE_STEP * SIZE_STEP)
    return (*dict.fromkeys(sizes), max_sequences)


def mixed_buckets(token_budget: int) -> tuple[int, ...]:
    """Tokens of steps with prompts, ascending, up to token_budget, >= 1, or to MAX_MIXED_TOKENS.

    Closer sizes than GPU_TILE_TOKENS would save nothing.
    """
    most = min(token_budget, MAX_MIXED_TOKENS)
    sizes = [size for size in (32, 64, *range(GPU_TILE_TOKENS, most, GPU_TILE_TOKENS)) if size < most]
    return (*sizes, most)


def graph_tiles(tile_patches: int, patch_budget: int) -> int:
    """Tiles of so many patches that the encoder computes together at most."""
    return min(MAX_GRAPH_TILES, max(1, patch_budget // tile_patches))


def bucket_of(num: int, buckets: Sequence[int]) -> int | None:
    """The smallest of these sizes that holds so many; None when none does."""
    index = bisect_left(buckets, num)
    return buckets[index] if index < len(buckets) else None
