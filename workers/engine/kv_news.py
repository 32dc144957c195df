"""What is to be told of a prefix index, in order. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.api import KvBlocksRemoved, KvBlocksStored


@dataclass(slots=True)
class _Chain:
    """New blocks, each the child of the one before it. parent: of the first."""

    parent: bytes
    names: list[bytes]


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
        if isinstance(last, _Chain) and last.names[-1] == parent:
            last.names += names
        else:
            self._news.append(_Chain(parent, [*names]))

    def removed(self, names: Sequence[bytes]) -> None:
        """These cannot be found any more."""
        if names and self.is_watched:
            self._news.append(KvBlocksRemoved(tuple(names)))

    def take(self) -> list[KvBlocksStored | KvBlocksRemoved]:
        """What has come since the last time."""
        news, self._news = self._news, []
        return [
            KvBlocksStored(one.parent, tuple(one.names)) if isinstance(one, _Chain) else one for one in news
        ]
