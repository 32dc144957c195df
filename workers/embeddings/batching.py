"""Which tiles are encoded together. Pure."""

from collections.abc import Sequence


def next_batch(num_patches: Sequence[int], budget: int) -> int:
    """How many of these tiles, first come first served, go into one batch of at most `budget` patches; at least one."""
    total = 0
    for i, num in enumerate(num_patches):
        total += num
        if total > budget and i > 0:
            return i
    return len(num_patches)
