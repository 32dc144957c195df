"""Which spans a prompt reuses, and how much is computed all the same. Pure."""

import math
from dataclasses import dataclass

from workers.engine.span_reuse.span_index import Span


@dataclass(frozen=True, slots=True)
class SpanReuse:
    """The rest of a prompt, to be computed in one step with the KV of these spans.

    recompute_fraction: the part of their tokens that is computed again in all layers, 0 to 1.
    """

    spans: tuple[Span, ...]
    recompute_fraction: float

    @property
    def num_reused(self) -> int:
        """Tokens of all spans."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_saved(self) -> int:
        """Tokens that are not computed beyond the first layers."""
        return self.num_reused - num_recomputed(self.num_reused, self.recompute_fraction)

    @property
    def source_block_ids(self) -> tuple[int, ...]:
        """Blocks that are read, each once."""
        return tuple(dict.fromkeys(block_id for span in self.spans for block_id in span.block_ids))


def num_recomputed(num_reused: int, fraction: float) -> int:
    """How many of the reused tokens are computed again; rounded up, for a fraction of 0 to 1."""
    # A product like 0.07 * 100 is a little more than it should be.
    return min(num_reused, math.ceil(num_reused * fraction - 1e-9))
