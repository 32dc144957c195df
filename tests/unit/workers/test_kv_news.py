"""What is told of a prefix index: the same, however it was put together."""

from hypothesis import given
from hypothesis import strategies as st

from workers.api import KvBlocksRemoved, KvBlocksStored
from workers.engine.kv_news import KvNews

NAME = st.sampled_from([bytes([i]) for i in range(5)])


def names_told(news: KvNews) -> list[tuple[bytes, bytes]]:
    """(parent, name) of each new block; that of one that is gone has no parent."""
    found = []
    for one in news.take():
        if isinstance(one, KvBlocksRemoved):
            found += [(b"", name) for name in one.hashes]
        else:
            found += list(zip((one.parent, *one.hashes), one.hashes, strict=False))
    return found


@given(st.lists(st.one_of(st.tuples(NAME, st.lists(NAME, max_size=4)), st.lists(NAME, max_size=3))))
def test_each_block_is_told_of_once_in_order_with_its_parent(
    acts: list[tuple[bytes, list[bytes]] | list[bytes]],
) -> None:
    news, wanted = KvNews(), []
    news.watch(())
    for act in acts:
        if isinstance(act, tuple):
            parent, names = act
            news.stored(parent, names)
            wanted += list(zip((parent, *names), names, strict=False))
        else:
            news.removed(act)
            wanted += [(b"", name) for name in act]
    assert bool(news) == bool(wanted)
    assert names_told(news) == wanted
    assert not news


def test_blocks_that_follow_on_each_other_are_one_event() -> None:
    news = KvNews()
    news.stored(b"root", [b"unseen"])
    news.watch([KvBlocksStored(b"root", (b"a",), is_known=True)])
    news.stored(b"a", [b"b", b"c"])
    news.stored(b"c", [b"d"])
    news.stored(b"c", [b"e"])
    assert news.take() == [
        KvBlocksStored(b"root", (b"a",), is_known=True),
        KvBlocksStored(b"a", (b"b", b"c", b"d")),
        KvBlocksStored(b"c", (b"e",)),
    ]
