"""A request of a coarse simulation, from its arrival to its end. Pure."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.bench.plan import PlannedRequest
from orchestrator.control.policies.policy import Job
from orchestrator.control.slo import Slo

if TYPE_CHECKING:
    from orchestrator.sim.coarse_device import CoarseDevice


@dataclass(frozen=True, slots=True)
class CoarseRequest:
    """What comes. hash_ids: of its prompt, each for 512 tokens; num_tiles: of its pictures, whose tokens are in the prompt."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: Slo
    hash_ids: tuple[int, ...] = ()
    num_tiles: int = 0
    tenant: str = ""

    @classmethod
    def of(cls, planned: PlannedRequest, slo: Slo, image_tiles: int = 0) -> "CoarseRequest":
        """A request of a plan. image_tiles: of each of its pictures."""
        return cls(
            planned.arrival_s,
            planned.prompt_tokens,
            planned.output_tokens,
            slo,
            planned.row.hash_ids,
            planned.num_images * image_tiles,
        )


@dataclass(slots=True, eq=False)
class Live:
    """A request on its way. A preempted one computes what it had produced as a part of its prompt."""

    request: CoarseRequest
    number: int
    job: Job
    prefill: "CoarseDevice"
    decode: "CoarseDevice"
    #: Tiles of it that are not encoded, on all workers.
    num_unencoded: int = 0
    num_produced: int = 0
    first_at_s: float | None = None
    #: Step of its decode worker with which it has all its tokens.
    last_step: int = 0

    @property
    def context(self) -> int:
        """Tokens of it that are known."""
        return self.request.prompt_tokens + self.num_produced

    @property
    def num_to_come(self) -> int:
        """Tokens that it has not produced."""
        return self.request.output_tokens - self.num_produced


@dataclass(frozen=True, slots=True)
class CoarseRecord:
    """What became of a request; times are since its arrival. status: OK or REJECTED."""

    request: CoarseRequest
    status: str
    message: str = ""
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def tpot_s(self) -> float | None:
        """None below 2 tokens."""
        num_gaps = self.request.output_tokens - 1
        return (self.last_s - self.first_s) / num_gaps if num_gaps else None

    @property
    def is_met(self) -> bool:
        """It has met both targets."""
        return self.status == "OK" and self.request.slo.is_met(self.first_s, self.tpot_s)


@dataclass(slots=True)
class PrefixBlocks:
    """Blocks of prompts that a worker has kept, of 512 tokens each; those used longest ago go first."""

    blocks: dict[int, None] = field(default_factory=dict)

    def num_cached(self, hash_ids: tuple[int, ...]) -> int:
        """Leading blocks that are here."""
        blocks = self.blocks
        for index, block in enumerate(hash_ids):
            if block not in blocks:
                return index
        return len(hash_ids)

    def keep(self, hash_ids: tuple[int, ...], most: int) -> None:
        """Note that these were used, and keep no more than `most`."""
        blocks = self.blocks
        for block in reversed(hash_ids):
            # The beginning of a prompt is worth more than its end: it is used last.
            blocks.pop(block, None)
            blocks[block] = None
        while len(blocks) > most:
            del blocks[next(iter(blocks))]
