"""The `phasewise` policy: prediction decides, cheapest lever first. Pure.

Budget of each step, order of the queue, admission, where a request prefills and decodes, shares of the device, and (phase_sets.py)
what phases workers serve. All from one latency model and two targets; docs/policies.md has the argument.
"""

import math
from dataclasses import dataclass

from orchestrator.control.policies.placing import candidates, encoders, least_decoding, missing
from orchestrator.control.policies.policy import (
    ClusterLoad,
    Exclusive,
    Head,
    Mixed,
    Placement,
    Prompt,
    Reject,
    Split,
    Step,
    WorkerLoad,
)
from orchestrator.control.slo import Slo
from workers.api import Phase, WorkerId
from workers.step_cost import StepCost

#: However many decode, some time is left.
MIN_FREE = 0.05
#: A split has to be so much better than a mixed batch: its speeds are means over batches, and changing it is not free.
SPLIT_GAIN = 1.1


@dataclass(frozen=True, slots=True)
class Layout:
    """A division of the device that it can make, and the speed of each side beside that of the whole device, both busy."""

    prefill_share: float
    decode_share: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True, slots=True)
class PhasewiseConfig:
    """What it knows, and its limits.

    slo: the deployment's. tile_s: to encode one tile; 0 where there are no pictures. kv_token_s: to fetch one token's KV from another worker;
    infinite where none is fetched. layouts: measured, none where the device cannot be
    divided. margin: part of the TPOT target that steps are planned to take; max_credit: planned steps that short ones may save for a
    long one. max_prefill_tokens: of a step without decodes. most_encoders: that share the pictures of one request. admission: part of the
    TTFT target up to which a request is taken.
    """

    slo: Slo
    cost: StepCost
    tile_s: float = 0.0
    kv_token_s: float = math.inf
    layouts: tuple[Layout, ...] = ()
    margin: float = 0.95
    max_credit: float = 1.0
    max_prefill_tokens: int = 2048
    min_chunk_tokens: int = 64
    max_tiles: int = 8
    most_encoders: int = 4
    admission: float = 0.8


@dataclass(slots=True)
class _Credit:
    """By how much the last decode steps of a device were shorter than planned, in all."""

    at_s: float
    num_steps: int
    credit_s: float = 0.0


class PredictedSteps:
    """As much of prompts and pictures beside the decodes as the TPOT target leaves room for, on average over a few steps."""

    def __init__(self, config: PhasewiseConfig) -> None:
        self._config = config
        self._credits: dict[WorkerId, _Credit] = {}

    def _limit_s(self, now_s: float, device: WorkerLoad) -> float:
        """How long the next step may take."""
        planned_s = self._config.margin * self._config.slo.tpot_s
        last = self._credits.get(device.worker_id)
        if last is None or not device.num_decoding:
            self._credits[device.worker_id] = _Credit(now_s, device.num_decode_steps)
            return planned_s
        last.credit_s += planned_s * (device.num_decode_steps - last.num_steps) - (now_s - last.at_s)
        last.credit_s = min(max(last.credit_s, -planned_s), self._config.max_credit * planned_s)
        last.at_s, last.num_steps = now_s, device.num_decode_steps
        return planned_s + last.credit_s

    def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        config, num = self._config, device.num_decoding
        limit_s = self._limit_s(now_s, device)
        if not num:
            if head.num_tiles and not head.num_left:
                return Exclusive(Phase.ENCODE, config.max_tiles)
            return Mixed(config.max_prefill_tokens, config.max_tiles)
        if config.layouts and (split := self._split(device)) is not None:
            return split
        cost = config.cost
        left_s = limit_s - cost.step_s(num, device.decode_context)
        num_tiles = 0
        if head.num_tiles:
            if head.deadline_s <= head.tiles_deadline_s:
                # A prompt whose turn comes before that of the pictures leaves them the rest.
                left_s -= head.num_left * (cost.token_s + cost.pair_s * head.num_done)
            num_tiles = max(0, min(config.max_tiles, head.num_tiles, round(left_s / config.tile_s)))
        budget = 0
        if head.num_left:
            limit_s -= num_tiles * config.tile_s
            budget = cost.tokens_within(num, device.decode_context, head.num_done, limit_s)
        if budget >= config.min_chunk_tokens:
            return Mixed(num + budget, num_tiles)
        return Mixed(num, num_tiles) if num_tiles else Exclusive(Phase.DECODE, 0)

    def _split(self, device: WorkerLoad) -> Split | None:
        """Streams side by side, where prompts get further so than in mixed batches and the decodes still meet their target.

        In a mixed batch prompts have the time that the decodes leave, whose weights are read with theirs.
        """
        config, cost, num = self._config, self._config.cost, device.num_decoding
        planned_s = config.margin * config.slo.tpot_s
        alone_s = cost.step_s(num, device.decode_context)
        fit = [one for one in config.layouts if alone_s <= planned_s * one.decode_rate]
        best = max(fit, key=lambda one: one.prefill_rate, default=None)
        if best is None:
            return None
        beside_s = cost.overhead_s + cost.token_s * num + cost.context_s * device.decode_context
        if best.prefill_rate <= SPLIT_GAIN * (1 - beside_s / planned_s):
            return None
        return Split(best.prefill_share, best.decode_share, config.max_prefill_tokens, config.max_tiles)


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
