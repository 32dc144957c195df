"""The shape of a model, read from its source and kept as JSON. Pure."""

import json
import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from kvtransfer.layout import KvLayout
from workers.model.vision.config import VisionConfig, vision_from_values

#: Positions and lengths are 32-bit numbers on the wire and in kernels.
MAX_CONTEXT_TOKENS = 2**31 - 1


class RopeScaling(StrEnum):
    """How rotary embeddings are stretched beyond the context that a model was trained on."""

    NONE = "none"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a kind of scaling does not use keep their defaults.

    Names and meaning are those of transformers' `rope_parameters`.
    """

    theta: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    #: Context of the unscaled model, in tokens; of DYNAMIC, YARN and LLAMA3.
    original_context_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    #: What cos and sin are multiplied with.
    attention_factor: float = 1.0
    #: YARN: whether the bounds of the ramp are rounded to whole dimensions.
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: Each frequency is divided by its factor, [head_dim / 2]; with NONE only. Empty: all are 1.
    frequency_factors: tuple[float, ...] = ()
    #: M-RoPE: frequencies that turn by the position in time, in height and in width, in this order, together
    #: head_dim / 2. Empty: a token has one position.
    mrope_section: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raise ValueError, saying what is wrong, when there is no such rotation."""
        if not self.theta > 0 or not self.factor > 0 or not self.attention_factor > 0:
            raise ValueError(
                f"rope with theta {self.theta}, factor {self.factor}, attention factor {self.attention_factor}"
            )
        has_context = self.scaling in (RopeScaling.DYNAMIC, RopeScaling.YARN, RopeScaling.LLAMA3)
        if has_context and self.original_context_tokens < 1:
            raise ValueError(f"rope scaling {self.scaling} without the context of the unscaled model")
        if self.scaling is RopeScaling.LLAMA3 and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope with frequency factors {self.low_freq_factor} (low), {self.high_freq_factor} (high)"
            )
        if self.scaling is RopeScaling.YARN and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(f"rope with beta_slow {self.beta_slow} and beta_fast {self.beta_fast}")
        if self.frequency_factors and self.scaling is not RopeScaling.NONE:
            raise ValueError(f"rope with factors of its frequencies and scaling {self.scaling}")
        if not all(0 < factor < math.inf for factor in self.frequency_factors):
            raise ValueError(f"rope with frequency factors of {min(self.frequency_factors)} and more")
        if self.mrope_section and (len(self.mrope_section) != 3 or min(self.mrope_section) < 0):
            raise ValueError(f"mrope sections {self.mrope_section}, not of time, height and width")
        if self.mrope_section and self.scaling is RopeScaling.DYNAMIC:
            raise ValueError(f"rope with mrope sections and scaling {self.scaling}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything but the weights that the forward pass and the gateway need to know."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    max_context_tokens: int
    vocab_size: int
    #: The LM head is the embedding table.
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    #: Q, K and V projections have a bias.
    has_qkv_bias: bool = False
    #: The projection after attention has a bias.
    has_attention_out_bias: bool = False
    #: Gate, up and down projections have a bias.
    has_mlp_bias: bool = False
    #: Each head of Q and K goes through an RMS norm before rotation.
    has_qk_norm: bool = False
    #: Per layer the tokens that a token sees, itself included; 0 is all. Empty: 0 in every layer.
    sliding_windows: tuple[int, ...] = ()
    #: Layers whose Q and K are not rotated.
    nope_layers: frozenset[int] = frozenset()
    #: The encoder of pictures; None: the model takes none.
    vision: VisionConfig | None = None

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: all query heads, then the K heads, then the V heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees, itself included; 0 is all."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def validate(self) -> None:
        """Raise ValueError, saying what is wrong, when no model can have this shape."""
        for name in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
            "max_context_tokens", "vocab_size", "rms_norm_eps",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")
        if self.max_context_tokens > MAX_CONTEXT_TOKENS:
            raise ValueError(f"a context of {self.max_context_tokens} tokens")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads} KV heads")
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers")
        if any(window < 0 for window in self.sliding_windows):
            raise ValueError(f"a sliding window of {min(self.sliding_windows)} tokens")
        if not self.nope_layers <= frozenset(range(self.num_layers)):
            raise ValueError(
                f"layers {sorted(self.nope_layers)} without rotation of {self.num_layers} layers"
            )
        if not all(0 <= token_id < self.vocab_size for token_id in self.eos_token_ids):
            raise ValueError(f"end tokens {self.eos_token_ids} in a vocabulary of {self.vocab_size}")
        if len(self.rope.frequency_factors) not in (0, self.head_dim // 2):
            raise ValueError(
                f"{len(self.rope.frequency_factors)} frequency factors for heads of {self.head_dim}"
            )
        if sum(self.rope.mrope_section) not in (0, self.head_dim // 2):
            raise ValueError(f"mrope sections {self.rope.mrope_section} for heads of {self.head_dim}")
        self.rope.validate()
        if self.vision is not None:
            self._validate_vision(self.vision)

    def _validate_vision(self, vision: VisionConfig) -> None:
        vision.validate()
        if vision.text_hidden_size != self.hidden_size:
            raise ValueError(
                f"embeddings of pictures of size {vision.text_hidden_size}, and of tokens of {self.hidden_size}"
            )
        if not 0 <= vision.image_token_id < self.vocab_size:
            raise ValueError(f"image token {vision.image_token_id} in a vocabulary of {self.vocab_size}")

    @property
    def attention_tokens(self) -> int:
        """The context at which a token's attention takes as many operations as its projections."""
        query_size = self.num_heads * self.head_dim
        # Multiplications of a token in one layer: with the weights, and with K and V of each token it sees.
        projections = self.hidden_size * (self.qkv_size + query_size + 3 * self.intermediate_size)
        return max(1, projections // (2 * query_size))

    def to_json(self) -> str:
        """As `from_json` reads it."""
        values = {**asdict(self), "nope_layers": sorted(self.nope_layers)}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read what `to_json` wrote. Raises ValueError when it is not that."""
        values = _as_fields(cls, json.loads(text))
        rope = _as_fields(RopeConfig, values["rope"])
        values["rope"] = RopeConfig(**{**rope, "scaling": RopeScaling(rope["scaling"])})
        values["nope_layers"] = frozenset(values["nope_layers"])
        if values["vision"] is not None:
            values["vision"] = vision_from_values(values["vision"])
        return cls(**values)

    def kv_layout(self, *, block_size: int, dtype: str, model_digest: str, weight_dtype: str) -> KvLayout:
        """The layout of a KV cache of this model; dtype is a key of DTYPE_BITS, weight_dtype a WeightDtype."""
        return KvLayout(
            model_digest=model_digest,
            dtype=dtype,
            block_size=block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            position_encoding=self._position_encoding(),
            weight_dtype=weight_dtype,
        )

    def _position_encoding(self) -> str:
        """All that K depends on beside the weights: "rope:theta=10000,scaling=linear,factor=4;nope=3,7"."""
        default = RopeConfig(theta=0.0)
        told = [
            f"{field.name}={_exactly(value)}"
            for field in fields(RopeConfig)
            if (value := getattr(self.rope, field.name)) != getattr(default, field.name)
        ]
        nope = ",".join(map(str, sorted(self.nope_layers)))
        return f"rope:{','.join(told)}" + (f";nope={nope}" if nope else "")


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin with for a context `factor` times as long.

    Source: YaRN (Peng et al. 2023), equation 22.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _exactly(value: object) -> str:
    """Text that differs when the values do."""
    if isinstance(value, tuple):
        return "/".join(map(_exactly, value))
    return f"{value:.17g}" if isinstance(value, float) else str(value)


def _as_fields(cls: type[ModelConfig] | type[RopeConfig], values: Any) -> dict[str, Any]:
    """The fields of this class from JSON, whose lists become tuples. Raises ValueError for other fields."""
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
        raise ValueError("not a model configuration of this version")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
