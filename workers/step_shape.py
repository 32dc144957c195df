"""What a step computes, and what of model and device its time depends on. Pure.

A worker tells of its fitted model in these terms; `latency_model` predicts from them.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

#: Steps after which a model is believed that begins with the roofline, and one that begins with a profile is its own.
ENOUGH_STEPS = 30
#: (share of the SMs, share of the whole device's rate that they reach), shares ascending; straight lines between, from (0, 0)
#: to (1, 1).
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes; zero of everything is no step.

    num_decodes: rows of them, with their drafts. decode_context: tokens that the decodes attend to, over all of them.
    prefill_pairs: of a token of a chunk and one that it attends to.
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

    num_weights: of all matrices that each token passes. num_head_weights: of the one that gives logits, which decodes
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
class Contention:
    """How many times longer two streams on one device take because of each other.

    compute, memory: what is bound by arithmetic, or by memory, of a stream on SMs of its own. sliced: all of a stream whose SMs
    the other one has too. upper: a tenth of all cases takes longer than so many times what these say.
    """

    compute: float = 1.0
    memory: float = 1.0
    sliced: float = 2.0
    upper: float = 1.0


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What a device reaches, at best, on the parts of a step.

    bytes_per_s: reading weights, and KV. transfer_bytes_per_s: of KV to another worker. step_overhead_s: see c0.
    is_reading_hidden: reading weights and computing with them overlap, as on a GPU; on a CPU one waits for the other.
    """

    name: str
    flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    step_overhead_s: float
    memory_bytes: float
    transfer_bytes_per_s: float
    is_reading_hidden: bool = True
    compute_curve: Curve = ()
    memory_curve: Curve = ()
    contention: Contention = Contention()


class FactorSource(StrEnum):
    """Where the factors of a latency model come from, the best one first."""

    #: Enough steps of its own.
    FITTED = "fitted"
    #: What `phasewise calibrate` measured, and the few steps that there were.
    PROFILE = "profile"
    #: The shapes of device and model, and the few steps that there were: nothing is decided by it.
    ROOFLINE = "roofline"


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A fitted latency model: all that a prediction needs, and how far off its predictions are.

    factors: c0 to c3. mean_error: of |predicted - measured| / measured; before the first step that of the profile, or None.
    upper_ratio: a tenth of all steps takes longer than so many times what was predicted. num_prompt_steps: of num_steps, those
    that computed tokens of prompts.
    """

    model: ModelShape
    device: DeviceShape
    factors: tuple[float, float, float, float]
    num_steps: int
    mean_error: float | None
    upper_ratio: float
    source: FactorSource = FactorSource.FITTED
    num_prompt_steps: int = 0

    @property
    def knows_prompts(self) -> bool:
        """What tokens of prompts take was measured. Steps of decodes do not say: they have few tokens each, and nearly as many every time."""
        return self.source is FactorSource.PROFILE or self.num_prompt_steps >= ENOUGH_STEPS

    def is_of(self, model: ModelShape, device: DeviceShape) -> bool:
        """Whether it is of such a model, whatever that is called, and such a device."""
        return replace(self.model, name=model.name) == model and self.device.name == device.name


@dataclass(frozen=True, slots=True)
class EncodeCosts:
    """The same of batches of pictures: seconds of a batch whatever is in it, and of each patch."""

    batch_s: float
    patch_s: float
    num_batches: int
    mean_error: float | None
    upper_ratio: float
