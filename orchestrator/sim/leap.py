"""Decode steps of a batch that nothing disturbs: the engine gets their tokens later, many at a time. Pure.

Each step still ends at a time of its own, and its message leaves then. But until a message comes that changes the batch, a block is full
or a sequence ends, all that the steps do is to lengthen each sequence by one token, and that is the same whenever it is done, as long as it is before
anybody looks.
"""

import zlib

from orchestrator.sim.network import EVENT_BYTES
from workers.engine.step_plan import StepPlan

VOCAB_SIZE = 32_000


class Leap:
    """plan: of its first step. num_steps: that may be done so. block_size: of the engine's blocks. until_s: no step that ends then or later
    is one of them.
    """

    def __init__(self, plan: StepPlan, num_steps: int, block_size: int, until_s: float) -> None:
        self.plan = plan
        self.num_sequences = len(plan.decodes)
        #: Of a step's message that tells of tokens alone.
        self.num_bytes = EVENT_BYTES * self.num_sequences
        self._num_steps = num_steps
        self.num_done = 0
        #: A message has come, which the engine hears when the present step has ended.
        self.is_stopped = False
        self.until_s = until_s
        #: Tokens of all sequences before the first step.
        self._first_context = 0
        #: When the gateway gets the tokens of each step that is done.
        self.arrivals_s: list[float] = []
        self.starts: list[int] = []
        self._block_size = block_size
        #: By the number of a step modulo the size of a block: sequences of which a block is full with it.
        self._full: dict[int, list[int]] = {}
        for i, sequence in enumerate(plan.decodes):
            start = len(sequence.token_ids)
            self.starts.append(start)
            self._first_context += start
            self._full.setdefault((1 - start) % block_size, []).append(i)
        #: By the number of a step modulo the size of a block: steps before the next one with which a block is full.
        self._num_before = [0] * block_size
        for at in reversed(range(2 * block_size)):
            num_before = 0 if at % block_size in self._full else self._num_before[(at + 1) % block_size] + 1
            self._num_before[at % block_size] = num_before
        #: When so many steps are done there is something to do at the end of the next one.
        self.num_calm = self._next_calm()

    @property
    def is_last(self) -> bool:
        """With the present step a sequence ends."""
        return self.num_done == self._num_steps

    @property
    def context(self) -> int:
        """Tokens of all sequences, that of the present step included."""
        return self._first_context + self.num_sequences * self.num_done

    def _next_calm(self) -> int:
        num_done = self.num_done
        return min(self._num_steps, num_done + self._num_before[(num_done + 1) % self._block_size])

    def full(self) -> list[int]:
        """Sequences, by their index, that have filled a block with the present step."""
        return self._full.get((self.num_done + 1) % self._block_size, [])

    def end_step(self) -> None:
        """The present step has ended, which was no calm one, and the next one begins."""
        self.num_done += 1
        self.num_calm = self._next_calm()

    def stop(self) -> None:
        """When the present step has ended, it goes on only if the engine says so."""
        self.is_stopped, self.num_calm = True, self.num_done

    def go_on(self, num_steps: int, until_s: float) -> None:
        """It does, with so many steps from the next one on."""
        self.is_stopped, self._num_steps, self.until_s = False, self.num_done + num_steps, until_s
        self.num_calm = self._next_calm()

    def look(self) -> None:
        """There is something to see to at the end of the present step."""
        self.num_calm = self.num_done

    def missing(self, index: int) -> list[int]:
        """Tokens of steps that are done that a sequence of the engine does not have."""
        sequence = self.plan.decodes[index]
        end = self.starts[index] + self.num_done
        return tokens_of(sequence.key.request_id, len(sequence.token_ids), end)


def token_of(request_id: str, position: int) -> int:
    """The token of a request at a position, whoever computes it: no other position of it has the same, and hardly another request."""
    # With any position it fits into 32 bits, as tokens are hashed.
    return (zlib.crc32(request_id.encode()) >> 1) + position


def tokens_of(request_id: str, start: int, end: int) -> list[int]:
    """Those at positions [start, end)."""
    first = zlib.crc32(request_id.encode()) >> 1
    return [*range(first + start, first + end)]
