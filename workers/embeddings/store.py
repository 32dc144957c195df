"""Who has which embeddings, who waits for them, and who fills them in: cache and reservation in one. Pure.

An entry is the embeddings of one tile, named by cache salt and key, in blocks of its own. It is *reserved* while its
blocks wait to be filled, and *ready* afterwards. Whoever needs tiles holds their entries from the grant until `release`;
a ready entry that nobody holds is cached, and the one used longest ago makes room when blocks run out.

Nobody holds some while it waits for others: a need is granted whole, first come first served, or two could wait for each
other for ever. A tile that several need at a time is filled once; when the one that was told to see to it leaves, the next
is told. Blocks that a fill writes to are nobody else's until it says that it is done.

A tile may turn out to have fewer embeddings than its place in a prompt: blocks that it does not need are free then.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.layout import blocks_needed
from workers.api import ImageTile, RequestKey
from workers.embeddings.kept import KeptEmbeddings


@dataclass(frozen=True, slots=True)
class Wanted:
    """The holder is to see to it that these tiles of its need are filled: there are blocks for them."""

    holder: RequestKey
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """A tile that the holder needs is there. kept: which of its embeddings there are; None: all."""

    holder: RequestKey
    tile: int
    block_ids: tuple[int, ...]
    kept: KeptEmbeddings | None = None


Effect = Wanted | Ready


class CannotFill(Exception):  # noqa: N818 - an answer, not a fault
    """These tiles are not to be filled by whoever asks; the text says why."""


class NotNeeded(CannotFill):
    """One of them is there, comes from somebody else, or is not wanted any more: whoever asks has nothing to do."""


@dataclass(eq=False, slots=True)
class _Entry:
    name: tuple[str, bytes]
    num_embeddings: int
    block_ids: tuple[int, ...]
    is_ready: bool = False
    kept: KeptEmbeddings | None = None
    #: Who holds it, in order of coming, with the indices that the tile has in its need. The first sees to its filling.
    holders: dict[RequestKey, list[int]] = field(default_factory=dict)
    #: The fill that writes to its blocks.
    fill_id: str | None = None
    #: Who was told to see to it; None once that one has left.
    told: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class _Need:
    holder: RequestKey
    tiles: tuple[tuple[int, ImageTile], ...]
    salt: str


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Of one store. cached: ready and held by nobody. hits: tiles that were there, or on their way, when needed."""

    num_blocks: int
    num_free: int
    num_cached: int
    num_entries: int
    num_waiting: int
    num_hits: int
    num_misses: int
    num_evictions: int


class EmbeddingStore:
    """num_blocks: of the pool. block_size: embeddings of a block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        #: The one used longest ago is first.
        self._entries: dict[tuple[str, bytes], _Entry] = {}
        self._held: dict[RequestKey, list[_Entry]] = {}
        self._waiting: deque[_Need] = deque()
        self._fills: dict[str, list[_Entry]] = {}
        self._num_hits = self._num_misses = self._num_evictions = 0

    def counts(self) -> StoreCounts:
        """As of now."""
        cached = sum(len(one.block_ids) for one in self._entries.values() if one.is_ready and not one.holders)
        return StoreCounts(
            self._num_blocks,
            len(self._free),
            cached,
            len(self._entries),
            len(self._waiting),
            self._num_hits,
            self._num_misses,
            self._num_evictions,
        )

    def problem(self, tiles: Sequence[ImageTile]) -> str | None:
        """Why a request with these tiles can never be served; None when it can."""
        sizes = {tile.key: tile.num_embeddings for tile in tiles}
        need = sum(blocks_needed(num, self._block_size) for num in sizes.values())
        if need <= self._num_blocks:
            return None
        return (
            f"its pictures need {need} blocks of {self._block_size} embeddings, and this worker has "
            f"{self._num_blocks} (engine.imageCacheMiB); send fewer or smaller pictures"
        )

    # Needs.

    def need(self, holder: RequestKey, tiles: Sequence[tuple[int, ImageTile]], salt: str) -> list[Effect]:
        """The holder needs these tiles, each under an index of its own choice. `problem` must have found none.

        It has no other need: one that holds some and waits for more would wait for ever.
        """
        assert holder not in self._held, holder
        assert all(need.holder != holder for need in self._waiting), holder
        self._waiting.append(_Need(holder, tuple(tiles), salt))
        return self._grant()

    def release(self, holder: RequestKey) -> list[Effect]:
        """It needs nothing any more, of what it has been given and of what it waits for."""
        if any(need.holder == holder for need in self._waiting):
            self._waiting = deque(need for need in self._waiting if need.holder != holder)
        effects: list[Effect] = []
        for entry in self._held.pop(holder, ()):
            del entry.holders[holder]
            if entry.told == holder:
                entry.told = None
            effects += self._settle(entry)
        return effects + self._grant()

    # Fills.

    def begin_fill(self, fill_id: str, holder: RequestKey, tiles: Sequence[int]) -> tuple[int, ...]:
        """Blocks of these tiles of the holder's need, in order, which are the fill's until it ends.

        Raises CannotFill, and NotNeeded, which `want_again` is to follow.
        """
        if fill_id in self._fills:
            raise CannotFill(f"{fill_id} is filling already")
        by_index = self._by_index(holder)
        found: list[_Entry] = []
        for tile in tiles:
            entry = by_index.get(tile)
            if entry is None:
                raise NotNeeded(f"tile {tile} of {holder.request_id} is not wanted here (any more)")
            if entry.is_ready or entry.fill_id is not None or entry in found:
                raise NotNeeded(f"tile {tile} of {holder.request_id} is here, or on its way, already")
            found.append(entry)
        for entry in found:
            entry.fill_id = fill_id
        self._fills[fill_id] = found
        return tuple(block_id for entry in found for block_id in entry.block_ids)

    def want_again(self, holder: RequestKey, tiles: Sequence[int]) -> list[Effect]:
        """Whoever was to fill these tiles of the holder's need does not: tell the holder of those that nobody sees to."""
        by_index = self._by_index(holder)
        entries = {by_index[tile]: tile for tile in reversed(tiles) if tile in by_index}
        missing: list[int] = []
        for entry, tile in entries.items():
            if entry.is_ready or entry.told not in (None, holder):
                continue
            # Of one that comes from somebody else it is told if that fails.
            entry.told = None if entry.fill_id is not None else holder
            if entry.told is not None:
                missing.append(tile)
        return [Wanted(holder, tuple(sorted(missing)))] if missing else []

    def fills_of(self, holder: RequestKey, tiles: Sequence[int]) -> set[str]:
        """Those that write to these tiles of the holder's need now."""
        by_index = self._by_index(holder)
        entries = [by_index[tile] for tile in tiles if tile in by_index]
        return {entry.fill_id for entry in entries if entry.fill_id is not None}

    def keys_of(self, fill_id: str) -> list[bytes]:
        """Of the tiles that it fills, in order; none when it has ended."""
        return [entry.name[1] for entry in self._fills.get(fill_id, ())]

    def sizes_of(self, fill_id: str) -> list[int]:
        """Tokens of the tiles that it fills, in order."""
        return [entry.num_embeddings for entry in self._fills.get(fill_id, ())]

    def filled(self, fill_id: str, kept: Sequence[KeptEmbeddings] | None = None) -> list[Effect]:
        """Its blocks hold what they should. Ignored when the fill has ended.

        kept: of its tiles, in order, the embeddings that there are, in the first of its blocks; None: all.
        """
        effects: list[Effect] = []
        entries = self._fills.pop(fill_id, [])
        if kept is not None and entries:
            self._divide(entries, kept)
        for entry in entries:
            entry.fill_id, entry.is_ready, entry.told = None, True, None
            self._touch(entry)
            effects += [
                Ready(holder, tile, entry.block_ids, entry.kept)
                for holder, indices in entry.holders.items()
                for tile in indices
            ]
        return effects + self._grant()

    def fill_failed(self, fill_id: str, *, is_known: bool = True) -> list[Effect]:
        """It writes to its blocks no more. Who was told to see to the tiles may fill them again; ignored when it ended.

        is_known: whoever was told hears of it without this; else it is told anew.
        """
        effects: list[Effect] = []
        for entry in self._fills.pop(fill_id, ()):
            entry.fill_id = None
            if not is_known:
                entry.told = None
            effects += self._settle(entry)
        return effects + self._grant()

    # Inside.

    def _by_index(self, holder: RequestKey) -> dict[int, _Entry]:
        return {i: entry for entry in self._held.get(holder, ()) for i in entry.holders[holder]}

    def _divide(self, entries: list[_Entry], kept: Sequence[KeptEmbeddings]) -> None:
        """Each tile gets the blocks that its embeddings are in; what is left is free."""
        blocks = [block_id for entry in entries for block_id in entry.block_ids]
        at = 0
        for entry, tile in zip(entries, kept, strict=True):
            assert 0 < len(tile) <= entry.num_embeddings, entry
            num_blocks = blocks_needed(len(tile), self._block_size)
            entry.block_ids, entry.kept = tuple(blocks[at : at + num_blocks]), tile
            at += num_blocks
        self._free += blocks[at:]

    def _settle(self, entry: _Entry) -> list[Effect]:
        """What follows when a holder or a fill has left an entry."""
        if entry.is_ready or entry.fill_id is not None or entry.told is not None:
            return []
        if not entry.holders:
            del self._entries[entry.name]
            self._free += entry.block_ids
            return []
        holder, indices = next(iter(entry.holders.items()))
        entry.told = holder
        return [Wanted(holder, (indices[0],))]

    def _grant(self) -> list[Effect]:
        """Give the oldest needs what they ask for, as long as there are blocks."""
        effects: list[Effect] = []
        while self._waiting:
            need = self._waiting[0]
            missing = self._missing(need)
            num_blocks = sum(
                blocks_needed(tile.num_embeddings, self._block_size) for tile in missing.values()
            )
            wanted = {(need.salt, tile.key) for _, tile in need.tiles}
            if not self._make_room(num_blocks, need.salt, wanted):
                break
            self._waiting.popleft()
            effects += self._give(need, missing)
        return effects

    def _missing(self, need: _Need) -> dict[bytes, ImageTile]:
        return {tile.key: tile for _, tile in need.tiles if (need.salt, tile.key) not in self._entries}

    def _make_room(self, num_blocks: int, salt: str, kept: set[tuple[str, bytes]]) -> bool:
        """Evict until there are so many free blocks; False, and nothing is evicted, when that cannot be.

        Tenants that have more than an equal share of the pool lose what they used longest ago, then whoever used his.
        """
        num_held = Counter({salt: 0})
        for entry in self._entries.values():
            num_held[entry.name[0]] += len(entry.block_ids)
        share = self._num_blocks / len(num_held)
        victims: dict[tuple[str, bytes], _Entry] = {}
        num_free = len(self._free)
        for is_anyone in (False, True):
            for entry in self._entries.values():
                if num_free >= num_blocks:
                    break
                owner, size = entry.name[0], len(entry.block_ids)
                is_nobodys = entry.is_ready and not entry.holders and entry.name not in kept
                if is_nobodys and entry.name not in victims and (is_anyone or num_held[owner] > share):
                    victims[entry.name] = entry
                    num_free += size
                    num_held[owner] -= size
        if num_free < num_blocks:
            return False
        for name, entry in victims.items():
            del self._entries[name]
            self._free += entry.block_ids
            self._num_evictions += 1
        return True

    def _give(self, need: _Need, missing: dict[bytes, ImageTile]) -> list[Effect]:
        holder = need.holder
        wanted: list[int] = []
        ready: list[Effect] = []
        for i, tile in need.tiles:
            name = need.salt, tile.key
            entry = self._entries.get(name)
            if entry is None:
                num_blocks = blocks_needed(tile.num_embeddings, self._block_size)
                block_ids = tuple(self._free.pop() for _ in range(num_blocks))
                entry = self._entries[name] = _Entry(name, tile.num_embeddings, block_ids, told=holder)
                wanted.append(i)
            self._num_hits += tile.key not in missing
            if holder not in entry.holders:
                entry.holders[holder] = []
                self._held.setdefault(holder, []).append(entry)
            entry.holders[holder].append(i)
            if entry.is_ready:
                self._touch(entry)
                ready.append(Ready(holder, i, entry.block_ids, entry.kept))
        self._num_misses += len(missing)
        return [Wanted(holder, tuple(wanted)), *ready] if wanted else ready

    def _touch(self, entry: _Entry) -> None:
        self._entries[entry.name] = self._entries.pop(entry.name)

    def check_invariants(self) -> None:
        """Every block is free or of one entry; every entry that is not ready has somebody who sees to it."""
        used = [block_id for entry in self._entries.values() for block_id in entry.block_ids]
        assert sorted([*used, *self._free]) == list(range(self._num_blocks))
        filling = {entry for entries in self._fills.values() for entry in entries}
        for name, entry in self._entries.items():
            assert entry.name == name
            assert (entry.fill_id is not None) == (entry in filling), entry
            assert entry.told is None or entry.told in entry.holders, entry
            if entry.is_ready:
                assert entry.fill_id is None, entry
                assert entry.told is None, entry
            else:
                assert entry.fill_id is not None or entry.told is not None, entry
            for holder, indices in entry.holders.items():
                assert indices, entry
                assert entry in self._held[holder], entry
        for holder, entries in self._held.items():
            assert all(holder in entry.holders for entry in entries)
            assert entries
