"""What a device's next step computes of prompts and pictures beside its decodes, by prediction. Pure.

The engine's scheduler and the coarse simulator's `phasewise` policy decide by this. Decodes take part in every step; what the target
for TPOT leaves beside them is for prompts, on average over a few steps. A mixed step takes what its parts take together, less an
overhead and reading the weights once: one with prompts alone beside decodes that wait would never be sooner done with either, and is
chosen only where nothing decodes.
"""

from dataclasses import dataclass

from workers.api import Phase
from workers.step_cost import StepCost

#: A split has to be so much better than a mixed batch: its speeds are means over batches, and changing it is not free.
SPLIT_GAIN = 1.1


@dataclass(frozen=True, slots=True)
class Mixed:
    """All decodes, and of prompts what is left of the budget, in one step; before it tiles of pictures, which cannot ride with others."""

    token_budget: int
    num_tiles: int = 0


@dataclass(frozen=True, slots=True)
class Exclusive:
    """One phase alone, on the whole device. budget: tokens of prompts, or tiles; of no meaning for decode."""

    phase: Phase
    budget: int


@dataclass(frozen=True, slots=True)
class Split:
    """Prompts and pictures beside decodes, each on a share of the SMs, 0 to 1. budget: tokens of prompts.

    Shares whose sum is above 1 overlap: two streams that the device arbitrates. is_binding: decode keeps to its share while the other
    side has nothing to do.
    """

    prefill_share: float
    decode_share: float
    budget: int
    num_tiles: int = 0
    is_binding: bool = False


Step = Mixed | Exclusive | Split


@dataclass(frozen=True, slots=True)
class Layout:
    """A division of the device that it can make, and the speed of each side beside that of the whole device, both busy."""

    prefill_share: float
    decode_share: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True, slots=True)
class Head:
    """What a device could begin. num_tiles: that wait. num_left: tokens of the first prompt, 0 for none; num_done: known ones of it.

    deadline_s: of the first token of that prompt; tiles_deadline_s: of the request of the first tiles; infinity for none.
    """

    num_tiles: int
    num_left: int
    num_done: int
    deadline_s: float
    tiles_deadline_s: float


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What is known, and the limits.

    layouts: measured, none where the device cannot be divided: then no split is chosen. max_prefill_tokens: of prompts in one step.
    min_chunk_tokens: fewer are not worth a step. max_waits: steps in a row that prompts are left out of for the target, at most; the
    next one has min_chunk_tokens of them, whatever it takes. tile_s: to encode one tile; 0 where there are no pictures.
    """

    cost: StepCost
    max_prefill_tokens: int
    min_chunk_tokens: int
    max_waits: int
    tile_s: float = 0.0
    max_tiles: int = 0
    layouts: tuple[Layout, ...] = ()

    def step(self, head: Head, num_decoding: int, decode_context: int, pace: "StepPace") -> Step:
        """The next one. pace: of the device, which has begun this step."""
        if not num_decoding:
            if head.num_tiles and not head.num_left:
                return Exclusive(Phase.ENCODE, self.max_tiles)
            return Mixed(self.max_prefill_tokens, self.max_tiles)
        if self.layouts and (split := self.split(num_decoding, decode_context, pace.planned_s)) is not None:
            return split
        step = self._beside(head, num_decoding, decode_context, pace.limit_s)
        if not isinstance(step, Exclusive):
            pace.num_waits = 0
        elif pace.num_waits >= self.max_waits and head.num_left:
            pace.num_waits = 0
            return Mixed(num_decoding + self.min_chunk_tokens)
        else:
            pace.num_waits += 1
        return step

    def _beside(self, head: Head, num: int, context: int, limit_s: float) -> Step:
        cost = self.cost
        left_s = limit_s - cost.step_s(num, context)
        num_tiles = 0
        if head.num_tiles:
            if head.deadline_s <= head.tiles_deadline_s:
                # A prompt whose turn comes before that of the pictures leaves them the rest.
                left_s -= head.num_left * (cost.token_s + cost.pair_s * head.num_done)
            num_tiles = max(0, min(self.max_tiles, head.num_tiles, round(left_s / self.tile_s)))
        budget = 0
        if head.num_left:
            limit_s -= num_tiles * self.tile_s
            budget = cost.tokens_within(num, context, head.num_done, limit_s)
        if budget >= self.min_chunk_tokens:
            return Mixed(num + budget, num_tiles)
        return Mixed(num, num_tiles) if num_tiles else Exclusive(Phase.DECODE, 0)

    def split(self, num: int, context: int, planned_s: float) -> Split | None:
        """Streams side by side, where prompts get further so than in mixed batches and the decodes still meet their target.

        num, context: of the decodes. planned_s: of a step with them. In a mixed batch prompts have the time that the decodes leave, whose weights are read with theirs.
        """
        cost = self.cost
        alone_s = cost.step_s(num, context)
        fit = [one for one in self.layouts if alone_s <= planned_s * one.decode_rate]
        best = max(fit, key=lambda one: one.prefill_rate, default=None)
        if best is None:
            return None
        beside_s = cost.overhead_s + cost.token_s * num + cost.context_s * context
        if best.prefill_rate <= SPLIT_GAIN * (1 - beside_s / planned_s):
            return None
        return Split(best.prefill_share, best.decode_share, self.max_prefill_tokens, self.max_tiles)


@dataclass(slots=True)
class StepPace:
    """By how much the last steps of a device's decodes were shorter than planned, and what the next one may take for that.

    max_credit: planned steps that short ones may save for a long one: TPOT is a mean, but sequences that have just joined have saved
    nothing.
    """

    max_credit: float = 1.0
    planned_s: float = 0.0
    #: How long the next step may take.
    limit_s: float = 0.0
    #: Steps in a row that prompts were left out of.
    num_waits: int = 0
    _at_s: float | None = None
    _num_steps: int = 0
    _credit_s: float = 0.0

    def begin(self, now_s: float, planned_s: float, *, num_decode_steps: int, is_decoding: bool) -> None:
        """A step is chosen. planned_s: that one is to take. num_decode_steps: that the device has begun so far."""
        self.planned_s = planned_s
        if self._at_s is None or not is_decoding:
            self._credit_s = 0.0
        else:
            num_steps = num_decode_steps - self._num_steps
            credit_s = self._credit_s + planned_s * num_steps - (now_s - self._at_s)
            self._credit_s = min(max(credit_s, -planned_s), self.max_credit * planned_s)
        self._at_s, self._num_steps = now_s, num_decode_steps
        self.limit_s = planned_s + self._credit_s
