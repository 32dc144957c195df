"""The `phasewise` policy: prediction decides, cheapest lever first. Pure.

Budget of each step, order of the queue, admission, where a request prefills and decodes, shares of the device, and (phase_sets.py)
what phases workers serve. All from one latency model and two targets; docs/policies.md has the argument.
"""

import math
from dataclasses import dataclass

from orchestrator.control.policies.placing import candidates, encoders, least_decoding, missing
from orchestrator.control.policies.policy import (
    ClusterLoad,
    Placement,
    Prompt,
    Reject,
    WorkerLoad,
)
from orchestrator.control.slo import Slo
from workers.api import Phase, WorkerId
from workers.step_choice import Head, Layout, Step, StepChoice, StepPace
from workers.step_cost import StepCost

#: Steps in a row that prompts are left out of at most.
MAX_WAITS = 8
#: Part of the TPOT target that steps are planned to take.
MARGIN = 0.95
#: Tokens of prompts in a step without decodes at most.
MOST_PREFILL_TOKENS = 2048
#: However many decode, some time is left.
MIN_FREE = 0.05


@dataclass(frozen=True, slots=True)
class PhasewiseConfig:
    """What it knows, and its limits.

    slo: the deployment's. tile_s: to encode one tile; 0 where there are no pictures. kv_token_s: to fetch one token's KV from another worker;
    infinite where none is fetched. layouts: measured, none where the device cannot be
    divided. margin: part of the TPOT target that steps are planned to take; max_credit: planned steps that short ones may save for a
    long one. max_prefill_tokens: of a step without decodes. max_waits: see StepChoice. most_encoders: that share the pictures of one request. admission: part of the
    TTFT target up to which a request is taken.
    """

    slo: Slo
    cost: StepCost
    tile_s: float = 0.0
    kv_token_s: float = math.inf
    layouts: tuple[Layout, ...] = ()
    margin: float = MARGIN
    max_credit: float = 1.0
    max_prefill_tokens: int = MOST_PREFILL_TOKENS
    min_chunk_tokens: int = 64
    max_waits: int = MAX_WAITS
    max_tiles: int = 8
    most_encoders: int = 4
    admission: float = 0.8


class PredictedSteps:
    """As much of prompts and pictures beside the decodes as the TPOT target leaves room for, as the engine does it."""

    def __init__(self, config: PhasewiseConfig) -> None:
        self._planned_s = config.margin * config.slo.tpot_s
        self._max_credit = config.max_credit
        self._choice = StepChoice(
            config.cost,
            config.max_prefill_tokens,
            config.min_chunk_tokens,
            config.max_waits,
            config.tile_s,
            config.max_tiles,
            config.layouts,
        )
        self._paces: dict[WorkerId, StepPace] = {}

    def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        num = device.num_decoding
        pace = self._paces.setdefault(device.worker_id, StepPace(self._max_credit))
        pace.begin(now_s, self._planned_s, num_decode_steps=device.num_decode_steps, is_decoding=bool(num))
        return self._choice.step(head, num, device.decode_context, pace)


class PredictedPlacing:
    """Where the first token is predicted to come first, among workers whose sequences stay within their TPOT."""

    def __init__(self, config: PhasewiseConfig) -> None:
        self._config = config
        self._cost = config.cost
        self._tpot_s = config.slo.tpot_s

    def place(self, now_s: float, prompt: Prompt, cluster: ClusterLoad) -> Placement | Reject:
        """See Placing."""
        refusal = missing(now_s, cluster, prompt)
        if refusal is not None:
            return refusal
        chosen = encoders(cluster, prompt, most=self._config.most_encoders)
        encoded_s = self._encoded_s(chosen, prompt)
        looked_at = [(one, prompt.cached_at(one)) for one in candidates(cluster.prefill, prompt.number)]
        holder, most = max(looked_at, key=lambda one: one[1])
        best, best_s, fetch_from = holder, math.inf, None
        for worker, num_cached in looked_at:
            ttft_s = self._ttft_s(worker, prompt, num_cached, encoded_s)
            if ttft_s < best_s:
                best, best_s, fetch_from = worker, ttft_s, None
            if most > num_cached:
                come_s = max(encoded_s, (most - num_cached) * self._config.kv_token_s)
                ttft_s = self._ttft_s(worker, prompt, most, come_s)
                if ttft_s < best_s:
                    best, best_s, fetch_from = worker, ttft_s, holder
        predicted_s = now_s - prompt.arrived_at_s + best_s
        limit_s = self._config.admission * prompt.slo.ttft_s
        if predicted_s > limit_s:
            reason = f"predicted TTFT {predicted_s:.2f} s, target {prompt.slo.ttft_s:.2f} s"
            return Reject(reason, now_s + predicted_s - limit_s)
        decode = best if Phase.DECODE in best.phases else least_decoding(cluster, prompt.number)
        return Placement(best, decode, chosen, fetch_from)

    def _encoded_s(self, chosen: tuple[WorkerLoad, ...], prompt: Prompt) -> float:
        """Until its pictures are encoded; 0 without any."""
        config = self._config
        each = prompt.num_tiles / len(chosen) if chosen else 0.0
        found = 0.0
        for worker in chosen:
            work_s = (worker.encode_tiles + each) * config.tile_s
            if Phase.PREFILL in worker.phases:
                work_s += worker.prefill_tokens * config.cost.token_s
            found = max(found, work_s / self._free(worker))
        return found

    def _ttft_s(self, worker: WorkerLoad, prompt: Prompt, num_cached: int, come_s: float) -> float:
        """Predicted, on this worker: what waits there, or what is to come, and then itself, at the speed that the decodes leave."""
        cost, tile_s = self._cost, self._config.tile_s
        own = prompt.num_tokens - num_cached
        own_s = cost.token_s * own + cost.pair_s * own * (num_cached + own / 2)
        waiting_s = cost.token_s * worker.prefill_tokens + tile_s * worker.encode_tiles
        free = self._free(worker)
        before_s = waiting_s / free
        return (before_s if before_s > come_s else come_s) + own_s / free + cost.overhead_s

    def _free(self, worker: WorkerLoad) -> float:
        """Part of its time that the sequences leave which decode there, or will, at their target."""
        num = worker.num_decoding + worker.num_promised
        if not num or Phase.DECODE not in worker.phases:
            return 1.0
        cost = self._cost
        context = worker.decode_context + worker.promised_context
        step_s = cost.overhead_s + num * cost.decode_s + cost.context_s * context
        return max(MIN_FREE, 1.0 - step_s / self._tpot_s)
