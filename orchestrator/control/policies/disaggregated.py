"""Policies whose workers have one phase each: DistServe's shape, EPD's role switching, Mooncake's conductor. Pure.

The algorithms are distserve.py, epd_queue.py and mooncake.py; here is what calls them for a cluster's requests and workers.
"""

import math
from collections import deque
from collections.abc import Sequence

from orchestrator.control.policies import distserve, epd_queue, mooncake
from orchestrator.control.policies.placing import encoders, missing
from orchestrator.control.policies.policy import ClusterLoad, Placement, Prompt, Reject, Switch, WorkerLoad
from orchestrator.control.slo import Slo
from workers.api import Phase, PhaseSet, WorkerId
from workers.step_cost import StepCost

E, P, D = (frozenset({phase}) for phase in Phase)
#: Seconds between two decisions of EPD's code.
EPD_DECIDES_S = 5.0
#: Mooncake: how many times more of a prompt another worker must have for it to be fetched; the paper has no value.
BALANCING_THRESHOLD = 2.0


def distserve_shape(
    num_workers: int, *, prefill_rps: float, decode_rps: float, has_tiles: bool
) -> tuple[PhaseSet, ...]:
    """Workers of prefill, which encode too where tiles come, and of decode: Algorithm 1 at the highest rate for which it needs no more.

    One device to an instance. Goodputs: of one that does the phase alone, above 0.
    """

    def placed(rate_rps: float) -> distserve.HighAffinityPlacement:
        found = distserve.place_with_high_affinity(
            rate_rps,
            max_nodes=1,
            node_devices=1,
            fits=lambda _parallelism: True,
            prefill_goodput_rps=lambda _parallelism: prefill_rps,
            decode_goodput_rps=lambda _parallelism: decode_rps,
        )
        assert found is not None, (prefill_rps, decode_rps)
        return found

    # Just below those at which one of the phases needs another instance.
    rates = (num * rps * (1 - 1e-9) for num in range(1, num_workers) for rps in (prefill_rps, decode_rps))
    best = next(
        found
        for rate_rps in sorted(rates, reverse=True)
        if (found := placed(rate_rps)).num_devices <= num_workers
    )
    prefill = E | P if has_tiles else P
    return (prefill,) * (num_workers - best.decode.num) + (D,) * best.decode.num


class EpdQueue:
    """EPD's published trigger, every five seconds, on requests that wait inside each phase, as its code counts them."""

    def __init__(self) -> None:
        self._next_at_s = EPD_DECIDES_S

    def tick(self, now_s: float, cluster: ClusterLoad) -> Sequence[Switch]:
        """What Policy.tick asks for."""
        if now_s < self._next_at_s or any(worker.is_switching for worker in cluster.workers):
            return ()
        self._next_at_s = now_s + EPD_DECIDES_S
        totals = cluster.totals
        tiles = max(1.0, totals.tiles / max(1, totals.num_requests))
        num_encoding = round(sum(one.encode_tiles for one in cluster.workers) / tiles)
        num_prefills = sum(one.num_prefills for one in cluster.workers)
        # What decode has no room for waits in front of it, where this trigger does not look.
        queued = {
            Phase.ENCODE: num_encoding,
            Phase.PREFILL: max(0, num_prefills - num_encoding),
            Phase.DECODE: 0,
        }
        num = {phase: sum(phase in one.phases for one in cluster.workers) for phase in Phase}
        found = epd_queue.published_switch(queued, num)
        return _donated(cluster, found) if found is not None and num[found.target] else ()


class EpdSteady:
    """The trigger that is ours, on seconds of work: what lacks room in decode is seen, and a worker moves where that pays.

    output_tokens: mean of a request.
    """

    def __init__(self, cost: StepCost, *, tile_s: float, output_tokens: float) -> None:
        self._cost = cost
        self._tile_s = tile_s
        self._output_tokens = output_tokens
        self._trigger = epd_queue.SteadyTrigger(epd_queue.Settings())

    def tick(self, now_s: float, cluster: ClusterLoad) -> Sequence[Switch]:
        """What Policy.tick asks for."""
        if any(worker.is_switching for worker in cluster.workers):
            return ()
        tiles = tokens = num_prefills = num_promised = context = 0
        for one in cluster.workers:
            tiles += one.encode_tiles
            tokens += one.prefill_tokens
            num_prefills += one.num_prefills
            num_promised += one.num_promised
            context += one.promised_context
        # Promised are those in front of prefill too; of the others decode has taken none yet.
        num_bridged = max(0, num_promised - num_prefills)
        token_s = self._cost.decode_s + self._cost.context_s * context / max(1, num_promised)
        work_s = {
            Phase.ENCODE: (self._tile_s * tiles, 0.0),
            Phase.PREFILL: (self._cost.token_s * tokens, 0.0),
            Phase.DECODE: (0.0, num_bridged * self._output_tokens * token_s),
        }
        found = self._trigger.decide(
            now_s,
            {
                phase: epd_queue.PhaseLoad(
                    *work,
                    sum(phase in one.phases for one in cluster.workers),
                    bool(_donors(cluster, phase)),
                )
                for phase, work in work_s.items()
            },
        )
        return _donated(cluster, found) if found is not None else ()


def _donated(cluster: ClusterLoad, found: epd_queue.Switch) -> Sequence[Switch]:
    """By the worker of that phase alone which has least to do; the published trigger does not ask whether there is one."""
    donors = _donors(cluster, found.source)
    if not donors:
        return ()
    donor = min(
        donors, key=lambda one: (one.num_decoding + one.num_prefills + one.encode_tiles, one.worker_id)
    )
    return (Switch(donor.worker_id, frozenset({found.target}), found.reason, 1.0),)


def _donors(cluster: ClusterLoad, phase: Phase) -> list[WorkerLoad]:
    """Workers of this phase alone."""
    return [one for one in cluster.workers if one.phases == frozenset({phase})]


class Conductor:
    """Mooncake's: prefill by queue, cached prefix and what fetching one takes; decode by the time of a token; early rejection by prediction.

    decode_s: for which each request is taken to decode.
    """

    def __init__(
        self, cost: StepCost, slo: Slo, *, kv_token_s: float, tile_s: float, decode_s: float
    ) -> None:
        self._cost = cost
        self._slo = slo
        self._kv_token_s = kv_token_s
        self._tile_s = tile_s
        self._decode_s = decode_s
        #: When the prefills of those that were taken end, as was predicted, without those that have left decode; the oldest first.
        self._prefill_ends_s: deque[float] = deque()

    def place(self, now_s: float, prompt: Prompt, cluster: ClusterLoad) -> Placement | Reject:
        """See Placing."""
        refusal = missing(now_s, cluster, prompt)
        if refusal is not None:
            return refusal
        cost = self._cost
        by_id = {worker.worker_id: worker for worker in cluster.prefill}
        instances = [
            mooncake.PrefillInstance(worker.worker_id, self._queue_s(worker), prompt.cached_at(worker))
            for worker in cluster.prefill
        ]
        chosen = mooncake.choose_prefill(
            instances,
            prompt.num_tokens,
            balancing_threshold=BALANCING_THRESHOLD,
            prefill_s=lambda tokens, known: cost.prompt_s(tokens - known, known),
            transfer_s=self._transfer_s,
        )
        ttft_s = chosen.ttft_s + self._tile_s * prompt.num_tiles
        why = mooncake.early_refusal(
            ttft_s / self._slo.ttft_s, self._decode_load(now_s, now_s + ttft_s, prompt, cluster)
        )
        if why is not None:
            # Prefill has caught up by then, or the oldest has left decode.
            oldest_s = self._prefill_ends_s[0] + self._decode_s if self._prefill_ends_s else now_s
            late_s = ttft_s - self._slo.ttft_s
            return Reject(why, now_s + late_s if late_s > 0 else max(now_s, oldest_s))
        self._prefill_ends_s.append(now_s + ttft_s)
        fetch_from = by_id[chosen.fetched_from] if chosen.fetched_from is not None else None
        prefill = by_id[chosen.worker_id]
        encode = (prefill,) if Phase.ENCODE in prefill.phases else encoders(cluster, prompt, most=1)
        decode = min(cluster.decode, key=self._token_s)
        return Placement(prefill, decode, encode if prompt.num_tiles else (), fetch_from)

    def _decode_load(self, now_s: float, at_s: float, prompt: Prompt, cluster: ClusterLoad) -> float:
        """Of the whole cluster when the prefill of this one ends, itself counted.

        How many decode or will is seen; since each is taken to decode for as long, it is the oldest that have left.
        """
        num = sum(one.num_decoding + one.num_promised for one in cluster.workers)
        context = sum(one.decode_context + one.promised_context for one in cluster.workers)
        ends_s = self._prefill_ends_s
        while len(ends_s) > num:
            ends_s.popleft()
        num_then = mooncake.predicted_decodes(
            at_s=at_s,
            decode_s=self._decode_s,
            decode_began_s=[end_s for end_s in ends_s if end_s <= now_s],
            prefill_ends_s=[*(end_s for end_s in ends_s if end_s > now_s), at_s],
        )
        tokens = (context + prompt.num_tokens) / (num + 1)
        return mooncake.predicted_decode_load(
            num_then,
            len(cluster.decode),
            tbt_s=lambda each: self._cost.step_s(math.ceil(each), round(each * tokens)),
            target_s=self._slo.tpot_s,
        )

    def _queue_s(self, worker: WorkerLoad) -> float:
        return self._cost.token_s * worker.prefill_tokens + self._tile_s * worker.encode_tiles

    def _transfer_s(self, _source: WorkerId, _target: WorkerId, num_tokens: int) -> float:
        return self._kv_token_s * num_tokens

    def _token_s(self, worker: WorkerLoad) -> float:
        num = worker.num_decoding + worker.num_promised
        return self._cost.step_s(num + 1, worker.decode_context + worker.promised_context)
