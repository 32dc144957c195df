"""Sequences that are decoded here and go on elsewhere: which of them can leave now, and with what. Pure."""

from workers.api import Migrate, RequestKey, SuperposedDecoding
from workers.engine.sequence import Sequence, SequenceState


class Migrations:
    """Those that were asked for and have not left yet. One that cannot leave between these two steps is asked again."""

    def __init__(self) -> None:
        self._asked: dict[RequestKey, Migrate] = {}

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, migrate: Migrate) -> None:
        """It leaves as soon as it can; the last word about where to holds."""
        self._asked[migrate.key] = migrate

    def forget(self, key: RequestKey) -> None:
        """It has ended, or has left."""
        self._asked.pop(key, None)

    def asked(self) -> list[Migrate]:
        """All of them."""
        return list(self._asked.values())


def can_migrate(sequence: Sequence) -> bool:
    """Between two steps: all its tokens but the last have their KV, and that is all there is of it.

    A superposed decoding is more than its tokens, and ends soon.
    """
    return sequence.state is SequenceState.DECODE and not isinstance(
        sequence.sampling.decoding, SuperposedDecoding
    )
