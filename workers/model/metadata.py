"""From GGUF metadata to a ModelConfig, refusing what the forward pass does not do.

The keys are those that llama.cpp's converter writes; `KEY` below stands for `<architecture>.KEY` there.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from gguf.quants import dequantize

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import ModelConfig, RopeConfig, RopeScaling
from workers.model.gguf_file import GgufFile, MetadataValue

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name says that no metadata do."""

    #: The rows of Q and K alternate between the first and the second rotary half of each head.
    is_interleaved: bool = False
    #: Heads of Q and K go through an RMS norm.
    has_qk_norm: bool = False
    #: Every so many layers, the last of them is not rotated; 0 is never.
    nope_interval: int = 0


#: By `general.architecture`. "llama" is also Mistral and SmolLM2, "qwen2" also Qwen2.5.
FAMILIES = {
    "llama": Family(is_interleaved=True),
    "qwen2": Family(),
    "qwen3": Family(has_qk_norm=True),
    "smollm3": Family(is_interleaved=True, nope_interval=4),
}

#: Optional keys that change the forward pass, and the values that do not.
HARMLESS_VALUES: dict[str, tuple[MetadataValue, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "pooling_type": (0,),
    "residual_scale": (1,),
    "rope.freq_base_swa": (),
    "rope.scale_linear": (1,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
ROPE_FACTORS = "rope_freqs.weight"
#: Where further tokens are named that end an answer.
END_TOKEN_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)


class Metadata:
    """Typed look-ups. A key that is absent, or of another type, is an error that names it."""

    def __init__(self, file: GgufFile) -> None:
        self.path = str(file.path)
        self._values = file.metadata

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer that is 0 or more."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a non-negative integer")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer that is 1 or more."""
        value = self.integer(key, default)
        if value == 0:
            raise self._wrong(key, value, "a positive integer")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        return self._array(key, str, "an array of strings")

    def integers(self, key: str) -> list[int]:
        """An array of integers."""
        return self._array(key, int, "an array of integers")

    def numbers(self, key: str) -> list[float]:
        """An array of floating-point numbers."""
        return self._array(key, float, "an array of numbers")

    def flags(self, key: str) -> list[bool]:
        """An array of true and false."""
        return self._array(key, bool, "an array of true and false")

    def has(self, key: str) -> bool:
        """Whether the file says anything under this key."""
        return key in self._values

    def _get(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self._values.get(key, default)
        if value is None:
            raise CorruptModel(self.path, None, f"its metadata lacks {key!r}")
        return value

    def _array(self, key: str, kind: type[T], expected: str) -> list[T]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, value, expected)
        items: list[T] = [item for item in value if isinstance(item, kind)]
        if len(items) != len(value):
            raise self._wrong(key, value, expected)
        return items

    def _wrong(self, key: str, value: MetadataValue, expected: str) -> CorruptModel:
        return CorruptModel(self.path, None, f"metadata {key!r} is {str(value)[:80]!r}, not {expected}")


def read_config(file: GgufFile) -> ModelConfig:
    """The configuration of a model of one of the FAMILIES.

    Raises UnsupportedModel for another architecture or a variant of it that we lack, and CorruptModel for
    metadata that are missing or contradict themselves.
    """
    metadata = Metadata(file)
    architecture = metadata.text("general.architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModel(
            metadata.path, f"architecture {architecture!r}", ", ".join(map(repr, FAMILIES))
        )
    _refuse_variants(file, metadata, architecture)
    tokens = metadata.texts("tokenizer.ggml.tokens")
    eos_token_ids = _eos_token_ids(metadata, len(tokens))
    bos_token_id = read_bos_token_id(metadata, len(tokens))
    hidden_size = metadata.positive(f"{architecture}.embedding_length")
    num_layers = metadata.positive(f"{architecture}.block_count")
    if num_layers > len(file.tensors):
        # Before anything is made for each of them.
        raise CorruptModel(metadata.path, None, f"{num_layers} layers of {len(file.tensors)} tensors")
    num_heads = metadata.positive(f"{architecture}.attention.head_count")
    head_dim = _head_dim(metadata, architecture, max(hidden_size // num_heads, 1))
    nope = range(family.nope_interval - 1, num_layers, family.nope_interval) if family.nope_interval else ()
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=metadata.positive(f"{architecture}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=metadata.positive(f"{architecture}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope=_rope(file, metadata, architecture, head_dim),
        rms_norm_eps=metadata.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        max_context_tokens=metadata.positive(f"{architecture}.context_length"),
        vocab_size=len(tokens),
        tie_embeddings="output.weight" not in file.tensors,
        eos_token_ids=eos_token_ids,
        bos_token="" if bos_token_id is None else tokens[bos_token_id],
        eos_token=tokens[eos_token_ids[0]],
        has_qkv_bias="blk.0.attn_q.bias" in file.tensors,
        has_attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        has_mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        has_qk_norm=family.has_qk_norm,
        sliding_windows=_sliding_windows(metadata, architecture, num_layers),
        nope_layers=frozenset(nope),
    )
    try:
        config.validate()
    except ValueError as error:
        raise CorruptModel(metadata.path, None, f"its metadata describe {error}") from error
    return config


def read_bos_token_id(metadata: Metadata, vocab_size: int) -> int | None:
    """The token that texts begin with; None when the file names none."""
    key = "tokenizer.ggml.bos_token_id"
    return _token_id(metadata, key, vocab_size) if metadata.has(key) else None


def _eos_token_ids(metadata: Metadata, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer, the one called eos first."""
    keys = [key for key in END_TOKEN_KEYS if key == END_TOKEN_KEYS[0] or metadata.has(key)]
    return tuple(dict.fromkeys(_token_id(metadata, key, vocab_size) for key in keys))


def _token_id(metadata: Metadata, key: str, vocab_size: int) -> int:
    token_id = metadata.integer(key)
    if token_id >= vocab_size:
        raise CorruptModel(metadata.path, None, f"{key} is {token_id}; there are {vocab_size} tokens")
    return token_id


def _head_dim(metadata: Metadata, architecture: str, default: int) -> int:
    """Size of a head, which must be the same for Q, K and V, and rotated as a whole."""
    head_dim = metadata.positive(f"{architecture}.attention.key_length", default)
    for key in (f"{architecture}.rope.dimension_count", f"{architecture}.attention.value_length"):
        if metadata.positive(key, head_dim) != head_dim:
            feature = f"{key} {metadata.integer(key)} and heads of {head_dim}"
            raise UnsupportedModel(metadata.path, feature, "equal ones")
    return head_dim


def _rope(file: GgufFile, metadata: Metadata, architecture: str, head_dim: int) -> RopeConfig:
    """The rotation. Llama 3's scaling comes as a factor for each frequency, in a tensor of its own."""
    rope = f"{architecture}.rope"
    theta = metadata.number(f"{rope}.freq_base", 10000.0)
    scaling = metadata.text(f"{rope}.scaling.type", "none")
    factors = _frequency_factors(file, head_dim) if architecture == "llama" else ()
    if factors and scaling != "none":
        raise UnsupportedModel(metadata.path, f"{ROPE_FACTORS} and rope scaling {scaling!r}", "one of them")
    if scaling == "none":
        return RopeConfig(theta=theta, frequency_factors=factors)
    if scaling == "linear":
        factor = metadata.number(f"{rope}.scaling.factor")
        return RopeConfig(theta=theta, scaling=RopeScaling.LINEAR, factor=factor)
    if scaling != "yarn":
        supported = "'none', 'linear', 'yarn', and Llama 3's"
        raise UnsupportedModel(metadata.path, f"rope scaling {scaling!r}", supported)
    factor = metadata.number(f"{rope}.scaling.factor")
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.YARN,
        factor=factor,
        original_context_tokens=metadata.positive(f"{rope}.scaling.original_context_length"),
        beta_fast=metadata.number(f"{rope}.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.number(f"{rope}.scaling.yarn_beta_slow", 1.0),
        # Converters write the model's own factor. Source of the default: YaRN (Peng et al. 2023), section 3.4.
        attention_factor=metadata.number(
            f"{rope}.scaling.yarn_attn_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        ),
    )


def _frequency_factors(file: GgufFile, head_dim: int) -> tuple[float, ...]:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return ()
    if tensor.shape != (head_dim // 2,) or tensor.type.name not in ("F32", "F16"):
        problem = f"tensor {ROPE_FACTORS!r} is {tensor.type.name} of shape {tensor.shape}"
        raise CorruptModel(str(file.path), tensor.offset, problem)
    values = np.asarray(dequantize(file.rows(tensor), tensor.type), dtype=np.float32)
    return tuple(values.reshape(-1).tolist())


def _sliding_windows(metadata: Metadata, architecture: str, num_layers: int) -> tuple[int, ...]:
    """Tokens seen in each layer; empty when all are. The pattern says which layers have a window."""
    window = metadata.integer(f"{architecture}.attention.sliding_window", 0)
    key = f"{architecture}.attention.sliding_window_pattern"
    if window == 0:
        return ()
    if not metadata.has(key):
        return (window,) * num_layers
    return tuple(window if is_windowed else 0 for is_windowed in metadata.flags(key))


def _refuse_variants(file: GgufFile, metadata: Metadata, architecture: str) -> None:
    for key, harmless in HARMLESS_VALUES.items():
        value = file.metadata.get(f"{architecture}.{key}")
        if value is not None and value not in harmless:
            wanted = f"{key} absent" + (f" or {harmless[0]!r}" if harmless else "")
            raise UnsupportedModel(metadata.path, f"{architecture}.{key} = {value!r}", wanted)
    num_files = metadata.integer("split.count", 1)
    if num_files > 1:
        raise UnsupportedModel(metadata.path, f"{num_files} parts", "models in one file")
