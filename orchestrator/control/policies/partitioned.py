"""semi-PD and Nexus on a device: prompts and decodes as two streams with shares of the SMs. Pure.

The algorithms are semi_pd.py and nexus.py; here is what calls them at a device's steps. Pictures go with the prompts.
"""

import math
from dataclasses import dataclass, field

from orchestrator.control.policies import nexus, semi_pd
from orchestrator.control.policies.nexus_cost import (
    CostModel,
    Law,
    Peaks,
    decode_operators,
    prefill_operators,
)
from orchestrator.control.policies.policy import Ended, WorkerLoad
from orchestrator.control.slo import Slo, percentile
from workers.api import Phase, WorkerId
from workers.latency_model import LatencyModel
from workers.step_choice import Exclusive, Head, Split, Step
from workers.step_cost import StepCost
from workers.step_shape import chunk, decodes

#: Tokens of one chunk, and tiles.
CHUNK_TOKENS, TILES = 2048, 8
#: semi-PD: steps of a window, and the percentile that is looked at; the paper has no number for either.
WINDOW_STEPS, PERCENT = 64, 90.0
#: Both streams may use all SMs.
UNDIVIDED = semi_pd.Partition(100, 100)
#: Nexus: percent by which a split must differ to be applied, and the least of a stage; one layout of 8 SMs is 6 %.
DELTA, LEAST = 5, 6


@dataclass(slots=True)
class _Window:
    estimator: semi_pd.Estimator
    partition: semi_pd.Partition = UNDIVIDED
    switched_at_s: float = -math.inf
    num_steps: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)


class SemiPdSteps:
    """Each device adjusts its own percentages, which bind whatever the other side does: an MPS process has them."""

    def __init__(self, cost: StepCost, slo: Slo) -> None:
        self._cost = cost
        self._slo = slo
        self._windows: dict[WorkerId, _Window] = {}

    def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        window = self._window(device.worker_id)
        window.num_steps += 1
        if window.num_steps >= WINDOW_STEPS:
            self._adjust(now_s, window, now_s - (head.deadline_s - self._slo.ttft_s))
        partition = window.partition
        return Split(partition.prefill / 100, partition.decode / 100, CHUNK_TOKENS, TILES, is_binding=True)

    def told(self, _now_s: float, ended: Ended) -> None:
        """Latencies of a request count where it ran."""
        self._window(ended.prefilled_by).ttfts_s.append(ended.ttft_s)
        if ended.tpot_s is not None:
            self._window(ended.decoded_by).tpots_s.append(ended.tpot_s)

    def _window(self, worker_id: WorkerId) -> _Window:
        window = self._windows.get(worker_id)
        if window is None:
            ttft = semi_pd.queueing_curve(1.0, self._cost.prompt_s(1000))
            tpot = semi_pd.TpotCurve(100.0 * self._cost.step_s(64, 64_000), 0.0)
            window = self._windows[worker_id] = _Window(semi_pd.Estimator(ttft, tpot))
        return window

    def _adjust(self, now_s: float, window: _Window, age_s: float) -> None:
        ages = [age_s] if math.isfinite(age_s) and age_s > 0 else []
        ttft_s = semi_pd.observed_ttft_s(window.ttfts_s, ages, PERCENT)
        tpot_s = percentile(sorted(window.tpots_s), PERCENT) if window.tpots_s else None
        window.estimator.observe(window.partition, ttft_s, tpot_s)
        adjusted = semi_pd.adjust(
            window.partition,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            slo=self._slo,
            estimator=window.estimator,
            settings=semi_pd.Settings(cooldown_s=5.0),
            since_switch_s=now_s - window.switched_at_s,
        )
        if adjusted.partition != window.partition:
            window.partition, window.switched_at_s = adjusted.partition, now_s
        window.num_steps, window.ttfts_s, window.tpots_s = 0, [], []


class NexusSteps:
    """Predicts both stages for each split, and gives a stage without work's SMs to the other."""

    def __init__(self, latency: LatencyModel) -> None:
        self._model = latency.model
        self._peaks = Peaks(latency.device.flops_per_s, latency.device.bytes_per_s)
        self._splits: dict[WorkerId, nexus.Split] = {}
        self._goals: dict[WorkerId, Phase] = {}

    def step(self, _now_s: float, device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        if not device.num_decoding:
            phase = Phase.PREFILL if head.num_left else Phase.ENCODE
            return Exclusive(phase, CHUNK_TOKENS if head.num_left else TILES)
        split = self._split(device, head)
        return Split(split.prefill / 100, split.decode / 100, CHUNK_TOKENS, TILES)

    def _split(self, device: WorkerLoad, head: Head) -> nexus.Split:
        worker_id, num = device.worker_id, device.num_decoding
        new = chunk(max(1, min(head.num_left, CHUNK_TOKENS)), head.num_done)
        step = decodes(num, device.decode_context)
        model = CostModel(
            prefill_operators(self._model, new, head.num_done),
            decode_operators(self._model, step),
            self._peaks,
            Law.RATE_SHARE,
        )
        goal = nexus.target(
            device.kv_tokens / device.kv_capacity, self._goals.get(worker_id), hysteresis=0.03
        )
        now = self._splits.get(worker_id, nexus.Split(50, 50))
        best_s = model.prefill_s(100) if goal is Phase.DECODE else model.decode_best_s(now.prefill)

        def cost(phase: Phase, percent: int) -> float:
            return model.prefill_s(percent) if phase is Phase.PREFILL else model.decode_s(percent)

        choice = nexus.choose(
            goal,
            now,
            cost,
            is_prefilling=True,
            is_decoding=True,
            delta=DELTA,
            best_s=best_s,
            least=LEAST,
        )
        self._goals[worker_id], self._splits[worker_id] = goal, choice.split
        return choice.split
