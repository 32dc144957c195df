"""The pictures of one prompt, as its sequence sees them: which embeddings are here, and what names their tokens. Pure."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from workers.api import ImageTile
from workers.embeddings.kept import KeptEmbeddings
from workers.model.mrope import NUM_AXES, mrope_delta, mrope_positions

#: Offsets of one tile's tokens; more embeddings than this no tile has.
_OFFSET_BITS = 24


class ImageInputs:
    """Tiles in the order of the prompt.

    A tile is known (its KV is in the prefix cache), or asked for, or ready: its embeddings are in these blocks of the
    embedding pool, until `release`. All that are asked for are one need, which is granted whole: there is room for it, and
    what is not ready will come. Tokens that stand for embeddings may leave the prompt (`drop`); the others keep their
    positions.
    """

    def __init__(self, tiles: Sequence[ImageTile]) -> None:
        #: As the whole prompt has them.
        self.tiles = tuple(tiles)
        #: As they stand in what is left of the prompt; those with nothing left have no embeddings.
        self.placed = self.tiles
        #: Blocks of the embedding pool, of those that are ready.
        self.block_ids: dict[int, tuple[int, ...]] = {}
        #: Of those that are ready and have fewer embeddings than tokens: which there are.
        self.kept: dict[int, KeptEmbeddings] = {}
        #: Times that all was released: what comes for an earlier asking lies in blocks that are others' by now.
        self.asking = 0
        #: There is room for all that was asked for.
        self.is_granted = False
        #: Something came, or was granted, since somebody last saw that it is not enough to begin with.
        self.has_news = False
        #: This one and all after it are asked for.
        self._first_asked = len(self.tiles)
        self._starts = [tile.start for tile in self.tiles]
        #: Places in the whole prompt of the tokens that are left, up to the last that stands for an embedding or stood for
        #: one; None: all are.
        self._origins: NDArray[np.int64] | None = None
        self._grid_delta = (
            mrope_delta(self.tiles) if all(tile.grid is not None for tile in self.tiles) else None
        )

    @property
    def position_delta(self) -> int | None:
        """What is added to the place of a token after all pictures to get its positions; None where they are its place."""
        if self._origins is None:
            return self._grid_delta
        return (self._grid_delta or 0) + self.num_dropped

    @property
    def num_planned(self) -> int:
        """Tokens of the whole prompt that stand for embeddings."""
        return sum(tile.num_embeddings for tile in self.tiles)

    @property
    def num_left(self) -> int:
        """Of these, those that have not left."""
        return sum(tile.num_embeddings for tile in self.placed)

    @property
    def num_dropped(self) -> int:
        """Of these, those that have."""
        return self.num_planned - self.num_left

    @property
    def is_all_ready(self) -> bool:
        """The embeddings of all tiles are here."""
        return len(self.block_ids) == len(self.tiles)

    @property
    def is_complete(self) -> bool:
        """The embeddings of all tiles that were asked for are here."""
        return len(self.block_ids) == len(self.tiles) - self._first_asked

    def ready_tokens(self, num_tokens: int, num_known: int) -> int:
        """How many of `num_tokens` tokens may be computed: those before the first tile that is neither ready nor known.

        num_known: tokens whose KV is here.
        """
        for i, tile in enumerate(self.placed):
            if i not in self.block_ids and _end(tile) > num_known:
                # Of one that is known in part, what is known need not be computed.
                return max(tile.start, num_known)
        return num_tokens

    def covers(self, num_known: int) -> bool:
        """All tiles with tokens beyond the first `num_known` are asked for."""
        return self._first_asked == 0 or _end(self.tiles[self._first_asked - 1]) <= num_known

    def ask(self, num_known: int) -> range:
        """Tiles that are asked for from now on: those with tokens beyond the first `num_known`. Nothing is so far."""
        assert self._first_asked == len(self.tiles)
        while not self.covers(num_known):
            self._first_asked -= 1
        return range(self._first_asked, len(self.tiles))

    def granted(self, asking: int) -> None:
        """There is room for what was asked for then. Ignored when it is not asked for any more."""
        if asking == self.asking:
            self.is_granted = self.has_news = True

    def arrived(
        self, tile: int, block_ids: Sequence[int], asking: int, kept: KeptEmbeddings | None = None
    ) -> None:
        """These blocks hold the embeddings of a tile that was asked for then. Ignored when it was not, or not any more."""
        if asking == self.asking and tile >= self._first_asked:
            self.granted(asking)
            self.block_ids[tile] = tuple(block_ids)
            if kept is not None:
                self.kept[tile] = kept

    def release(self) -> bool:
        """Nothing is asked for, and no blocks are read, any more; False when that was so before."""
        if self._first_asked == len(self.tiles):
            return False
        self.block_ids.clear()
        self.kept.clear()
        self._first_asked = len(self.tiles)
        self.is_granted = self.has_news = False
        self.asking += 1
        return True

    # Tokens that leave.

    def merged_places(self) -> list[int]:
        """Places of tokens for which the encoder has no embedding, of a prompt that is whole; when all are ready."""
        assert self._origins is None
        assert self.is_all_ready
        return [
            tile.start + offset
            for i, tile in enumerate(self.tiles)
            if i in self.kept
            for offset in sorted(set(range(tile.num_embeddings)) - set(self.kept[i].offsets))
        ]

    def first_places(self, num: int) -> list[int]:
        """Places of so many tokens that stand for embeddings, the first of them."""
        places = (place for tile in self.placed for place in range(tile.start, _end(tile)))
        return list(islice(places, num))

    def drop(self, places: Sequence[int]) -> None:
        """The tokens at these places, ascending, leave: all of them stand for embeddings."""
        if self._origins is None:
            self._origins = np.arange(_end(self.tiles[-1]))
        gone = np.array(places, np.int64)
        placed = []
        for tile in self.placed:
            before = np.searchsorted(gone, [tile.start, _end(tile)])
            num_gone = int(before[1] - before[0])
            placed.append(
                replace(
                    tile, start=tile.start - int(before[0]), num_embeddings=tile.num_embeddings - num_gone
                )
            )
        assert sum(tile.num_embeddings for tile in placed) == self.num_left - len(gone), places
        self.placed = tuple(placed)
        self._origins = np.delete(self._origins, gone)
        self._starts = [tile.start for tile in self.placed]

    def restore(self) -> None:
        """The prompt is whole again."""
        self.placed = self.tiles
        self._origins = None
        self._starts = [tile.start for tile in self.tiles]

    def key_flags(self, tile: int) -> tuple[bool, ...]:
        """Of each embedding of a ready tile: it never leaves."""
        if tile in self.kept:
            return self.kept[tile].is_key
        return (False,) * self.tiles[tile].num_embeddings

    # Where tokens are.

    def overlapping(self, start: int, end: int) -> list[int]:
        """Tiles with tokens in [start, end)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        found = []
        for i in range(first, len(self.tiles)):
            tile = self.placed[i]
            if tile.start >= end:
                break
            if _end(tile) > start:
                found.append(i)
        return found

    def positions(self, start: int, end: int) -> NDArray[np.int64]:
        """In time, height and width, of the tokens at places [start, end), [3, end - start]; with `position_delta` only."""
        if self._origins is None:
            return mrope_positions(self.tiles, start, end)
        num_left = len(self._origins)
        origins = np.arange(start, end) + self.num_dropped
        origins[: max(0, num_left - start)] = self._origins[start:end]
        if self._grid_delta is None:
            return np.broadcast_to(origins, (NUM_AXES, len(origins)))
        first = int(origins[0])
        return mrope_positions(self.tiles, first, int(origins[-1]) + 1)[:, origins - first]

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
