"""What a Hugging Face folder of Qwen2.5-VL says of its vision encoder and of its prompts, in the spellings of transformers
4 and 5."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.hf_folder import JsonValues
from workers.model.hf_processor import image_processor, numbers
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
#: What config.json says when it does not, where that differs from text models.
TEXT_DEFAULTS: Mapping[str, object] = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
#: Ids of special tokens where config.json does not say: those of the published models.
IMAGE_TOKEN_ID, VISION_START_TOKEN_ID, VISION_END_TOKEN_ID = 151655, 151652, 151653

#: Beginnings of stored names that stand for one thing, and the one that is used here.
NAME_PREFIXES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def text_values(values: JsonValues) -> JsonValues:
    """What config.json says of the text model, which old folders have beside the rest.

    `tie_word_embeddings` is found in either place.
    """
    inner = values.inner("text_config")
    if not inner.values:
        return JsonValues(values.path, {**TEXT_DEFAULTS, **values.values})
    is_tied = values.flag("tie_word_embeddings", False) or inner.flag("tie_word_embeddings", False)
    return JsonValues(inner.path, {**TEXT_DEFAULTS, **inner.values, "tie_word_embeddings": is_tied})


def read_vision(values: JsonValues, folder: Path, tokenizer: Tokenizer, hidden_size: int) -> Qwen25Vision:
    """The vision encoder of config.json and the image processor's files. hidden_size: of the text model.

    Raises UnsupportedModel for variants that we lack, CorruptModel for keys that make no sense, and ModelUnavailable when
    the image processor's file is missing.
    """
    told = values.inner("vision_config")
    if not told.values:
        raise CorruptModel(values.path, None, "it lacks 'vision_config'")
    _refuse_variants(told, folder)
    if told.positive("out_hidden_size", 3584) != hidden_size:
        problem = (
            f"'out_hidden_size' is {told.get('out_hidden_size')}, and the text model's size {hidden_size}"
        )
        raise CorruptModel(told.path, None, problem)
    processor = image_processor(folder)
    num_layers = told.positive("depth", 32)
    full_attention_layers = _integers(told, "fullatt_block_indexes", (7, 15, 23, 31))
    vision = Qwen25Vision(
        num_layers=num_layers,
        hidden_size=told.positive("hidden_size", 3584),
        intermediate_size=told.positive("intermediate_size", 3420),
        num_heads=told.positive("num_heads", 16),
        patch_size=told.positive("patch_size", 14),
        temporal_patch_size=told.positive("temporal_patch_size", 2),
        merge_size=told.positive("spatial_merge_size", 2),
        window_size=told.positive("window_size", 112),
        # Small models may keep the list of large ones.
        full_attention_layers=tuple(i for i in full_attention_layers if i < num_layers),
        text_hidden_size=hidden_size,
        image_token=_token(values, folder, tokenizer, "image_token_id", IMAGE_TOKEN_ID),
        image_token_id=values.integer("image_token_id", IMAGE_TOKEN_ID),
        start_token=_token(values, folder, tokenizer, "vision_start_token_id", VISION_START_TOKEN_ID),
        end_token=_token(values, folder, tokenizer, "vision_end_token_id", VISION_END_TOKEN_ID),
        min_pixels=_pixels(processor, "min_pixels", "shortest_edge", 56 * 56),
        max_pixels=_pixels(processor, "max_pixels", "longest_edge", 28 * 28 * 1280),
        mean=numbers(processor, "image_mean", CLIP_MEAN),
        std=numbers(processor, "image_std", CLIP_STD),
        rescale_factor=processor.number("rescale_factor", 1 / 255),
        resample=processor.integer("resample", BICUBIC),
        rope_theta=told.inner("rope_parameters").number("rope_theta", 10000.0),
    )
    for name, default, ours in (
        ("patch_size", 14, vision.patch_size),
        ("temporal_patch_size", 2, vision.temporal_patch_size),
        ("merge_size", 2, vision.merge_size),
    ):
        if processor.positive(name, default) != ours:
            raise CorruptModel(processor.path, None, f"{name!r} is not the {ours} of config.json")
    return vision


def _refuse_variants(told: JsonValues, folder: Path) -> None:
    activation = told.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UnsupportedModel(str(folder), f"a vision encoder with hidden_act = {activation}", "silu")
    channels = told.positive("in_channels", told.positive("in_chans", 3))
    if channels != 3:
        raise UnsupportedModel(str(folder), f"a vision encoder of {channels} channels", "3 channels")
    kind = told.inner("rope_parameters").get("rope_type")
    if kind not in (None, "axial", "default"):
        raise UnsupportedModel(str(folder), f"a vision encoder with rope type {kind!r}", "axial")


def _pixels(processor: JsonValues, old_key: str, new_key: str, default: int) -> int:
    """A limit on pixels; the old spelling counts more, as in transformers."""
    return processor.positive(old_key, processor.inner("size").positive(new_key, default))


def _token(values: JsonValues, folder: Path, tokenizer: Tokenizer, key: str, default: int) -> str:
    token_id = values.integer(key, default)
    text: str | None = tokenizer.id_to_token(token_id) if token_id < 2**32 else None
    if text is None:
        problem = f"{key!r} is {token_id}, which the tokenizer in {str(folder)!r} lacks"
        raise CorruptModel(values.path, None, problem)
    return text


def _integers(values: JsonValues, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    items = values.items(key)
    if items is None:
        return default
    found = tuple(
        item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0
    )
    if len(found) != len(items):
        raise CorruptModel(values.path, None, f"{key!r} is {str(items)[:80]!r}, not a list of integers")
    return found


def plain_name(name: str) -> str:
    """A stored name as old folders spell it."""
    for prefix, plain in NAME_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


#: Where the vision encoder's tensors are, as old folders spell it: by the name in the converted file, the stored ones whose
#: rows it holds, one after another. "{layer}" stands for the number of the layer.
VISION_NAMES: Mapping[str, tuple[str, ...]] = {
    "vision.patch_embedding": ("visual.patch_embed.proj.weight",),
    "vision.merger_norm": ("visual.merger.ln_q.weight",),
    "vision.merger_in": ("visual.merger.mlp.0.weight",),
    "vision.merger_in_bias": ("visual.merger.mlp.0.bias",),
    "vision.merger_out": ("visual.merger.mlp.2.weight",),
    "vision.merger_out_bias": ("visual.merger.mlp.2.bias",),
}
VISION_LAYER_NAMES: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("visual.blocks.{layer}.norm1.weight",),
    "qkv": ("visual.blocks.{layer}.attn.qkv.weight",),
    "qkv_bias": ("visual.blocks.{layer}.attn.qkv.bias",),
    "attention_out": ("visual.blocks.{layer}.attn.proj.weight",),
    "attention_out_bias": ("visual.blocks.{layer}.attn.proj.bias",),
    "mlp_norm": ("visual.blocks.{layer}.norm2.weight",),
    "gate_up": ("visual.blocks.{layer}.mlp.gate_proj.weight", "visual.blocks.{layer}.mlp.up_proj.weight"),
    "gate_up_bias": ("visual.blocks.{layer}.mlp.gate_proj.bias", "visual.blocks.{layer}.mlp.up_proj.bias"),
    "down": ("visual.blocks.{layer}.mlp.down_proj.weight",),
    "down_bias": ("visual.blocks.{layer}.mlp.down_proj.bias",),
}
