"""How long a step of an engine takes, predicted from what it computes, and how far such predictions are off. Pure.

The prediction is a roofline of device and model whose parts are scaled by what was measured:

    step = c0 + c1 * dense + c2 * decode attention + c3 * prefill attention        (seconds)

dense: the weights over all tokens of the step, the slower of computing them and of reading the weights. Decode attention
reads the KV of all contexts; prefill attention is computed. The parts do not hide each other: on an H100 they come one
after the other (docs/simulation.md has the figures). c0 is what a step costs whatever it computes. The four factors follow
the steps that are observed, by recursive least squares that forgets; they start from a prior, so that a model that has
seen nothing is the roofline, and one that has seen one kind of step changes little about the others.

Sources: roofline model (Williams, Waterman, Patterson, CACM 2009); factors over a roofline: Bullet (ASPLOS'26), section on
its SM-scaling roofline; two linear fits: DistServe's simulator.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Steps of the past that count: the weight of one halves after about 0.7 times as many.
MEMORY_STEPS = 500
#: Standard deviation of the prior: of c0 as a part of one typical step, and of the other factors.
PRIOR_DEVIATION = (1.0, 0.5, 0.5, 0.5)
#: A step counts for at most so many times what was expected, or so little of it: a machine that was suspended.
MAX_RATIO = 10.0
#: Weight of the last step in the mean error.
ERROR_GAIN = 0.01

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes; zero of everything is no step.

    decode_context: tokens that the decodes attend to, over all of them. prefill_pairs: of a token of a chunk and one that it
    attends to.
    """

    num_decodes: int = 0
    decode_context: int = 0
    num_prefill_tokens: int = 0
    prefill_pairs: int = 0

    @property
    def num_tokens(self) -> int:
        """That go through the weights."""
        return self.num_decodes + self.num_prefill_tokens

    def __add__(self, other: "StepShape") -> "StepShape":
        """Both in one step."""
        return StepShape(
            self.num_decodes + other.num_decodes,
            self.decode_context + other.decode_context,
            self.num_prefill_tokens + other.num_prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
        )


def decodes(num_sequences: int, context_tokens: int) -> StepShape:
    """One token each of sequences that have `context_tokens` tokens together."""
    return StepShape(num_decodes=num_sequences, decode_context=context_tokens)


def chunk(num_new: int, num_before: int = 0) -> StepShape:
    """A chunk of one prompt, of which `num_before` tokens are known."""
    return StepShape(
        num_prefill_tokens=num_new, prefill_pairs=num_new * num_before + num_new * (num_new + 1) // 2
    )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a transformer its speed depends on.

    num_weights: of all matrices that each token passes. num_head_weights: of the one that gives logits, which few tokens
    pass. weight_bytes: of one. kv_token_bytes: of one token, all layers. hidden_size: of the heads that ask, of one layer.
    """

    name: str
    num_weights: int
    num_head_weights: int
    weight_bytes: float
    num_layers: int
    hidden_size: int
    kv_token_bytes: int

    @property
    def attention_tokens(self) -> float:
        """Tokens of context at which attending to them is as much work for a token as all else; see workers.engine.scheduler."""
        return 2.0 * self.num_weights / self.pair_flops

    @property
    def pair_flops(self) -> float:
        """Of one token that attends to one other, in all layers."""
        return 4.0 * self.num_layers * self.hidden_size


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What a device reaches, at best, on the three parts of a step.

    bytes_per_s: reading weights, and KV. transfer_bytes_per_s: of KV to another worker. step_overhead_s: see c0. knee: the share of the
    SMs that already reads memory at full rate; below it the rate grows with the share.
    """

    name: str
    flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    step_overhead_s: float
    memory_bytes: float
    transfer_bytes_per_s: float
    knee: float = 1.0


def roofline(shape: StepShape, model: ModelShape, device: DeviceShape, share: float = 1.0) -> Vector:
    """[4] float64: what c0 to c3 are multiplied with, in seconds; zeros for no step. share: of the SMs, 0 < share <= 1."""
    if shape.num_tokens == 0:
        return np.zeros(4)
    bandwidth = device.bytes_per_s * min(1.0, share / device.knee)
    computing_s = 2.0 * model.num_weights * shape.num_tokens / (device.flops_per_s * share)
    reading_s = (model.num_weights + model.num_head_weights) * model.weight_bytes / bandwidth
    decoding_s = max(
        shape.decode_context * model.kv_token_bytes / bandwidth,
        shape.decode_context * model.pair_flops / (device.attention_flops_per_s * share),
    )
    prefilling_s = shape.prefill_pairs * model.pair_flops / (device.attention_flops_per_s * share)
    return np.array([device.step_overhead_s, max(computing_s, reading_s), decoding_s, prefilling_s])


class LatencyModel:
    """Predicts, learns, and knows its error. is_learning: off, it is the roofline."""

    def __init__(
        self,
        model: ModelShape,
        device: DeviceShape,
        *,
        is_learning: bool = True,
    ) -> None:
        self.model = model
        self.device = device
        self.num_observed = 0
        #: Mean of |predicted - measured| / measured, over the last steps; None before the first.
        self.mean_error: float | None = None
        #: A step takes longer than predicted times this in about a tenth of all cases.
        self.upper_ratio = 1.0
        self._factors: Vector = np.ones(4)
        self._covariance: Vector = np.diag(np.square(PRIOR_DEVIATION))
        self._is_learning = is_learning

    @property
    def factors(self) -> tuple[float, ...]:
        """c0 to c3."""
        return tuple(float(factor) for factor in self._factors)

    def step_s(self, shape: StepShape, share: float = 1.0) -> float:
        """Seconds; 0 for no step."""
        return max(0.0, float(self._factors @ roofline(shape, self.model, self.device, share)))

    def prefill_s(self, num_new: int, num_before: int = 0, *, chunk_tokens: int) -> float:
        """Seconds for a prompt in chunks, alone, of which `num_before` tokens are known."""
        total_s, done = 0.0, num_before
        end = num_before + num_new
        while done < end:
            size = min(chunk_tokens, end - done)
            total_s += self.step_s(chunk(size, done))
            done += size
        return total_s

    def observe(self, shape: StepShape, measured_s: float) -> None:
        """A step on the whole device took so long."""
        if measured_s <= 0 or shape.num_tokens == 0:
            return
        row = roofline(shape, self.model, self.device)
        predicted_s = max(float(self._factors @ row), 1e-9)
        ratio = min(max(measured_s / predicted_s, 1 / MAX_RATIO), MAX_RATIO)
        self._note_error(ratio)
        if self._is_learning:
            self._learn(row, ratio * predicted_s)

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

    def _learn(self, row: Vector, measured_s: float) -> None:
        # Each step counts alike, long or short: the row is divided by its time.
        row, target = row / measured_s, 1.0
        forgetting = 1 - 1 / MEMORY_STEPS
        covariance = self._covariance / forgetting
        gain = covariance @ row / (1.0 / MEMORY_STEPS + row @ covariance @ row)
        self._factors = np.maximum(self._factors + gain * (target - row @ self._factors), 0.0)
        self._covariance = covariance - np.outer(gain, row @ covariance)
        # What no step tells anything of must not become arbitrarily unsure.
        limit = np.square(PRIOR_DEVIATION)
        scale = np.sqrt(np.minimum(1.0, limit / np.maximum(np.diag(self._covariance), 1e-300)))
        self._covariance = self._covariance * np.outer(scale, scale)
