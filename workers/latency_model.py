"""How long a step of an engine takes, predicted from what it computes, and how far such predictions are off. Pure.

The prediction is a roofline of device and model whose parts are scaled by what was measured:

    step = c0 + c1 * dense + c2 * decode attention + c3 * prefill attention        (seconds)

dense: the weights over all tokens of the step, and those of the logits over its decodes: on a GPU the slower of computing and of
reading the weights; on a CPU, where one waits for the other, computing alone. Decode attention reads the KV of all contexts; prefill
attention is computed. The parts do not hide each other: on an H100 they come one after the other (docs/simulation.md has the
figures). c0 is what a step costs whatever it computes; on a CPU that is, most of all, reading the weights.

The four factors follow the steps that are observed, by least squares that forget, beside a prior that does not: a model that has
seen nothing is its profile or, without one, the roofline, and one that has seen one kind of step changes little about the others. It forgets what new steps are
about, and the rest ten times slower (directional forgetting: Cao and Schwartz, Automatica 36, 2000).

Sources: roofline model (Williams, Waterman, Patterson, CACM 2009); factors over a roofline, and rates by share of the SMs:
Bullet (ASPLOS'26); two linear fits: DistServe's simulator.
"""

from typing import Self

import numpy as np
import numpy.typing as npt

from workers.step_shape import (
    ENOUGH_STEPS,
    Curve,
    DeviceShape,
    EncodeCosts,
    FactorSource,
    ModelShape,
    StepCosts,
    StepShape,
    chunk,
)

#: Steps of the past that count: of those of one kind, the weight of one halves after about 0.7 times as many.
MEMORY_STEPS = 500
#: Of what is known about anything else, after one step: a machine that gets slower is slower at all.
FADING = 1 - 1 / (10 * MEMORY_STEPS)
#: Standard deviation of the prior: of c0 as a part of one typical step, and of the other factors.
PRIOR_DEVIATION = (1.0, 0.5, 0.5, 0.5)
#: Of one step, as a part of it: the prior is weighed by it.
NOISE_VARIANCE = 0.002
#: A step counts for at most so many times what was expected, or so little of it: a machine that was suspended.
MAX_RATIO = 10.0
#: Below this a ratio is noise; above it, the prediction is wrong or the step was no usual one.
FAR_RATIO = 2.0
#: Weight of the last step in the mean error.
ERROR_GAIN = 0.01
#: What a batch of pictures and each of its patches take before any was seen, in seconds; the factors of both may be anything.
FIRST_BATCH_S, FIRST_PATCH_S = 1e-3, 1e-3
ENCODE_PRIOR_DEVIATION = (10.0, 10.0)

Vector = npt.NDArray[np.float64]
#: Seconds of a prediction, one for each factor.
Parts = tuple[float, ...]


def rate_at(share: float, curve: Curve) -> float:
    """Share of the whole device's rate that `share` of its SMs reach, 0 < share <= 1: on a line through the curve."""
    shares, rates = [0.0, *(s for s, _ in curve), 1.0], [0.0, *(r for _, r in curve), 1.0]
    return float(np.interp(share, shares, rates))


def roofline(
    shape: StepShape,
    model: ModelShape,
    device: DeviceShape,
    share: float = 1.0,
    *,
    is_contended: bool = False,
) -> Parts:
    """What c0 to c3 are multiplied with, in seconds; zeros for no step.

    share: of the SMs, 0 < share <= 1. is_contended: another stream computes on the others.
    """
    if shape.num_tokens == 0:
        return 0.0, 0.0, 0.0, 0.0
    compute, memory = 1.0, 1.0
    if share < 1.0:
        compute, memory = rate_at(share, device.compute_curve), rate_at(share, device.memory_curve)
    if is_contended:
        compute, memory = compute / device.contention.compute, memory / device.contention.memory
    flops_per_s, bytes_per_s = device.flops_per_s * compute, device.bytes_per_s * memory
    attention_flops_per_s = device.attention_flops_per_s * compute
    products = model.num_weights * shape.num_tokens + model.num_head_weights * shape.num_decodes
    computing_s = 2.0 * products / flops_per_s
    reading_s = (model.num_weights + model.num_head_weights) * model.weight_bytes / bytes_per_s
    decoding_s = max(
        shape.decode_context * model.kv_token_bytes / bytes_per_s,
        shape.decode_context * model.pair_flops / attention_flops_per_s,
    )
    prefilling_s = shape.prefill_pairs * model.pair_flops / attention_flops_per_s
    if device.is_reading_hidden:
        return device.step_overhead_s, max(computing_s, reading_s), decoding_s, prefilling_s
    return device.step_overhead_s + reading_s, computing_s, decoding_s, prefilling_s


class Factors:
    """What the parts of a prediction are multiplied with: they learn, and know how far off they are.

    Each starts at 1, or as `start` has it, with a standard deviation of `deviation`. is_learning: off, they stay.
    """

    def __init__(
        self, deviation: tuple[float, ...], start: Parts | None = None, *, is_learning: bool = True
    ) -> None:
        self.num_observed = 0
        #: Mean of |predicted - measured| / measured, over the last ones; None before the first.
        self.mean_error: float | None = None
        #: What is measured is more than predicted times this in about a tenth of all cases.
        self.upper_ratio = 1.0
        #: Plain numbers: arrays of four cost more than what is computed with them.
        self.values: Parts = start or (1.0,) * len(deviation)
        self._start: Vector = np.array(self.values)
        #: What the prior weighs, beside one for each thing that was seen.
        self._prior: Vector = NOISE_VARIANCE / np.square(np.array(deviation))
        self._products: Vector = np.zeros((len(deviation), len(deviation)))
        self._targets: Vector = np.zeros(len(deviation))
        self._is_learning = is_learning

    def predict_s(self, parts: Parts) -> float:
        """Seconds."""
        total_s = 0.0
        for factor, part_s in zip(self.values, parts, strict=True):
            total_s += factor * part_s
        return max(0.0, total_s)

    def observe(self, parts: Parts, measured_s: float) -> None:
        """What has these parts took so long."""
        predicted_s = max(self.predict_s(parts), 1e-9)
        ratio = min(max(measured_s / predicted_s, 1 / MAX_RATIO), MAX_RATIO)
        self._note_error(ratio)
        if self._is_learning:
            # Each counts alike, long or short, as a part of what was predicted: then the factors give the mean. What is far off,
            # at the start or once, is a part of itself, or it would count for more than all others.
            if 1 / FAR_RATIO < ratio < FAR_RATIO:
                self._learn(np.array(parts) / predicted_s, ratio)
            else:
                self._learn(np.array(parts) / (ratio * predicted_s), 1.0)

    def _note_error(self, ratio: float) -> None:
        self.num_observed += 1
        error = abs(1 / ratio - 1)
        gain = max(ERROR_GAIN, 1 / self.num_observed)
        self.mean_error = (
            error if self.mean_error is None else self.mean_error + gain * (error - self.mean_error)
        )
        # A quantile that follows: up by nine parts when it was passed, down by one when it was not.
        self.upper_ratio *= 1 + (0.9 if ratio > self.upper_ratio else -0.1) * ERROR_GAIN
        self.upper_ratio = min(max(self.upper_ratio, 1.0), MAX_RATIO)

    def _learn(self, row: Vector, target: float) -> None:
        # What is known is forgotten along this row alone, and what it says there stays: an engine that chooses its steps by these
        # predictions computes steps that are much alike, and would forget for them how the parts differ.
        along = self._products @ row
        known = float(row @ along)
        if known > 0:
            part = along / (MEMORY_STEPS * known)
            self._targets = FADING * (self._targets - part * float(row @ self._targets))
            self._products = FADING * (self._products - part[:, None] * along)
        self._products = self._products + row[:, None] * row
        self._targets = self._targets + row * target
        self.values = tuple(self._solve().tolist())

    def _solve(self) -> Vector:
        """Least squares with the prior. Who would be negative is 0, and the others are found without it."""
        products, targets = self._products + np.diag(self._prior), self._targets + self._prior * self._start
        is_kept = np.ones(len(targets), np.bool_)
        while True:
            values: Vector = np.zeros(len(targets))
            values[is_kept] = np.linalg.solve(products[np.ix_(is_kept, is_kept)], targets[is_kept])
            if (values >= 0).all():
                return values
            is_kept &= values >= 0


class LatencyModel:
    """Predicts steps and transfers, learns from steps, and knows its error. is_learning: off, it is the roofline.

    It is believed unless its source is the roofline.
    """

    def __init__(self, model: ModelShape, device: DeviceShape, *, is_learning: bool = True) -> None:
        self.model = model
        self.device = device
        self._factors = Factors(PRIOR_DEVIATION, is_learning=is_learning)
        self._first_source = FactorSource.ROOFLINE
        #: Of the steps so far, those that computed tokens of prompts.
        self.num_prompt_steps = 0

    @classmethod
    def profiled(cls, costs: StepCosts) -> Self:
        """Begins with what a profile has, and learns from its own steps."""
        found = cls(costs.model, costs.device)
        found._factors = factors = Factors(PRIOR_DEVIATION, costs.factors)
        factors.mean_error, factors.upper_ratio = costs.mean_error, costs.upper_ratio
        found._first_source = FactorSource.PROFILE
        return found

    @classmethod
    def fitted(cls, costs: StepCosts) -> Self:
        """As it was when it told these. It learns no more."""
        found = cls(costs.model, costs.device, is_learning=False)
        factors = found._factors
        factors.values = costs.factors
        factors.num_observed, factors.mean_error = costs.num_steps, costs.mean_error
        factors.upper_ratio = costs.upper_ratio
        found._first_source, found.num_prompt_steps = costs.source, costs.num_prompt_steps
        return found

    def costs(self) -> StepCosts:
        """All of it, as of now."""
        c0, c1, c2, c3 = self.factors
        return StepCosts(
            self.model,
            self.device,
            (c0, c1, c2, c3),
            self.num_observed,
            self.mean_error,
            self.upper_ratio,
            self.source,
            self.num_prompt_steps,
        )

    @property
    def source(self) -> FactorSource:
        """Of the factors."""
        return FactorSource.FITTED if self.num_observed >= ENOUGH_STEPS else self._first_source

    @property
    def factors(self) -> tuple[float, ...]:
        """c0 to c3."""
        return self._factors.values

    @property
    def num_observed(self) -> int:
        """Steps so far."""
        return self._factors.num_observed

    @property
    def mean_error(self) -> float | None:
        """See StepCosts."""
        return self._factors.mean_error

    @property
    def upper_ratio(self) -> float:
        """See StepCosts."""
        return self._factors.upper_ratio

    def decode_steps(self, num_decodes: int) -> "DecodeSteps":
        """Steps of so many decodes, as it predicts now."""
        return DecodeSteps(roofline(StepShape(num_decodes), self.model, self.device), self)

    def step_s(self, shape: StepShape, share: float = 1.0) -> float:
        """Seconds, alone on the device; 0 for no step."""
        return self._factors.predict_s(roofline(shape, self.model, self.device, share))

    def prefill_s(self, num_new: int, num_before: int = 0, *, chunk_tokens: int) -> float:
        """Seconds for a prompt in chunks, alone, of which `num_before` tokens are known."""
        total_s, done = 0.0, num_before
        end = num_before + num_new
        while done < end:
            size = min(chunk_tokens, end - done)
            total_s += self.step_s(chunk(size, done))
            done += size
        return total_s

    def stream_s(self, shape: StepShape, share: float, beside: StepShape | None) -> float:
        """Seconds of a step on `share` of the SMs while another stream computes steps like `beside` on the others, or with a
        share of 1 on the same ones. None, or no step: alone.
        """
        if beside is None or beside.num_tokens == 0:
            return self.step_s(shape, share)
        if share >= 1.0:
            return self.step_s(shape) * self.device.contention.sliced
        parts = roofline(shape, self.model, self.device, share, is_contended=True)
        return self._factors.predict_s(parts)

    def upper_stream_s(self, shape: StepShape, share: float, beside: StepShape | None) -> float:
        """What a tenth of all such steps takes longer than, in seconds."""
        is_alone = beside is None or beside.num_tokens == 0
        upper = self.upper_ratio if is_alone else max(self.upper_ratio, self.device.contention.upper)
        return self.stream_s(shape, share, beside) * upper

    def transfer_s(self, num_tokens: int, bytes_per_s: float = 0.0) -> float:
        """Seconds for the KV of so many tokens to another worker. bytes_per_s: of KvPeer; 0: what the device's shape says."""
        return num_tokens * self.model.kv_token_bytes / (bytes_per_s or self.device.transfer_bytes_per_s)

    def observe(self, shape: StepShape, measured_s: float) -> None:
        """A step on the whole device, alone, took so long."""
        if measured_s > 0 and shape.num_tokens > 0:
            self.num_prompt_steps += shape.num_prefill_tokens > 0
            self._factors.observe(roofline(shape, self.model, self.device), measured_s)


class DecodeSteps:
    """Steps of one batch of decodes, whose context alone changes: what `step_s` says, to the last bit."""

    def __init__(self, empty: Parts, latency: LatencyModel) -> None:
        """empty: of such a step without any context."""
        (c0, c1, self._factor, _), model, device = latency.factors, latency.model, latency.device
        self._fixed_s = c0 * empty[0] + c1 * empty[1]
        self._kv_token_bytes, self._bytes_per_s = model.kv_token_bytes, device.bytes_per_s
        self._pair_flops, self._flops_per_s = model.pair_flops, device.attention_flops_per_s

    def step_s(self, context: int) -> float:
        """Seconds, with so many tokens of context over all of them."""
        # Without calls, since a simulation asks for each step; no summand is negative.
        reading_s = context * self._kv_token_bytes / self._bytes_per_s
        computing_s = context * self._pair_flops / self._flops_per_s
        return self._fixed_s + self._factor * (reading_s if reading_s > computing_s else computing_s)


class EncodeModel:
    """The same for batches of pictures, whose time is a line through their patches."""

    def __init__(self) -> None:
        self._factors = Factors(ENCODE_PRIOR_DEVIATION)

    def encode_s(self, num_patches: int) -> float:
        """Seconds of a batch."""
        return self._factors.predict_s(_encode_parts(num_patches))

    def observe(self, num_patches: int, measured_s: float) -> None:
        """A batch took so long."""
        if measured_s > 0 and num_patches > 0:
            self._factors.observe(_encode_parts(num_patches), measured_s)

    def costs(self) -> EncodeCosts:
        """All of it, as of now."""
        found = self._factors
        batch, patch = found.values
        return EncodeCosts(
            batch * FIRST_BATCH_S,
            patch * FIRST_PATCH_S,
            found.num_observed,
            found.mean_error,
            found.upper_ratio,
        )


def _encode_parts(num_patches: int) -> Parts:
    return FIRST_BATCH_S, FIRST_PATCH_S * num_patches
