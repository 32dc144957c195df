"""Positions of a prompt with pictures for M-RoPE: each token has one in time, one in height, one in width. Pure.

Text has the same in all three. A picture of rows x cols embeddings begins where the text before it ended; its embeddings
differ in height and width as they do in the picture, and the text after it goes on max(rows, cols) further.

So a token's positions follow from the pictures before it and its place alone: what comes later, and how the prompt is cut
into chunks, does not matter. KV of a prefix with the same tokens and the same pictures serves every prompt that begins
with it. Source: Qwen2-VL (Wang et al. 2024), section 2.1.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.api import ImageTile

#: Time, height and width.
NUM_AXES = 3


def mrope_positions(images: Sequence[ImageTile], start: int, end: int) -> NDArray[np.int64]:
    """Positions of the tokens at places start..end-1 of a prompt with these pictures, [3, end - start].

    images: in the order of the prompt, each with its grid, frames * rows * cols embeddings. Raises ValueError for others.
    """
    positions = np.broadcast_to(np.arange(start, end), (NUM_AXES, end - start)).copy()
    for image in images:
        if image.start >= end:
            break
        frames, rows, cols = _grid(image)
        stop = image.start + image.num_embeddings
        lo, hi = max(start, image.start), min(end, stop)
        if lo < hi:
            # The shift of the pictures before it is in `positions` already.
            first = positions[0, lo - start] - (lo - image.start)
            within = np.unravel_index(np.arange(lo - image.start, hi - image.start), (frames, rows, cols))
            positions[:, lo - start : hi - start] = first + np.array(within)
        positions[:, max(0, stop - start) :] += _shift(image)
    return positions


def mrope_delta(images: Sequence[ImageTile]) -> int:
    """What is added to the place of a token after all of these pictures to get its positions; 0 or less.

    Raises ValueError as `mrope_positions`.
    """
    return sum(map(_shift, images))


def _grid(image: ImageTile) -> tuple[int, int, int]:
    if image.grid is None or min(image.grid) < 1 or math.prod(image.grid) != image.num_embeddings:
        raise ValueError(f"a picture of {image.num_embeddings} embeddings with the grid {image.grid}")
    return image.grid


def _shift(image: ImageTile) -> int:
    """By how much the positions of what follows are moved."""
    _, rows, cols = _grid(image)
    return max(rows, cols) - image.num_embeddings
