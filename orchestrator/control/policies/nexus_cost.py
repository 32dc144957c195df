"""Nexus: how long a prefill chunk and a decode step take side by side on parts of a device's SMs. Pure.

Source: Nexus (arXiv 2507.06608), its cost model: a stage is a sum over operators, each the slower of computing and of moving bytes;
computing has two regimes, and decode attention shares the memory's bandwidth with prefill. The printed formula of the second regime is
not available; the one here has the properties that the text asks for. Two laws for the shared bandwidth: the one of the text,
and one by rates, since the text's compares the bytes of a decode step with those of a chunk that lasts many steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from workers.step_shape import ModelShape, StepShape


@dataclass(frozen=True, slots=True)
class Scaling:
    """How an operator's speed grows with its share of the SMs.

    saturation: share from which on it grows less, 0 < saturation <= 1 (the paper's R_sat). decay: how much less, 1 not at all, 0 no more
    growth (its lambda). Both are fitted offline, by sweeps of whole stages; the paper prints none. Without them: ideal.
    """

    saturation: float = 1.0
    decay: float = 1.0

    def effective(self, share: float) -> float:
        """The share that an ideal operator would need for this speed: continuous, not falling, flatter after saturation."""
        return min(share, self.saturation) + self.decay * max(0.0, share - self.saturation)


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of work of a stage. flops and num_bytes >= 0, of one chunk or one step."""

    flops: float
    num_bytes: float
    is_attention: bool = False
    scaling: Scaling = Scaling()

    def compute_s(self, share: float, flops_per_s: float) -> float:
        """Infinite for work without SMs. share: 0 to 1."""
        if self.flops == 0:
            return 0.0
        return self.flops / (flops_per_s * self.scaling.effective(share)) if share > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of the whole device."""

    flops_per_s: float
    bytes_per_s: float


class Law(StrEnum):
    """How much of the bandwidth decode attention gets beside prefill."""

    #: By the bytes of a decode step and of a chunk. Source: the paper's prose. Where a chunk has more bytes of weights than of KV, decode may
    #: be predicted to slow down with a larger share; the search then depends on where it starts.
    BYTE_SHARE = "byte_share"
    #: By the bytes a second that each asks for. Not in the paper.
    RATE_SHARE = "rate_share"


def stage_s(operators: Sequence[Operator], share: float, peaks: Peaks, bandwidth_part: float = 1.0) -> float:
    """Seconds: the operators one after the other, each the slower of computing and moving; 0 without any.

    share: of the SMs, 0 to 1. bandwidth_part: of the bandwidth that attention gets, 0 < bandwidth_part <= 1; others get all.
    """
    total_s = 0.0
    for one in operators:
        bandwidth = peaks.bytes_per_s * (bandwidth_part if one.is_attention else 1.0)
        total_s += max(one.compute_s(share, peaks.flops_per_s), one.num_bytes / bandwidth)
    return total_s if share > 0 or not operators else math.inf


@dataclass(frozen=True, slots=True)
class PrefillTraffic:
    """What a chunk moves beside decode. attention_part: of its time, in which its attention moves bytes; the rest is dense."""

    attention_part: float
    attention_bytes: float
    dense_bytes: float
    seconds: float

    def bandwidth_part(self, law: Law, decode_bytes: float, bytes_per_s: float) -> float:
        """Of the bandwidth, that decode attention gets on average: above 0, at most 1; 1 beside nothing.

        decode_bytes: of the attention of one decode step.
        """
        if self.seconds == 0 or decode_bytes == 0:
            return 1.0
        if law is Law.BYTE_SHARE:
            beside_attention = decode_bytes / (decode_bytes + self.attention_bytes)
            beside_dense = decode_bytes / (decode_bytes + self.dense_bytes)
        else:
            # Decode attention asks for all of it, and so does prefill's while it moves bytes.
            beside_attention = 0.5
            dense_s = (1.0 - self.attention_part) * self.seconds
            beside_dense = bytes_per_s / (bytes_per_s + self.dense_bytes / dense_s) if dense_s > 0 else 1.0
        return self.attention_part * beside_attention + (1.0 - self.attention_part) * beside_dense


def prefill_traffic(operators: Sequence[Operator], share: float, peaks: Peaks) -> PrefillTraffic:
    """Of a chunk that has this share. Its own times are at full bandwidth, so that nothing is circular.

    The attention's part is the time to move its bytes, whether or not computing hides it: so it does not jump where the slower of the
    two changes.
    """
    seconds = stage_s(operators, share, peaks)
    attention = sum(one.num_bytes for one in operators if one.is_attention)
    dense = sum(one.num_bytes for one in operators if not one.is_attention)
    # Nothing to do, or no SMs to do it with.
    if seconds == 0 or math.isinf(seconds):
        return PrefillTraffic(0.0, 0.0, 0.0, 0.0)
    return PrefillTraffic(attention / peaks.bytes_per_s / seconds, attention, dense, seconds)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Both stages side by side; percents are of the SMs, those of the two sum to 100. Stages without operators are idle."""

    prefill: Sequence[Operator]
    decode: Sequence[Operator]
    peaks: Peaks
    law: Law

    def prefill_s(self, percent: float) -> float:
        """Of a chunk; infinite at 0, unless there is none."""
        return stage_s(self.prefill, percent / 100, self.peaks)

    def decode_s(self, percent: float, prefill_percent: float | None = None) -> float:
        """Of a step; infinite at 0, unless there is none.

        prefill_percent: what prefill has, if not the rest; see `decode_best_s`.
        """
        rest = 100 - percent if prefill_percent is None else prefill_percent
        traffic = prefill_traffic(self.prefill, rest / 100, self.peaks)
        num_bytes = sum(one.num_bytes for one in self.decode if one.is_attention)
        part = traffic.bandwidth_part(self.law, num_bytes, self.peaks.bytes_per_s)
        return stage_s(self.decode, percent / 100, self.peaks, part)

    def decode_best_s(self, prefill_percent: float) -> float:
        """With all SMs, beside the traffic that prefill has now: what a slack for decode is measured against.

        Without that traffic contention alone may cost more than the slack, and then no share is feasible.
        """
        return self.decode_s(100, prefill_percent)


def prefill_operators(
    model: ModelShape,
    chunk: StepShape,
    num_before: int,
    *,
    dense: Scaling = Scaling(),
    attention: Scaling = Scaling(),
) -> tuple[Operator, ...]:
    """Of a chunk, which reads the KV of `num_before` tokens and of its own; none for no chunk."""
    if chunk.num_prefill_tokens == 0:
        return ()
    kv_bytes = (num_before + chunk.num_prefill_tokens) * model.kv_token_bytes
    return (
        _dense(model, chunk.num_prefill_tokens, dense),
        Operator(chunk.prefill_pairs * model.pair_flops, kv_bytes, is_attention=True, scaling=attention),
    )


def decode_operators(
    model: ModelShape,
    step: StepShape,
    *,
    dense: Scaling = Scaling(),
    attention: Scaling = Scaling(),
) -> tuple[Operator, ...]:
    """Of a decode step, which reads the KV of all contexts; none for no step."""
    if step.num_decodes == 0:
        return ()
    kv_bytes = step.decode_context * model.kv_token_bytes
    return (
        _dense(model, step.num_decodes, dense),
        Operator(step.decode_context * model.pair_flops, kv_bytes, is_attention=True, scaling=attention),
    )


def _dense(model: ModelShape, num_tokens: int, scaling: Scaling) -> Operator:
    """All matrices over the tokens; of bytes the weights alone."""
    return Operator(
        2.0 * model.num_weights * num_tokens, model.num_weights * model.weight_bytes, scaling=scaling
    )
