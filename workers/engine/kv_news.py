"""What is to be told of a prefix index, in order. Pure."""

from collections.abc import Iterable, Sequence

from workers.api import KvBlocksRemoved, KvBlocksStored

#: New blocks, each the child of the one before it: the parent of the first, then their names.
_Chain = list[bytes]


class KvNews:
    """Nothing is kept before somebody watches. New blocks that follow on each other are told of together."""

    def __init__(self) -> None:
        self.is_watched = False
        self._news: list[_Chain | KvBlocksStored | KvBlocksRemoved] = []

    def __bool__(self) -> bool:
        """`take` has something."""
        return bool(self._news)

    def watch(self, known: Iterable[KvBlocksStored]) -> None:
        """From now on all is told, beginning with what is known."""
        self.is_watched = True
        self._news += known

    def stored(self, parent: bytes, names: Sequence[bytes]) -> None:
        """These can be found, each the child of the one before it."""
        if not self.is_watched or not names:
            return
        last = self._news[-1] if self._news else None
        if isinstance(last, list) and last[-1] == parent:
            last += names
        else:
            self._news.append([parent, *names])

    def removed(self, names: Sequence[bytes]) -> None:
        """These cannot be found any more."""
        if names and self.is_watched:
            self._news.append(KvBlocksRemoved(tuple(names)))

    def take(self) -> list[KvBlocksStored | KvBlocksRemoved]:
        """What has come since the last time."""
        if not self._news:
            return []
        news, self._news = self._news, []
        return [KvBlocksStored(one[0], tuple(one[1:])) if isinstance(one, list) else one for one in news]
