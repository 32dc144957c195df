"""From the JSON files of a Hugging Face folder to a ModelConfig, refusing what the forward pass does not do.

Defaults are those of transformers 5 for keys that it leaves out, or that older versions did not write.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import ModelConfig, RopeConfig
from workers.model.hf_folder import CONFIG, GENERATION_CONFIG, JsonValues, read_json, special_token
from workers.model.hf_rope import read_rope
from workers.model.hf_vision import VISION_FAMILIES, VisionFamily


@dataclass(frozen=True, slots=True)
class _Family:
    """What tells the families apart."""

    name: str
    #: Whether the embedding table is the LM head when config.json does not say.
    tied: bool = False
    theta: float = 10000.0
    #: Q, K and V always have a bias, whatever `attention_bias` says, and the projection after them has none.
    has_fixed_qkv_bias: bool = False
    #: `attention_bias` and `mlp_bias` are read.
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    has_qk_norm: bool = False
    #: Head size when config.json does not say; 0: what the hidden size leaves for each head.
    head_dim: int = 0


#: By the name under `architectures`. SmolLM2 is a Llama.
FAMILIES = {
    "LlamaForCausalLM": _Family("llama", reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family("mistral"),
    "Qwen2ForCausalLM": _Family("qwen2", has_fixed_qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", reads_attention_bias=True, has_qk_norm=True, head_dim=128),
    "SmolLM3ForCausalLM": _Family(
        "smollm3", tied=True, theta=2000000.0, reads_attention_bias=True, reads_mlp_bias=True
    ),
}
#: Keys that change the forward pass, and the values that do not. An absent key changes nothing.
HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "partial_rotary_factor": (None, 1.0),
    "use_mrope": (None, False),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}
#: More is a damaged file: a list that long would take minutes to make.
MAX_LAYERS = 10_000
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration of the model in this folder.

    Raises UnsupportedModel for another architecture or a variant that we lack, and CorruptModel for keys
    that are missing or contradict each other.
    """
    values = read_json(folder / CONFIG)
    architecture = _architecture(values, folder)
    _refuse_variants(values, folder)
    pictures = VISION_FAMILIES.get(architecture)
    if pictures is None:
        return _read_text(values, folder, tokenizer, FAMILIES[architecture], read_rope)
    text = pictures.text_values(values)
    _refuse_variants(text, folder)
    config = _read_text(text, folder, tokenizer, FAMILIES[pictures.text_architecture], pictures.read_rope)
    return with_vision(config, pictures, folder, tokenizer)


def with_vision(config: ModelConfig, family: VisionFamily, folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    """A text model's configuration with the encoder that this folder describes.

    Raises as `read_config`, and ModelUnavailable when the image processor's file is missing.
    """
    values = read_json(folder / CONFIG)
    _refuse_variants(values, folder)
    vision = family.read_vision(values, folder, tokenizer, config.hidden_size)
    if vision.num_layers > MAX_LAYERS:
        raise CorruptModel(values.path, None, f"it names {vision.num_layers} layers of its vision encoder")
    return replace(config, architecture=family.name, vision=vision)


def vision_family(folder: Path) -> VisionFamily | None:
    """Of the model in this folder; None: it takes no pictures. Raises as `read_config`."""
    return VISION_FAMILIES.get(_architecture(read_json(folder / CONFIG), folder))


def _read_text(
    values: JsonValues,
    folder: Path,
    tokenizer: Tokenizer,
    family: _Family,
    rope_of: Callable[[JsonValues, str, float], tuple[RopeConfig, int]],
) -> ModelConfig:
    num_layers = values.positive("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise CorruptModel(values.path, None, f"it names {num_layers} layers")
    hidden_size = values.positive("hidden_size")
    num_heads = values.positive("num_attention_heads")
    if "num_key_value_heads" not in values.values and family.name != "llama":
        raise CorruptModel(values.path, None, "it lacks 'num_key_value_heads'")
    has_attention_bias = family.reads_attention_bias and values.flag("attention_bias", False)
    eos_token_ids = _eos_token_ids(values, folder, tokenizer)
    rope, max_context_tokens = rope_of(values, str(folder), family.theta)
    return ModelConfig(
        architecture=family.name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=values.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=values.positive("num_key_value_heads", num_heads),
        head_dim=values.positive("head_dim", family.head_dim or max(hidden_size // num_heads, 1)),
        rope=rope,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        max_context_tokens=max_context_tokens,
        vocab_size=values.positive("vocab_size"),
        tie_embeddings=values.flag("tie_word_embeddings", family.tied),
        eos_token_ids=eos_token_ids,
        bos_token=special_token(folder, "bos_token", tokenizer, _token_ids(values, "bos_token_id")),
        eos_token=special_token(folder, "eos_token", tokenizer, eos_token_ids),
        has_qkv_bias=family.has_fixed_qkv_bias or has_attention_bias,
        has_attention_out_bias=has_attention_bias,
        has_mlp_bias=family.reads_mlp_bias and values.flag("mlp_bias", False),
        has_qk_norm=family.has_qk_norm,
        sliding_windows=_sliding_windows(family, values, folder, num_layers),
        nope_layers=_nope_layers(values, num_layers) if family.name == "smollm3" else frozenset(),
    )


def _architecture(values: JsonValues, folder: Path) -> str:
    architectures = values.items("architectures")
    if not architectures:
        raise CorruptModel(values.path, None, "it lacks 'architectures'")
    name, known = str(architectures[0]), (*FAMILIES, *VISION_FAMILIES)
    if name not in known or len(architectures) > 1:
        feature = f"architecture {', '.join(map(repr, architectures))}"
        raise UnsupportedModel(str(folder), feature, ", ".join(known))
    return name


def _refuse_variants(values: JsonValues, folder: Path) -> None:
    for key, harmless in HARMLESS_VALUES.items():
        if key in values.values and values.get(key) not in harmless:
            shown = str(values.get(key))[:80]
            raise UnsupportedModel(str(folder), f"{key} = {shown}", f"{key} absent or {harmless[-1]}")


def _sliding_windows(family: _Family, values: JsonValues, folder: Path, num_layers: int) -> tuple[int, ...]:
    """Per layer the tokens that a token sees, itself included; 0 is all. Empty when that is so in every layer."""
    if values.get("sliding_window") is None or family.name == "llama":
        return ()
    window = values.positive("sliding_window")
    if family.name == "mistral":
        return (window,) * num_layers
    if not values.flag("use_sliding_window", False):
        return ()
    if (layer_types := values.items("layer_types")) is not None:
        other = [layer_type for layer_type in layer_types if layer_type not in LAYER_TYPES]
        if other:
            raise UnsupportedModel(str(folder), f"layers of type {other[0]!r}", ", ".join(LAYER_TYPES))
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in layer_types[:num_layers])
    elif family.name == "smollm3":
        nope_layers = _nope_layers(values, num_layers)
        windows = tuple(window if i in nope_layers else 0 for i in range(num_layers))
    else:
        first = values.integer("max_window_layers", 28)
        windows = tuple(window if i >= first else 0 for i in range(num_layers))
    return windows if any(windows) else ()


def _nope_layers(values: JsonValues, num_layers: int) -> frozenset[int]:
    """Layers that are not rotated: those with a 0 in the list, or every so many-th."""
    listed = values.items("no_rope_layers")
    if listed is None:
        interval = values.positive("no_rope_layer_interval", 4)
        return frozenset(i for i in range(num_layers) if (i + 1) % interval == 0)
    if len(listed) < num_layers:
        problem = f"'no_rope_layers' has {len(listed)} entries for {num_layers} layers"
        raise CorruptModel(values.path, None, problem)
    return frozenset(i for i, is_rotated in enumerate(listed[:num_layers]) if not is_rotated)


def _eos_token_ids(values: JsonValues, folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """As generation_config.json says, else config.json, else the tokenizer's end token."""
    token_ids = _token_ids(read_json(folder / GENERATION_CONFIG), "eos_token_id") or _token_ids(
        values, "eos_token_id"
    )
    if token_ids:
        return token_ids
    token_id = tokenizer.token_to_id(special_token(folder, "eos_token", tokenizer, ()))
    return () if token_id is None else (token_id,)


def _token_ids(values: JsonValues, key: str) -> tuple[int, ...]:
    """An id or an array of ids."""
    value = values.get(key)
    token_ids = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in token_ids):
        raise CorruptModel(values.path, None, f"{key!r} is {str(value)[:80]!r}, not an id or a list of ids")
    return tuple(dict.fromkeys(token_ids))
