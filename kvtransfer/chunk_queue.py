"""The chunks of one sender: which wait, which are on their way, which have to go again. Pure."""

from collections import deque
from collections.abc import Iterable, Iterator

from kvtransfer.codecs.codec import CodecId
from kvtransfer.kv_range import KvRange


class ChunkQueue:
    """Numbers chunks in the order in which they become ready. A number below `num_sent` has left at least once."""

    def __init__(self) -> None:
        #: What each chunk holds; the index is its sequence number. Kept to the end, for repeats.
        self._ranges: list[KvRange] = []
        #: Of each chunk that was read: codec and checksum, which do not change.
        self._read: dict[int, tuple[CodecId, int]] = {}
        #: Sent and neither acknowledged nor rejected -> when it was sent.
        self._in_flight: dict[int, float] = {}
        self._to_repeat: deque[int] = deque()
        self._num_rejections: dict[int, int] = {}
        self._last_ack_s = 0.0
        self.num_sent = 0
        self.num_resent = 0
        #: Time in which at least one chunk was on its way and that ended in its arrival, in seconds.
        self.busy_s = 0.0

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, number: int) -> KvRange:
        return self._ranges[number]

    @property
    def num_in_flight(self) -> int:
        """Sent and neither acknowledged nor rejected."""
        return len(self._in_flight)

    @property
    def is_all_sent(self) -> bool:
        """Every chunk that is known has left, and is not to go again."""
        return len(self._read) == len(self._ranges) and not self._to_repeat

    def extend(self, ranges: Iterable[KvRange]) -> None:
        """More is ready."""
        self._ranges.extend(ranges)

    def take(self, now_s: float) -> int | None:
        """The next one to send, those to repeat first; None when there is none."""
        if self._to_repeat:
            self.num_resent += 1
            number = self._to_repeat.popleft()
        elif self.num_sent < len(self._ranges):
            number = self.num_sent
            self.num_sent += 1
        else:
            return None
        self._in_flight[number] = now_s
        return number

    def was_read(self, number: int, codec: CodecId, checksum: int) -> bool:
        """Note what was sent; False when it is not what was sent under this number before."""
        return self._read.setdefault(number, (codec, checksum)) == (codec, checksum)

    def acknowledge(self, number: int, now_s: float) -> None:
        """It has arrived."""
        sent_at_s = self._in_flight.pop(number, None)
        if sent_at_s is not None:
            self.busy_s += now_s - max(sent_at_s, self._last_ack_s)
            self._last_ack_s = now_s

    def reject(self, number: int) -> int:
        """It has to go again; returns how often it was rejected. Nothing happens while it waits to go again."""
        if number not in self._to_repeat:
            self._in_flight.pop(number, None)
            self._to_repeat.append(number)
            self._num_rejections[number] = self._num_rejections.get(number, 0) + 1
        return self._num_rejections.get(number, 0)

    def forget_repeats(self) -> None:
        """All has arrived."""
        self._to_repeat.clear()

    def restart(self, has: set[int]) -> None:
        """The stream was lost: what was sent and is not there goes again."""
        self._in_flight.clear()
        self._to_repeat = deque(number for number in range(self.num_sent) if number not in has)

    def all_read(self) -> Iterator[tuple[KvRange, int, int]]:
        """Range, codec and checksum of each, in order."""
        return ((where, *self._read[number]) for number, where in enumerate(self._ranges))

    def check_invariants(self) -> None:
        """Each is in one place."""
        assert 0 <= self.num_sent <= len(self._ranges)
        assert all(0 <= number < self.num_sent for number in (*self._in_flight, *self._to_repeat))
        assert not self._in_flight.keys() & set(self._to_repeat)
        assert len(set(self._to_repeat)) == len(self._to_repeat)
