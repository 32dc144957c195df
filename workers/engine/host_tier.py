"""Blocks that were evicted from the pool and kept in host memory: which, and for how long. Pure.

A block is packed before anybody else can write to it: by the pool, in the very act that takes it. What is kept stays
when it is restored, so that evicting it again costs nothing; it goes when newer blocks need its room, or when it is
found damaged. Nobody holds what is kept: a step that restores a block has the packed KV itself in its plan.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PackedBlock:
    """KV of one block, over all layers, and the checksum that `Packer.pack` took of it.

    is_lossy: what comes back is near to what was computed, and not the same.
    """

    data: NDArray[np.uint8]
    checksum: int
    is_lossy: bool = False


class Packer(Protocol):
    """Reads and writes blocks of the KV cache. `KvPacker` does it with torch; tests have one without."""

    @property
    def block_bytes(self) -> int:
        """Bytes of every packed block."""
        ...

    def pack(self, block_id: int) -> PackedBlock | None:
        """What the block holds now; None when it cannot be packed."""
        ...

    def is_whole(self, packed: PackedBlock) -> bool:
        """It is as it was when it was packed."""
        ...

    def unpack(self, packed: PackedBlock, block_id: int) -> None:
        """Put it into this block."""
        ...


@dataclass(frozen=True, slots=True)
class HostTierCounts:
    """Blocks and bytes that are kept; blocks packed, restored, found damaged, and dropped for newer ones so far."""

    num_entries: int = 0
    num_bytes: int = 0
    num_saved: int = 0
    num_hits: int = 0
    num_corrupt: int = 0
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class SavedBlock:
    """A block that is kept: its hash, that of the block before it, its tokens and its KV."""

    name: bytes
    parent: bytes
    token_ids: tuple[int, ...]
    packed: PackedBlock


class HostTier:
    """At most `max_bytes` of packed blocks by their hashes; the one that was used longest ago goes first."""

    def __init__(self, packer: Packer, max_bytes: int) -> None:
        self._packer = packer
        self._max_entries = max_bytes // packer.block_bytes
        #: The one to drop first is first.
        self._entries: dict[bytes, SavedBlock] = {}
        self._dropped: list[bytes] = []
        self._num_saved = 0
        self._num_hits = 0
        self._num_corrupt = 0
        self._num_dropped = 0

    def __contains__(self, name: bytes) -> bool:
        """It is kept, damaged or not."""
        return name in self._entries

    def save(
        self, block_id: int, name: bytes, parent: bytes, token_ids: tuple[int, ...], *, is_lossy: bool = False
    ) -> None:
        """Keep what this block holds, if there is room for a block at all and it can be packed.

        is_lossy: it is not exactly what was computed already.
        """
        entry = self._entries.pop(name, None)
        if entry is None:
            if self._max_entries == 0:
                return
            if len(self._entries) >= self._max_entries:
                self._drop(next(iter(self._entries)))
                self._num_dropped += 1
            packed = self._packer.pack(block_id)
            if packed is None:
                return
            if is_lossy and not packed.is_lossy:
                packed = replace(packed, is_lossy=True)
            entry = SavedBlock(name, parent, token_ids, packed)
            self._num_saved += 1
        self._entries[name] = entry

    def find(self, blocks: Iterable[tuple[bytes, tuple[int, ...]]]) -> list[PackedBlock]:
        """The first of these blocks, each a hash and its tokens, up to one that is not kept or is damaged."""
        found: list[SavedBlock] = []
        for name, token_ids in blocks:
            entry = self._entries.get(name)
            if entry is None or entry.token_ids != token_ids or not self._is_whole(entry):
                break
            found.append(entry)
        self.used(found)
        return [entry.packed for entry in found]

    def has_exact(self, name: bytes) -> bool:
        """It is kept as it was computed, damaged or not."""
        entry = self._entries.get(name)
        return entry is not None and not entry.packed.is_lossy

    def find_exact(self, name: bytes) -> SavedBlock | None:
        """This block as it was computed; `used` is to be told of it. None when it is not kept like that, or is damaged."""
        entry = self._entries.get(name)
        if entry is None or entry.packed.is_lossy or not self._is_whole(entry):
            return None
        return entry

    def used(self, found: Sequence[SavedBlock]) -> None:
        """These were found, in the order of their tokens, and stay longest."""
        # From the end: a block is of use only with those before it, so it should be dropped before them.
        for entry in reversed(found):
            if self._entries.pop(entry.name, None) is not None:
                self._entries[entry.name] = entry
        self._num_hits += len(found)

    def unpack(self, saved: SavedBlock, block_id: int) -> None:
        """Put its KV into this block of the cache, at once."""
        self._packer.unpack(saved.packed, block_id)

    def take_dropped(self) -> list[bytes]:
        """Hashes of what was dropped since the last call; some may be kept again."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def parents(self) -> dict[bytes, bytes]:
        """Of every hash that is kept, that of the block before it."""
        return {name: entry.parent for name, entry in self._entries.items()}

    def counts(self) -> HostTierCounts:
        """What is kept, and what has happened so far."""
        num_entries = len(self._entries)
        return HostTierCounts(
            num_entries=num_entries,
            num_bytes=num_entries * self._packer.block_bytes,
            num_saved=self._num_saved,
            num_hits=self._num_hits,
            num_corrupt=self._num_corrupt,
            num_dropped=self._num_dropped,
        )

    def check_invariants(self) -> None:
        """The limit holds, for what is really there."""
        assert len(self._entries) <= self._max_entries
        sizes = {entry.packed.data.nbytes for entry in self._entries.values()}
        assert sizes <= {self._packer.block_bytes}, sizes

    def _is_whole(self, entry: SavedBlock) -> bool:
        """One that is not is dropped."""
        if self._packer.is_whole(entry.packed):
            return True
        self._num_corrupt += 1
        self._drop(entry.name)
        return False

    def _drop(self, name: bytes) -> None:
        del self._entries[name]
        self._dropped.append(name)
