"""The pictures of one prompt, as its sequence sees them: which embeddings are here, and what names their tokens. Pure."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.api import ImageTile
from workers.model.mrope import mrope_delta, mrope_positions

#: Offsets of one tile's tokens; more embeddings than this no tile has.
_OFFSET_BITS = 24


class ImageInputs:
    """Tiles in the order of the prompt.

    A tile is known (its KV is in the prefix cache), or asked for, or ready: its embeddings are in these blocks of the
    embedding pool, until `release`.
    """

    def __init__(self, tiles: Sequence[ImageTile]) -> None:
        self.tiles = tuple(tiles)
        #: Blocks of the embedding pool, of those that are ready.
        self.block_ids: dict[int, tuple[int, ...]] = {}
        #: Times that all was released: what comes for an earlier asking lies in blocks that are others' by now.
        self.asking = 0
        self._asked: set[int] = set()
        self._starts = [tile.start for tile in self.tiles]
        #: What is added to the place of a token after all pictures to get its positions; None where they are its place.
        self.position_delta = (
            mrope_delta(self.tiles) if all(tile.grid is not None for tile in self.tiles) else None
        )

    @property
    def is_asking(self) -> bool:
        """Something was asked for since the last `release`."""
        return bool(self._asked)

    def ready_tokens(self, num_tokens: int, num_known: int) -> int:
        """How many of `num_tokens` tokens may be computed: those before the first tile that is neither ready nor known.

        num_known: tokens whose KV is here.
        """
        for i, tile in enumerate(self.tiles):
            if i not in self.block_ids and _end(tile) > num_known:
                # Of one that is known in part, what is known need not be computed.
                return max(tile.start, num_known)
        return num_tokens

    def ask(self, num_known: int) -> tuple[int, ...]:
        """Tiles that are asked for from now on: those with tokens beyond the first `num_known`."""
        wanted = [i for i, tile in enumerate(self.tiles) if _end(tile) > num_known and i not in self._asked]
        self._asked.update(wanted)
        return tuple(wanted)

    def arrived(self, tile: int, block_ids: Sequence[int], asking: int) -> None:
        """These blocks hold the embeddings of a tile that was asked for then. Ignored when it was not, or not any more."""
        if asking == self.asking and tile in self._asked:
            self.block_ids[tile] = tuple(block_ids)

    def release(self) -> None:
        """Nothing is asked for, and no blocks are read, any more."""
        self.block_ids.clear()
        self._asked.clear()
        self.asking += 1

    def overlapping(self, start: int, end: int) -> list[int]:
        """Tiles with tokens in [start, end)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        found = []
        for i in range(first, len(self.tiles)):
            tile = self.tiles[i]
            if tile.start >= end:
                break
            if _end(tile) > start:
                found.append(i)
        return found

    def positions(self, start: int, end: int) -> NDArray[np.int64]:
        """In time, height and width, of the tokens at places [start, end), [3, end - start]; with `position_delta` only."""
        return mrope_positions(self.tiles, start, end)

    def contents(self, start: int, end: int) -> list[bytes]:
        """Keys of the tiles with tokens in [start, end)."""
        return [self.tiles[i].key for i in self.overlapping(start, end)]

    def name_tokens(self, token_ids: list[int], start: int) -> list[int]:
        """The same tokens, from place `start` on, with a number of its own for each embedding: no two pictures share one."""
        named = list(token_ids)
        end = start + len(token_ids)
        for i in self.overlapping(start, end):
            tile = self.tiles[i]
            base = _number(tile.key)
            lo, hi = max(start, tile.start), min(end, _end(tile))
            named[lo - start : hi - start] = range(base + lo - tile.start, base + hi - tile.start)
        return named


def _end(tile: ImageTile) -> int:
    return tile.start + tile.num_embeddings


def _number(key: bytes) -> int:
    """Beyond all token ids."""
    return int.from_bytes(b"\1" + hashlib.blake2b(key, digest_size=12).digest()) << _OFFSET_BITS
