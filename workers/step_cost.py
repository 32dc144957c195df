"""The latency model as six numbers, and what runs of decode steps take in closed form. Pure."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.step_shape import StepCosts

if TYPE_CHECKING:
    # It brings numpy, which clients of a view do without.
    from workers.latency_model import LatencyModel

#: Of a token: a model that has learnt from steps whose launch took longer than what they computed says that tokens cost nothing.
LEAST_TOKEN_S = 1e-9


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step on a whole device takes, in seconds,

        overhead_s + max(token_s * prompt tokens + decode_s * decodes, weights_s) + context_s * decode context + pair_s * prefill pairs

    with context and pairs as in latency_model.StepShape. It is what the latency model says, without an array: k steps of
    one batch, whose context grows by a token for each sequence and step, are a sum in closed form.
    """

    overhead_s: float
    token_s: float
    decode_s: float
    weights_s: float
    context_s: float
    pair_s: float

    @classmethod
    def of(cls, latency: "LatencyModel") -> "StepCost":
        """As the model predicts now."""
        return cls.learnt(latency.costs())

    @classmethod
    def learnt(cls, costs: StepCosts) -> "StepCost":
        """As a worker's model predicted when it told these."""
        model, device, (c0, c1, c2, c3) = costs.model, costs.device, costs.factors
        pair_s = model.pair_flops / device.attention_flops_per_s
        reading_s = (model.num_weights + model.num_head_weights) * model.weight_bytes / device.bytes_per_s
        is_hidden = device.is_reading_hidden
        return cls(
            c0 * (device.step_overhead_s + (0.0 if is_hidden else reading_s)),
            c1 * 2.0 * model.num_weights / device.flops_per_s,
            # Logits are of decodes alone.
            c1 * 2.0 * (model.num_weights + model.num_head_weights) / device.flops_per_s,
            c1 * reading_s if is_hidden else 0.0,
            c2 * max(model.kv_token_bytes / device.bytes_per_s, pair_s),
            c3 * pair_s,
        )

    def step_s(self, num_decodes: int, context: int, num_tokens: int = 0, pairs: float = 0.0) -> float:
        """One step; num_tokens are of prompts."""
        dense_s = self.decode_s * num_decodes + self.token_s * num_tokens
        return self.overhead_s + max(dense_s, self.weights_s) + self.context_s * context + self.pair_s * pairs

    def run_s(self, num_decodes: int, context: int, num_steps: int) -> float:
        """So many decode steps, one after the other, from this context on."""
        grown = num_decodes * num_steps * (num_steps - 1) / 2
        return num_steps * self.step_s(num_decodes, 0) + (num_steps * float(context) + grown) * self.context_s

    def steps_until(self, num_decodes: int, context: int, elapsed_s: float) -> int:
        """The least number of steps, one or more, that take `elapsed_s` or longer."""
        first_s = self.step_s(num_decodes, context)
        growth_s = num_decodes * self.context_s
        linear_s = first_s - growth_s / 2
        # growth / 2 * k^2 + linear * k = elapsed
        if growth_s > 0:
            root = math.sqrt(linear_s * linear_s + 2 * growth_s * max(elapsed_s, 0.0))
            num_steps = math.ceil((root - linear_s) / growth_s - 1e-9)
        else:
            num_steps = math.ceil(max(elapsed_s, 0.0) / first_s - 1e-9)
        return max(1, num_steps)

    def prompt_s(self, num_new: int, num_before: int = 0) -> float:
        """A prompt alone, in as large steps as fill the device."""
        pairs = num_new * (num_before + (num_new + 1) / 2)
        return self.overhead_s + max(self.token_s * num_new, self.weights_s) + self.pair_s * pairs

    def prompt_share(self, num_decodes: int, context: int, step_s: float) -> float:
        """Part of the time that prompts get, 0 to 1, beside these decodes in steps that take so long."""
        beside_s = self.overhead_s + self.context_s * context + self.decode_s * num_decodes
        return max(0.0, 1 - beside_s / step_s)

    def tokens_within(self, num_decodes: int, context: int, num_before: int, limit_s: float) -> int:
        """Most tokens of a prompt, of which `num_before` are known, that a step of these decodes takes within `limit_s`; 0 for none.

        The chunk's own pairs are counted as if it had the length that it would have without them.
        """
        left_s = limit_s - self.overhead_s - self.context_s * context - self.decode_s * num_decodes
        each_s = max(self.token_s + self.pair_s * num_before, LEAST_TOKEN_S)
        if left_s <= 0 or self.overhead_s + self.weights_s + self.context_s * context > limit_s:
            return 0
        num_tokens = left_s / each_s
        return int(left_s / (each_s + self.pair_s * num_tokens / 2))
