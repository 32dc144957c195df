"""DistServe: how many devices of which parallelism prefill and decode get, and how long they take. Pure.

Source: DistServe (OSDI'24; arXiv 2401.09670), its M/D/1 analysis of prefill and its placement algorithms 1 (high node affinity) and 2 (low);
the latency fits are those of the simulator in its repository. A configuration's goodput is asked of whoever can simulate it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def ttft_s(prefill_s: float, rate_rps: float) -> float:
    """Mean TTFT of equal prompts on one device: an M/D/1 queue. Infinite from a utilisation of 1 on."""
    busy = rate_rps * prefill_s
    return prefill_s + prefill_s * busy / (2 * (1 - busy)) if busy < 1 else math.inf


def pipelined_ttft_s(prefill_s: float, rate_rps: float) -> float:
    """On two devices, half of the layers each: as long for one prompt, but twice as many a second. prefill_s: on one device."""
    busy = rate_rps * prefill_s
    return prefill_s + prefill_s * busy / (4 * (2 - busy)) if busy < 2 else math.inf


def tensor_ttft_s(prefill_s: float, rate_rps: float, speedup: float) -> float:
    """On two devices that share every layer. speedup: of one prompt, 1 < speedup < 2. prefill_s: on one device."""
    busy = rate_rps * prefill_s
    if busy >= speedup:
        return math.inf
    return prefill_s / speedup + prefill_s * busy / (2 * speedup * (speedup - busy))


@dataclass(frozen=True, slots=True)
class PrefillFit:
    """Milliseconds of a batch of prompts: fixed, for each token, for each square of a prompt's length, and for each stage of a pipeline."""

    fixed_ms: float
    token_ms: float
    square_ms: float
    stage_ms: float = 1.0

    def seconds(self, lengths: Sequence[int], *, pipeline: int = 1) -> float:
        """Of one batch. lengths: of its prompts, in tokens."""
        work_ms = self.token_ms * sum(lengths) + self.square_ms * sum(num * num for num in lengths)
        return ((self.fixed_ms + work_ms) / pipeline + self.stage_ms * pipeline) / 1000


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Milliseconds of a step: fixed, for each token of context, for each sequence."""

    fixed_ms: float
    context_ms: float
    sequence_ms: float

    def seconds(self, num_sequences: int, context_tokens: int, *, pipeline: int = 1) -> float:
        """Of one step. context_tokens: of all sequences together."""
        work_ms = self.context_ms * context_tokens + self.sequence_ms * num_sequences
        return (self.fixed_ms + work_ms) / pipeline / 1000


@dataclass(frozen=True, slots=True)
class DecodeFits:
    """One fit for small batches, one from `threshold` sequences on."""

    small: DecodeFit
    large: DecodeFit
    threshold: int

    def printed_s(self, num_sequences: int, context_tokens: int, *, pipeline: int = 1) -> float:
        """As the simulator has it: a step may become faster where the fits change, and a search by bisection stall there."""
        fit = self.small if num_sequences < self.threshold else self.large
        return fit.seconds(num_sequences, context_tokens, pipeline=pipeline)

    def seconds(self, num_sequences: int, context_tokens: int, *, pipeline: int = 1) -> float:
        """The larger of both: never falls with more work."""
        return max(
            fit.seconds(num_sequences, context_tokens, pipeline=pipeline) for fit in (self.small, self.large)
        )


#: OPT-13B on one A100-80G. The repository's history has other numbers too, and none for a stage of a pipeline.
OPT_13B_PREFILL = PrefillFit(18.10, 0.1019, 7.12e-6)
OPT_13B_DECODE = DecodeFits(DecodeFit(19.93, 6.27e-4, 0.0385), DecodeFit(7.17, 5.80e-4, 0.158), threshold=95)


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Of one instance: devices that share each layer (intra-operator), times stages of a pipeline (inter-operator)."""

    tensor: int
    pipeline: int

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Instances:
    """So many of one configuration, each good for `goodput_rps`."""

    parallelism: Parallelism
    goodput_rps: float
    num: int


@dataclass(frozen=True, slots=True)
class HighAffinityPlacement:
    """Prefill and decode anywhere: the network carries KV fast enough between any two."""

    prefill: Instances
    decode: Instances

    @property
    def num_devices(self) -> int:
        """Of all instances."""
        return sum(one.num * one.parallelism.num_devices for one in (self.prefill, self.decode))


def place_with_high_affinity(
    rate_rps: float,
    *,
    max_nodes: int,
    node_devices: int,
    fits: Callable[[Parallelism], bool],
    prefill_goodput_rps: Callable[[Parallelism], float],
    decode_goodput_rps: Callable[[Parallelism], float],
) -> HighAffinityPlacement | None:
    """For each phase the parallelism with most goodput per device, and as many of it as the rate needs.

    max_nodes: that one instance may span. fits: its part of the model, and some KV, fit each device's memory. Goodputs: of one instance that
    does the phase alone. None when nothing that fits serves anything. Ties go to what is looked at first: less tensor, then less pipeline.
    Source: Algorithm 1.
    """
    candidates = [
        one
        for tensor in range(1, node_devices + 1)
        for pipeline in range(1, max_nodes * node_devices // tensor + 1)
        if fits(one := Parallelism(tensor, pipeline))
    ]
    best = [
        _most_per_device((one, goodput_rps(one), one.num_devices) for one in candidates)
        for goodput_rps in (prefill_goodput_rps, decode_goodput_rps)
    ]
    if best[0] is None or best[1] is None:
        return None
    (prefill, prefill_rps), (decode, decode_rps) = best[0], best[1]
    return HighAffinityPlacement(
        Instances(prefill, prefill_rps, math.ceil(rate_rps / prefill_rps)),
        Instances(decode, decode_rps, math.ceil(rate_rps / decode_rps)),
    )


@dataclass(frozen=True, slots=True)
class SegmentPair:
    """A prefill and a decode instance with equal pipelines: of each stage both parts are in one node, where KV stays."""

    prefill_tensor: int
    decode_tensor: int
    pipeline: int

    @property
    def prefill(self) -> Parallelism:
        """Of the instance that prefills."""
        return Parallelism(self.prefill_tensor, self.pipeline)

    @property
    def decode(self) -> Parallelism:
        """Of the instance that decodes."""
        return Parallelism(self.decode_tensor, self.pipeline)

    @property
    def num_devices(self) -> int:
        """Of both."""
        return self.pipeline * (self.prefill_tensor + self.decode_tensor)


@dataclass(frozen=True, slots=True)
class LowAffinityPlacement:
    """So many pairs, each good for `goodput_rps`."""

    pair: SegmentPair
    goodput_rps: float
    num: int

    @property
    def num_devices(self) -> int:
        """Of all pairs."""
        return self.num * self.pair.num_devices


def place_with_low_affinity(
    rate_rps: float,
    *,
    max_nodes: int,
    node_devices: int,
    fits: Callable[[Parallelism], bool],
    goodput_rps: Callable[[SegmentPair], float],
) -> LowAffinityPlacement | None:
    """The pair with most goodput per device, and as many of it as the rate needs.

    As with high affinity, but that a stage's prefill and decode part fit into one node together, which may hold several stages, and that the
    pair is simulated as one. Source: Algorithm 2.
    """
    pairs = (pair for pair in _pairs(max_nodes, node_devices) if fits(pair.prefill) and fits(pair.decode))
    best = _most_per_device((pair, goodput_rps(pair), pair.num_devices) for pair in pairs)
    if best is None:
        return None
    pair, pair_rps = best
    return LowAffinityPlacement(pair, pair_rps, math.ceil(rate_rps / pair_rps))


def _pairs(max_nodes: int, node_devices: int) -> Iterator[SegmentPair]:
    for pipeline in range(1, max_nodes * (node_devices // 2) + 1):
        for prefill in range(1, node_devices):
            for decode in range(1, node_devices - prefill + 1):
                stages_in_node = node_devices // (prefill + decode)
                if pipeline <= max_nodes * stages_in_node:
                    yield SegmentPair(prefill, decode, pipeline)


def _most_per_device(found: Iterator[tuple[T, float, int]]) -> tuple[T, float] | None:
    """Of (configuration, goodput, devices) the first with most goodput per device; None when no goodput is above 0."""
    best: tuple[T, float] | None = None
    best_rate = 0.0
    for one, rps, num_devices in found:
        if rps / num_devices > best_rate:
            best, best_rate = (one, rps), rps / num_devices
    return best
