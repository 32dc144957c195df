"""Decode steps of a batch that nothing disturbs: engine and gateway get their tokens later, many at a time. Pure.

Each step still ends at a time of its own, and its message leaves then. But until a message comes, a block is full or a sequence
ends, all that the steps do is to lengthen each sequence by one token, and that is the same whenever it is done, as long as it is before
anybody looks.
"""

import zlib
from bisect import bisect_right

from workers.api import TokensGenerated
from workers.engine.scheduler import StepPlan

VOCAB_SIZE = 32_000


class Leap:
    """plan: of its first step. num_steps: that may be done so. block_size: of the engine's blocks. has_new: some sequence gets the first
    token of its decode, of which the gateway notes when it came.
    """

    def __init__(self, plan: StepPlan, num_steps: int, block_size: int, *, has_new: bool) -> None:
        self.plan = plan
        self.request_ids = frozenset(one.key.request_id for one in plan.decodes)
        self.num_left = num_steps
        self.num_done = 0
        #: Tokens of all sequences, that of the present step included.
        self.context = 0
        #: When the gateway gets the tokens of each step that is done.
        self.arrivals_s: list[float] = []
        self._num_read = 0
        self._has_new = has_new
        self._block_size = block_size
        self._starts: list[int] = []
        #: By the number of a step modulo the size of a block: sequences of which a block is full with it.
        self._full: dict[int, list[int]] = {}
        for i, sequence in enumerate(plan.decodes):
            start = len(sequence.token_ids)
            self._starts.append(start)
            self.context += start
            self._full.setdefault((1 - start) % block_size, []).append(i)

    @property
    def is_read(self) -> bool:
        """The gateway has all its tokens, or they are lost."""
        return self._num_read == len(self.arrivals_s)

    @property
    def unread_s(self) -> list[float]:
        """When the gateway gets what it has not got."""
        return self.arrivals_s[self._num_read :]

    def full(self) -> list[int]:
        """Sequences, by their index, that have filled a block with the present step."""
        return self._full.get((self.num_done + 1) % self._block_size, [])

    def end_step(self) -> None:
        """The present step has ended, and the next one begins."""
        self.num_done += 1
        self.num_left -= 1
        self.context += len(self.plan.decodes)

    def missing(self, index: int) -> list[int]:
        """Tokens of steps that are done that a sequence of the engine does not have."""
        sequence = self.plan.decodes[index]
        end = self._starts[index] + self.num_done
        return tokens_of(sequence.key.request_id, len(sequence.token_ids), end)

    def read(self, now_s: float) -> tuple[list[TokensGenerated], list[float]]:
        """What has come to the gateway by now since the last time: the tokens of each sequence, and when each came.

        To be called until there is none: those of a first step may come by themselves.
        """
        first, end = self._num_read, bisect_right(self.arrivals_s, now_s)
        if self._has_new and first == 0:
            end = min(end, 1)
        self._num_read = end
        if first == end:
            return [], []
        events = []
        for sequence, start in zip(self.plan.decodes, self._starts, strict=True):
            key, position = sequence.key, start + first
            tokens = tokens_of(key.request_id, position, start + end)
            events.append(TokensGenerated(key, tuple(tokens), position))
        return events, self.arrivals_s[first:end]


def tokens_of(request_id: str, start: int, end: int) -> list[int]:
    """The tokens of a request at positions [start, end), whoever computes them."""
    name = zlib.crc32(request_id.encode())
    return [number % VOCAB_SIZE for number in range(name + 7919 * start, name + 7919 * end, 7919)]
