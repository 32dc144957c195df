"""EmbeddingStore: nothing is lost, filled twice or waited for in vain, whatever comes in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.api import ImageTile, RequestId, RequestKey
from workers.embeddings.kept import KeptEmbeddings
from workers.embeddings.store import CannotFill, Effect, EmbeddingStore, NotNeeded, Ready, Wanted

BLOCK_SIZE = 4


def _key(number: int) -> RequestKey:
    return RequestKey(RequestId(f"r{number}"), number)


def _tile(name: str, num_embeddings: int = 4) -> ImageTile:
    return ImageTile(0, num_embeddings, name.encode())


def test_a_tile_is_wanted_once_and_ready_for_all_that_need_it() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    assert store.need(_key(1), [(0, _tile("a")), (1, _tile("b", 5))], "") == [Wanted(_key(1), (0, 1))]
    assert store.need(_key(2), [(7, _tile("a"))], "") == []
    blocks = store.begin_fill("f", _key(1), [0, 1])
    assert len(blocks) == 3
    effects = store.filled("f")
    assert set(effects) == {
        Ready(_key(1), 0, blocks[:1]),
        Ready(_key(2), 7, blocks[:1]),
        Ready(_key(1), 1, blocks[1:]),
    }
    assert store.need(_key(3), [(2, _tile("b", 5))], "") == [Ready(_key(3), 2, blocks[1:])]
    store.check_invariants()


def test_blocks_that_merged_embeddings_do_not_need_are_free() -> None:
    store = EmbeddingStore(8, BLOCK_SIZE)
    tiles = [(0, _tile("a", 8)), (1, _tile("b", 12)), (2, _tile("c", 9))]
    store.need(_key(1), tiles, "")
    blocks = store.begin_fill("f", _key(1), [0, 1, 2])
    assert store.counts().num_free == 0
    assert store.sizes_of("f") == [8, 12, 9]
    kept = [
        KeptEmbeddings(offsets, (False,) * len(offsets))
        for offsets in ((0, 3), (1, 2, 5, 9, 11), tuple(range(9)))
    ]
    assert store.filled("f", kept) == [
        Ready(_key(1), 0, blocks[:1], kept[0]),
        Ready(_key(1), 1, blocks[1:3], kept[1]),
        Ready(_key(1), 2, blocks[3:6], kept[2]),
    ]
    assert store.counts().num_free == 2
    store.check_invariants()
    # Cached, it is as it was filled.
    store.release(_key(1))
    assert store.need(_key(2), [(7, _tile("b", 12))], "") == [Ready(_key(2), 7, blocks[1:3], kept[1])]
    store.check_invariants()


def test_another_salt_shares_nothing() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a"))], "one")
    assert store.need(_key(2), [(0, _tile("a"))], "two") == [Wanted(_key(2), (0,))]
    store.check_invariants()


def test_the_same_picture_twice_in_a_prompt_is_filled_once() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    assert store.need(_key(1), [(0, _tile("a")), (1, _tile("a"))], "") == [Wanted(_key(1), (0,))]
    blocks = store.begin_fill("f", _key(1), [0])
    assert store.filled("f") == [Ready(_key(1), 0, blocks), Ready(_key(1), 1, blocks)]
    store.check_invariants()


def test_the_next_is_told_when_the_one_that_sees_to_it_leaves() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a"))], "")
    store.need(_key(2), [(3, _tile("a"))], "")
    assert store.release(_key(1)) == [Wanted(_key(2), (3,))]
    # With a fill on its way it is told only if that fails.
    store.begin_fill("f", _key(2), [3])
    store.need(_key(4), [(5, _tile("a"))], "")
    assert store.release(_key(2)) == []
    assert store.fill_failed("f") == [Wanted(_key(4), (5,))]
    store.check_invariants()


def test_blocks_of_a_fill_are_nobodys_until_it_ends() -> None:
    store = EmbeddingStore(1, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a"))], "")
    store.begin_fill("f", _key(1), [0])
    assert store.release(_key(1)) == []
    assert store.need(_key(2), [(0, _tile("b"))], "") == []
    # What came although nobody waits for it is cached, and makes room at once.
    assert store.filled("f") == [Wanted(_key(2), (0,))]
    store.check_invariants()


def test_the_entry_used_longest_ago_makes_room() -> None:
    store = EmbeddingStore(2, BLOCK_SIZE)
    for number, name in enumerate("ab"):
        store.need(_key(number), [(0, _tile(name))], "")
        store.begin_fill(name, _key(number), [0])
        store.filled(name)
        store.release(_key(number))
    store.need(_key(3), [(0, _tile("a"))], "")
    store.release(_key(3))
    assert store.need(_key(4), [(0, _tile("c"))], "") == [Wanted(_key(4), (0,))]
    assert isinstance(store.need(_key(5), [(0, _tile("a"))], "")[0], Ready)
    assert store.counts().num_evictions == 1
    store.check_invariants()


def _cache(store: EmbeddingStore, number: int, name: str, salt: str) -> None:
    store.need(_key(number), [(0, _tile(name))], salt)
    store.begin_fill(name + salt, _key(number), [0])
    store.filled(name + salt)
    store.release(_key(number))


def test_a_tenant_of_many_pictures_makes_room_by_its_own() -> None:
    store = EmbeddingStore(8, BLOCK_SIZE)
    _cache(store, 1, "a", "small")
    _cache(store, 2, "b", "small")
    for number in range(3, 40):
        _cache(store, number, f"picture {number}", "large")
        store.check_invariants()
    # What the small one used is older than all of the other's, and still there.
    for number, name in ((50, "a"), (51, "b")):
        assert isinstance(store.need(_key(number), [(0, _tile(name))], "small")[0], Ready)


def test_a_tenant_alone_has_all_of_the_pool_and_gives_of_it_when_another_comes() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    for number in range(4):
        _cache(store, number, f"picture {number}", "first")
    assert store.counts().num_evictions == 0
    for number in range(10, 14):
        _cache(store, number, f"picture {number}", "second")
    # An equal share each.
    for number, name, salt in ((20, "picture 3", "first"), (21, "picture 13", "second")):
        assert isinstance(store.need(_key(number), [(0, _tile(name))], salt)[0], Ready)


def test_a_need_is_granted_whole_and_in_order() -> None:
    store = EmbeddingStore(3, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a")), (1, _tile("b"))], "")
    assert store.need(_key(2), [(0, _tile("c")), (1, _tile("d"))], "") == []
    # It would fit, and waits its turn.
    assert store.need(_key(3), [(0, _tile("e"))], "") == []
    assert store.release(_key(1)) == [Wanted(_key(2), (0, 1)), Wanted(_key(3), (0,))]
    store.check_invariants()


def test_what_is_not_wanted_is_not_filled() -> None:
    store = EmbeddingStore(2, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a"))], "")
    with pytest.raises(CannotFill, match="not wanted"):
        store.begin_fill("f", _key(1), [1])
    with pytest.raises(CannotFill, match="not wanted"):
        store.begin_fill("f", _key(2), [0])
    store.begin_fill("f", _key(1), [0])
    with pytest.raises(CannotFill, match="already"):
        store.begin_fill("g", _key(1), [0])
    store.check_invariants()


def test_of_a_shard_that_is_not_needed_only_what_nobody_sees_to_is_wanted_again() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    tiles = [(i, _tile(name)) for i, name in enumerate("abc")]
    store.need(_key(1), tiles, "")
    store.begin_fill("first", _key(1), [0])
    store.filled("first")
    store.begin_fill("other", _key(1), [1])
    assert store.fills_of(_key(1), [0, 1, 2]) == {"other"}
    with pytest.raises(NotNeeded):
        store.begin_fill("late", _key(1), [0, 1, 2])
    assert store.want_again(_key(1), [0, 1, 2]) == [Wanted(_key(1), (2,))]
    # Nobody else would bring it now.
    assert store.fill_failed("other") == [Wanted(_key(1), (1,))]
    assert store.want_again(_key(2), [0]) == []
    store.check_invariants()


def test_what_came_spoiled_is_wanted_again() -> None:
    store = EmbeddingStore(4, BLOCK_SIZE)
    store.need(_key(1), [(0, _tile("a"))], "")
    store.begin_fill("f", _key(1), [0])
    assert store.fill_failed("f", is_known=False) == [Wanted(_key(1), (0,))]
    store.begin_fill("g", _key(1), [0])
    # Its sender knows.
    assert store.fill_failed("g") == []
    store.check_invariants()


def test_a_request_that_never_fits_is_told_so() -> None:
    store = EmbeddingStore(2, BLOCK_SIZE)
    assert store.problem([_tile("a", 8), _tile("a", 8)]) is None
    assert "need 3 blocks" in (store.problem([_tile("a", 8), _tile("b", 1)]) or "")


class _AnyOrder(RuleBasedStateMachine):
    """Every need that fits is granted in the end, if fills end and holders leave."""

    def __init__(self) -> None:
        super().__init__()
        self.store = EmbeddingStore(6, BLOCK_SIZE)
        self.needs: dict[RequestKey, dict[int, ImageTile]] = {}
        self.wanted: dict[RequestKey, set[int]] = {}
        self.ready: dict[RequestKey, dict[int, tuple[int, ...]]] = {}
        self.fills: dict[str, tuple[RequestKey, tuple[int, ...]]] = {}
        #: Fills of which nobody hears that they failed.
        self.unheard: set[str] = set()
        self.content: dict[int, bytes] = {}
        self.number = 0

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert effect.holder in self.needs
            if isinstance(effect, Wanted):
                self.wanted[effect.holder] |= set(effect.tiles)
            else:
                tile = self.needs[effect.holder][effect.tile]
                assert all(self.content[block_id] == tile.key for block_id in effect.block_ids)
                self.ready[effect.holder][effect.tile] = effect.block_ids

    @rule(names=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3))
    def need(self, names: list[str]) -> None:
        self.number += 1
        key = _key(self.number)
        tiles = {i: _tile(name, 1 + 2 * (ord(name) % 4)) for i, name in enumerate(names)}
        if self.store.problem(list(tiles.values())) is not None:
            return
        self.needs[key], self.wanted[key], self.ready[key] = tiles, set(), {}
        self._apply(self.store.need(key, list(tiles.items()), ""))

    @precondition(lambda self: any(self.wanted.values()))
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key, tiles in self.wanted.items() if tiles]))
        tiles = tuple(sorted(self.wanted[key]))
        self.number += 1
        name = f"fill{self.number}"
        blocks = self.store.begin_fill(name, key, tiles)
        # A ready tile's blocks are never given to be written to.
        held = [b for ready in self.ready.values() for some in ready.values() for b in some]
        assert not set(held) & set(blocks)
        at = 0
        for tile in tiles:
            num = -(-self.needs[key][tile].num_embeddings // BLOCK_SIZE)
            for block_id in blocks[at : at + num]:
                self.content[block_id] = self.needs[key][tile].key
            at += num
        self.fills[name] = key, tiles
        self.wanted[key] = set()

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), is_good=st.booleans(), is_known=st.booleans())
    def end(self, data: st.DataObject, is_good: bool, is_known: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.fills)))
        if is_good:
            del self.fills[name]
            self._apply(self.store.filled(name))
        else:
            self._fail(name, is_known=is_known)

    def _fail(self, name: str, *, is_known: bool = True) -> None:
        key, tiles = self.fills.pop(name)
        if is_known and key in self.needs and name not in self.unheard:
            self.wanted[key] |= set(tiles)
        self._apply(self.store.fill_failed(name, is_known=is_known))

    @precondition(lambda self: self.needs)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Its encoders are done, they say: what they have not brought is wanted again."""
        key = data.draw(st.sampled_from(sorted(self.needs, key=lambda one: one.attempt)))
        self.unheard |= {name for name, (holder, _) in self.fills.items() if holder == key}
        wanted, self.wanted[key] = self.wanted[key], set()
        self._apply(self.store.want_again(key, sorted(self.needs[key])))
        assert self.wanted[key] == wanted

    @precondition(lambda self: self.needs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.needs, key=lambda one: one.attempt)))
        for some in (self.needs, self.wanted, self.ready):
            del some[key]
        self._apply(self.store.release(key))

    @invariant()
    def holds(self) -> None:
        self.store.check_invariants()

    def teardown(self) -> None:
        # Whatever has happened: when fills end well and holders leave once they have all, nobody waits for ever.
        for name in list(self.fills):
            self._fail(name)
        while any(self.wanted.values()) or any(map(self._has_all, self.needs)):
            for key, tiles in self.wanted.items():
                if tiles:
                    name = f"last-{key.attempt}-{sorted(tiles)}"
                    blocks = self.store.begin_fill(name, key, sorted(tiles))
                    self.content.update(dict.fromkeys(blocks, b""))
                    at = 0
                    for tile in sorted(tiles):
                        num = -(-self.needs[key][tile].num_embeddings // BLOCK_SIZE)
                        self.content.update(dict.fromkeys(blocks[at : at + num], self.needs[key][tile].key))
                        at += num
                    self.wanted[key] = set()
                    self._apply(self.store.filled(name))
                    break
            for key in [key for key in self.needs if self._has_all(key)]:
                for some in (self.needs, self.wanted, self.ready):
                    del some[key]
                self._apply(self.store.release(key))
        assert not self.needs
        self.store.check_invariants()

    def _has_all(self, key: RequestKey) -> bool:
        return len(self.ready[key]) == len(self.needs[key])


_AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = _AnyOrder.TestCase
