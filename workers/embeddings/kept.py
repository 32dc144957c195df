"""Which embeddings of a tile there are, when there are fewer than its place in the prompt has tokens. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeptEmbeddings:
    """One entry for each embedding, in order.

    offsets: which of the tile's tokens it stands at, ascending. is_key: it never leaves the prompt.
    """

    offsets: tuple[int, ...]
    is_key: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.offsets)


def to_numbers(tiles: Sequence[KeptEmbeddings]) -> tuple[int, ...]:
    """As they travel with a transfer: of each tile how many, then two for one of them, and one more for a key."""
    numbers: list[int] = []
    for kept in tiles:
        numbers.append(len(kept))
        numbers += [2 * offset + is_key for offset, is_key in zip(kept.offsets, kept.is_key, strict=True)]
    return tuple(numbers)


def from_numbers(numbers: Sequence[int], sizes: Sequence[int]) -> list[KeptEmbeddings]:
    """What `to_numbers` wrote of tiles that have so many tokens. Raises ValueError when it cannot be that."""
    tiles, at = [], 0
    for size in sizes:
        num = numbers[at] if at < len(numbers) else 0
        codes = numbers[at + 1 : at + 1 + num]
        offsets = tuple(code // 2 for code in codes)
        if not 0 < num == len(codes) or list(offsets) != sorted(set(offsets)) or offsets[-1] >= size:
            raise ValueError(f"not the embeddings of tiles of {list(sizes)} tokens")
        tiles.append(KeptEmbeddings(offsets, tuple(code % 2 == 1 for code in codes)))
        at += 1 + num
    if at != len(numbers):
        raise ValueError(f"{len(numbers)} numbers, and {at} for {len(sizes)} tiles")
    return tiles
