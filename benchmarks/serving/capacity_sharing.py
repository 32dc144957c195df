"""The shares that published policies decide, on the steps of an engine: what the simulator's policies are asked for is asked of them here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.control.policies.partitioned import CHUNK_TOKENS, NexusSteps, SemiPdSteps
from orchestrator.control.policies.policy import Ended, WorkerLoad
from orchestrator.control.slo import Slo
from workers.api import Phase, WorkerId
from workers.device.sm_layouts import SmLayout
from workers.engine.sharing import Load, Sharing, SharingLog, predicted_sharing
from workers.latency_model import LatencyModel
from workers.step_choice import Exclusive, Step
from workers.step_cost import StepCost

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
GPU = WorkerId("gpu")
DECODE_ALONE = Exclusive(Phase.DECODE, 0)


class NexusSharing:
    """Nexus: the split of its cost model and search; a phase without work leaves the device to the other."""

    def __init__(self, latency: LatencyModel, block_size: int) -> None:
        self._steps = NexusSteps(latency)
        self._block_size = block_size

    def step(self, now_s: float, load: Load) -> Step:
        """See Sharing."""
        if not load.head.num_left:
            return DECODE_ALONE
        return self._steps.step(now_s, _device(load, self._block_size), load.head)


class SemiPdSharing:
    """semi-PD: the percentages of its algorithm, which bind whatever the other phase does. Where they add up to more than 100, the parts of the two overlap."""

    def __init__(self, cost: StepCost, slo: Slo, block_size: int) -> None:
        self._steps = SemiPdSteps(cost, slo)
        self._slo = slo
        self._block_size = block_size

    def step(self, now_s: float, load: Load) -> Step:
        """See Sharing."""
        return self._steps.step(now_s, _device(load, self._block_size), load.head)

    def told(self, now_s: float, ttft_s: float, tpot_s: float | None) -> None:
        """A request has ended."""
        self._steps.told(now_s, Ended(GPU, GPU, ttft_s, tpot_s, self._slo))


@dataclass(frozen=True, slots=True)
class Sharer:
    """What policies are made of. layouts: that the device can make."""

    latency: LatencyModel
    slo: Slo
    block_size: int
    layouts: Sequence[SmLayout]

    def of(self, name: str) -> Sharing:
        """nexus, semi_pd or phasewise, at its beginning."""
        match name:
            case "nexus":
                return NexusSharing(self.latency, self.block_size)
            case "semi_pd":
                return SemiPdSharing(StepCost.of(self.latency), self.slo, self.block_size)
            case _:
                return predicted_sharing(self.latency, self.layouts, CHUNK_TOKENS)


def shared_row(log: SharingLog) -> dict[str, Any]:
    """What a report says of it: parts of the time in which the device computed, by layout, and how often it changed."""
    total_s = sum(log.seconds.values())
    parts = {name: seconds / total_s for name, seconds in sorted(log.seconds.items())} if total_s else {}
    return {"layouts": parts, "num_layout_switches": log.num_switches}


def _device(load: Load, block_size: int) -> WorkerLoad:
    blocks, work = load.blocks, load.work
    return WorkerLoad(
        GPU,
        BOTH,
        kv_capacity=blocks.total * block_size,
        prefill_tokens=work.prefill_tokens,
        num_prefills=work.num_prefills,
        num_decoding=work.num_decoding,
        decode_context=work.decode_context,
        kv_tokens=(blocks.in_use + blocks.leased) * block_size,
    )
