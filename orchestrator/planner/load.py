"""The load that shapes are judged by, and the judging: the same requests and seeds for every candidate. Pure."""

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.bench.trace import HASH_BLOCK_TOKENS, Trace, TraceRow
from orchestrator.control.slo import Slo, percentile
from orchestrator.errors import TraceError
from orchestrator.manifest.engine import MIB
from orchestrator.planner.shapes import Candidate
from orchestrator.sim import coarse_replay
from orchestrator.sim.capacity import NEAR, NEAR_STEPS, capacity_rps
from orchestrator.sim.coarse import CoarseSimulation
from orchestrator.sim.coarse_costs import CoarseCosts
from orchestrator.sim.coarse_loads import IMAGE_TILES, TILE_TOKENS, of_trace
from orchestrator.sim.coarse_request import CoarseRequest
from workers.latency_model import LatencyModel

#: Fewer say nothing of a load.
MIN_ROWS = 100
#: Requests of one simulation at the highest rate that could be borne, and the least that it lasts, in requests one after the other.
NUM_REQUESTS, NUM_LATENCIES = 4000, 4
#: Steps of a bisection from nothing, between a part of the highest rate and that.
NUM_STEPS, RANGE = 6, 30.0
#: Of a device's memory beside the weights, what is not for KV.
SPARE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Alone:
    """What requests get on an idle device of their own, at best, in the order of the trace. tpots_s: 0 below 2 tokens."""

    ttfts_s: tuple[float, ...]
    tpots_s: tuple[float, ...]

    def share_met(self, slo: Slo) -> float:
        """Of all."""
        both = zip(self.ttfts_s, self.tpots_s, strict=True)
        return sum(slo.is_met(ttft_s, tpot_s) for ttft_s, tpot_s in both) / len(self.ttfts_s)

    def at(self, share: float) -> Slo:
        """What so many of them keep, each by itself."""
        return Slo(*(percentile(sorted(values), 100 * share) for values in (self.ttfts_s, self.tpots_s)))


@dataclass(frozen=True, slots=True)
class Misses:
    """Shares of all requests, in a load that is a little too much. A request may miss both targets."""

    ttft: float
    tpot: float
    refused: float

    @property
    def limit(self) -> str:
        """What is missed most; both where they are not far apart."""
        if self.refused > max(self.ttft, self.tpot):
            return "memory"
        if min(self.ttft, self.tpot) > max(self.ttft, self.tpot) / 2:
            return "TTFT and TPOT"
        return "TTFT" if self.ttft > self.tpot else "TPOT"


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served, on what, and how well. num_images: of each request, of IMAGE_TILES tiles each; their tokens are added.

    duration_s: of arrivals, in one simulation. highest_rps: no shape bears more.
    """

    trace: Trace
    slo: Slo
    attainment: float
    latency: LatencyModel
    num_devices: int
    num_images: int
    kv_cache_bytes: int
    duration_s: float
    highest_rps: float

    @property
    def lowest_rps(self) -> float:
        """A shape that does not bear as much counts as one that bears nothing."""
        return self.highest_rps / RANGE

    def requests(self, seed: int, rate_rps: float) -> list[CoarseRequest]:
        """One seed has the same ones at every rate."""
        found = of_trace(
            self.trace, self.slo, random.Random(seed), rate_rps=rate_rps, duration_s=self.duration_s
        )
        if not self.num_images:
            return found
        num_tiles = self.num_images * IMAGE_TILES
        return [
            replace(one, num_tiles=num_tiles, prompt_tokens=one.prompt_tokens + num_tiles * TILE_TOKENS)
            for one in found
        ]

    def simulation(self, candidate: Candidate, seed: int, rate_rps: float) -> CoarseSimulation:
        """As `phasewise simulate --mode coarse` has it."""
        engine = candidate.knobs.engine(self.kv_cache_bytes)
        return coarse_replay.simulation(
            candidate.shape.workers, engine, self.latency, self.requests(seed, rate_rps)
        )

    def reaches(self, candidate: Candidate, seed: int, rate_rps: float) -> bool:
        """Enough requests meet their targets at this rate."""
        return self.simulation(candidate, seed, rate_rps).reaches(self.attainment)

    def capacity_rps(
        self, candidate: Candidate, seed: int, near_rps: float = 0.0, *, more_steps: int = 0
    ) -> float:
        """The highest rate that it bears. near_rps: what is expected, 0 for nothing. more_steps: of bisection, than a search takes."""
        return capacity_rps(
            lambda rate_rps: self.reaches(candidate, seed, rate_rps),
            between=(self.lowest_rps, self.highest_rps),
            num_steps=NUM_STEPS + more_steps,
            near=(near_rps / NEAR, near_rps * NEAR) if near_rps else None,
            near_steps=NEAR_STEPS + more_steps,
        )

    def misses(self, candidate: Candidate, seed: int, rate_rps: float) -> Misses:
        """At this rate."""
        records = self.simulation(candidate, seed, rate_rps).run().records
        served = [record for record in records if record.status == "OK"]
        late = sum(record.first_s > self.slo.ttft_s for record in served)
        slow = sum((record.tpot_s or 0.0) > self.slo.tpot_s for record in served)
        num = len(records)
        return Misses(late / num, slow / num, (num - len(served)) / num)


def clipped(trace: Trace, max_context_tokens: int) -> Trace:
    """Longer requests lose output first, then prompt, as in `phasewise simulate`. Raises TraceError for too little of a trace."""
    if len(trace.rows) < MIN_ROWS:
        raise TraceError(
            trace.file, None, f"has {len(trace.rows)} rows; a plan needs {MIN_ROWS} to say anything of a load"
        )
    if trace.rows[-1].arrival_s <= trace.rows[0].arrival_s:
        raise TraceError(trace.file, None, "has rows that all arrive at once, so no rate can be made of them")
    return replace(trace, rows=tuple(_clip(row, max_context_tokens) for row in trace.rows))


def _clip(row: TraceRow, max_context_tokens: int) -> TraceRow:
    output_tokens = min(row.output_tokens, max_context_tokens - 1)
    prompt_tokens = min(row.prompt_tokens, max_context_tokens - output_tokens)
    return replace(row, output_tokens=output_tokens, prompt_tokens=prompt_tokens)


def kv_cache_mib(latency: LatencyModel) -> int:
    """What the weights leave of a device's memory for KV; 0 or less when they leave nothing."""
    model, device = latency.model, latency.device
    weights = (model.num_weights + model.num_head_weights) * model.weight_bytes
    return int(((1 - SPARE_SHARE) * device.memory_bytes - weights) / MIB)


def alone(trace: Trace, latency: LatencyModel, *, num_devices: int, num_images: int) -> Alone:
    """Every prefix that came before in the trace is cached, and nothing waits for a message."""
    cost, ttfts_s, tpots_s = CoarseCosts.of(latency), [], []
    encode_s = num_images * IMAGE_TILES * cost.tile_s / num_devices
    for row, num_cached in _with_cached(trace):
        num_new = row.prompt_tokens - num_cached + num_images * IMAGE_TILES * TILE_TOKENS
        ttfts_s.append(encode_s + cost.step.prompt_s(num_new, num_cached))
        tpots_s.append(cost.step.step_s(1, row.prompt_tokens) if row.output_tokens > 1 else 0.0)
    return Alone(tuple(ttfts_s), tuple(tpots_s))


def highest_rps(trace: Trace, latency: LatencyModel, *, num_devices: int, num_images: int) -> float:
    """Twice what the devices would bear if they did nothing but multiply matrices and read KV: parts of a trace are lighter than it is."""
    cost, num_tiles = CoarseCosts.of(latency), num_images * IMAGE_TILES
    step, each_s = cost.step, []
    for row, num_cached in _with_cached(trace):
        num_new = row.prompt_tokens - num_cached + num_tiles * TILE_TOKENS
        pairs = num_new * (num_cached + num_new / 2)
        context = row.output_tokens * (row.prompt_tokens + row.output_tokens / 2)
        computing_s = step.token_s * (num_new + row.output_tokens) + step.pair_s * pairs
        each_s.append(computing_s + step.context_s * context + num_tiles * cost.tile_s)
    return 2 * num_devices / statistics.fmean(each_s)


def long_enough_s(trace: Trace, slo: Slo, highest: float, *, is_quick: bool) -> float:
    """Of arrivals, that a queue which grows is seen to grow."""
    output_tokens = statistics.fmean(row.output_tokens for row in trace.rows)
    least_s = NUM_LATENCIES * (slo.ttft_s + output_tokens * slo.tpot_s)
    return max(2 * NUM_REQUESTS / highest, least_s) / (2 if is_quick else 1)


def _with_cached(trace: Trace) -> Iterator[tuple[TraceRow, int]]:
    """Rows, and how many tokens of each have come before."""
    seen: set[int] = set()
    for row in trace.rows:
        num_blocks = next((i for i, block in enumerate(row.hash_ids) if block not in seen), len(row.hash_ids))
        seen.update(row.hash_ids)
        yield row, min(num_blocks * HASH_BLOCK_TOKENS, row.prompt_tokens - 1)
