"""What a Hugging Face folder of Idefics3 or SmolVLM says of its vision encoder and of its prompts, in the spellings of
transformers 4 and 5."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.hf_folder import PROCESSOR, TOKENIZER_CONFIG, JsonValues, read_json
from workers.model.hf_processor import image_processor, numbers
from workers.model.vision.idefics3_config import Idefics3Vision

#: Where the vision encoder's tensors are, by plain name: by the name in the converted file, the stored ones whose rows it
#: holds, one after another. "{layer}" stands for the number of the layer.
VISION_NAMES: Mapping[str, tuple[str, ...]] = {
    "vision.patch_embedding": ("vision_model.embeddings.patch_embedding.weight",),
    "vision.patch_embedding_bias": ("vision_model.embeddings.patch_embedding.bias",),
    "vision.position_embedding": ("vision_model.embeddings.position_embedding.weight",),
    "vision.norm": ("vision_model.post_layernorm.weight",),
    "vision.norm_bias": ("vision_model.post_layernorm.bias",),
    "vision.projection": ("connector.modality_projection.proj.weight",),
}
_LAYER = "vision_model.encoder.layers.{layer}."
_QKV = tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv")
VISION_LAYER_NAMES: Mapping[str, tuple[str, ...]] = {
    "attention_norm": (f"{_LAYER}layer_norm1.weight",),
    "attention_norm_bias": (f"{_LAYER}layer_norm1.bias",),
    "qkv": tuple(f"{name}.weight" for name in _QKV),
    "qkv_bias": tuple(f"{name}.bias" for name in _QKV),
    "attention_out": (f"{_LAYER}self_attn.out_proj.weight",),
    "attention_out_bias": (f"{_LAYER}self_attn.out_proj.bias",),
    "mlp_norm": (f"{_LAYER}layer_norm2.weight",),
    "mlp_norm_bias": (f"{_LAYER}layer_norm2.bias",),
    "up": (f"{_LAYER}mlp.fc1.weight",),
    "up_bias": (f"{_LAYER}mlp.fc1.bias",),
    "down": (f"{_LAYER}mlp.fc2.weight",),
    "down_bias": (f"{_LAYER}mlp.fc2.bias",),
}
#: Beginnings of stored names, and what they are here; the base model alone has them without the first "model.".
NAME_PREFIXES = (
    ("model.text_model.", "model."),
    ("text_model.", "model."),
    ("model.vision_model.", "vision_model."),
    ("model.connector.", "connector."),
)
#: Beginnings of the plain names of the encoder's tensors.
VISION_PREFIXES = ("vision_model.", "connector.")

#: What transformers takes for keys of `text_config` that are not there: files name differences from them alone.
TEXT_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
IMAGE_TOKEN_ID = 128257
AROUND_TEXT, GLOBAL_TEXT = "<fake_token_around_image>", "<global-img>"
LANCZOS = 1
TILE_SIZE = 364
ACTIVATION = "gelu_pytorch_tanh"


def text_values(values: JsonValues) -> JsonValues:
    """What config.json says of the text model. `tie_word_embeddings` is found in either place, and so is the end token."""
    inner = values.inner("text_config")
    if not inner.values:
        raise CorruptModel(values.path, None, "it lacks 'text_config'")
    kind = inner.get("model_type") or "llama"
    if kind != "llama":
        raise UnsupportedModel(values.path, f"a text model of type {kind!r} with pictures", "'llama'")
    told = {key: value for key, value in inner.values.items() if value is not None}
    is_tied = bool(values.get("tie_word_embeddings")) or bool(inner.get("tie_word_embeddings"))
    outer = {key: values.get(key) for key in ("bos_token_id", "eos_token_id")}
    return JsonValues(inner.path, {**TEXT_DEFAULTS, **outer, **told, "tie_word_embeddings": is_tied})


def read_vision(values: JsonValues, folder: Path, tokenizer: Tokenizer, hidden_size: int) -> Idefics3Vision:
    """The vision encoder of config.json and the image processor's files. hidden_size: of the text model.

    Raises UnsupportedModel for variants that we lack, CorruptModel for keys that make no sense, and ModelUnavailable when
    the image processor's file is missing.
    """
    told = values.inner("vision_config")
    if not told.values:
        raise CorruptModel(values.path, None, "it lacks 'vision_config'")
    if told.get("hidden_act") not in (None, ACTIVATION):
        feature = f"a vision encoder with hidden_act = {told.get('hidden_act')}"
        raise UnsupportedModel(str(folder), feature, ACTIVATION)
    if told.positive("num_channels", 3) != 3:
        feature = f"a vision encoder of {told.get('num_channels')} channels"
        raise UnsupportedModel(str(folder), feature, "3 channels")
    processor = image_processor(folder)
    if processor.get("size") is not None and processor.inner("size").get("longest_edge") is None:
        feature = f"an image processor that resizes to {processor.get('size')}"
        raise UnsupportedModel(str(folder), feature, "a size with longest_edge")
    image_token, image_token_id = _image_token(values, tokenizer)
    vision = Idefics3Vision(
        num_layers=told.positive("num_hidden_layers", 12),
        hidden_size=told.positive("hidden_size", 1152),
        intermediate_size=told.positive("intermediate_size", 3072),
        num_heads=told.positive("num_attention_heads", 16),
        patch_size=told.positive("patch_size", 32),
        image_size=told.positive("image_size", 224),
        scale_factor=values.positive("scale_factor", 2),
        layer_norm_eps=told.number("layer_norm_eps", 1e-6),
        text_hidden_size=hidden_size,
        image_token=image_token,
        image_token_id=image_token_id,
        around_text=_text(folder, "fake_image_token", AROUND_TEXT),
        global_text=_text(folder, "global_image_token", GLOBAL_TEXT),
        is_tiled=processor.flag("do_image_splitting", True),
        longest_edge=processor.inner("size").positive("longest_edge", 4 * TILE_SIZE),
        tile_size=processor.inner("max_image_size").positive("longest_edge", TILE_SIZE),
        mean=numbers(processor, "image_mean", (0.5, 0.5, 0.5)),
        std=numbers(processor, "image_std", (0.5, 0.5, 0.5)),
        rescale_factor=processor.number("rescale_factor", 1 / 255),
        resample=processor.integer("resample", LANCZOS),
    )
    told_embeddings = read_json(folder / PROCESSOR).get("image_seq_len")
    if told_embeddings is not None and told_embeddings != vision.tile_embeddings:
        problem = f"'image_seq_len' is {told_embeddings}; a tile has {vision.tile_embeddings} embeddings"
        raise CorruptModel(str(folder / PROCESSOR), None, problem)
    return vision


def plain_name(name: str) -> str:
    """A stored name as text models alone have it, and without "model." before the encoder's."""
    for prefix, plain in NAME_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _image_token(values: JsonValues, tokenizer: Tokenizer) -> tuple[str, int]:
    """Text and id of the token that stands for an embedding, which the tokenizer must read as that token."""
    token_id = values.integer("image_token_id", IMAGE_TOKEN_ID)
    text: str | None = tokenizer.id_to_token(token_id) if token_id < 2**32 else None
    if text is None:
        problem = f"'image_token_id' is {token_id}, which is not in the tokenizer's vocabulary"
        raise CorruptModel(values.path, None, problem)
    if tokenizer.encode(text * 2, add_special_tokens=False).ids != [token_id] * 2:
        problem = f"'image_token_id' is {token_id}, {text!r}, which the tokenizer does not read as that token"
        raise CorruptModel(values.path, None, problem)
    return text, token_id


def _text(folder: Path, name: str, default: str) -> str:
    """A text of the prompt, by the name that the tokenizer gives it; may be empty."""
    values = read_json(folder / TOKENIZER_CONFIG)
    told = values.get(name)
    if told is None:
        # A list in files of other models.
        extra = values.get("extra_special_tokens")
        told = extra.get(name) if isinstance(extra, dict) else None
    text = told.get("content") if isinstance(told, dict) else told
    if text is None:
        return default
    if not isinstance(text, str):
        raise CorruptModel(values.path, None, f"{name!r} is {str(told)[:80]!r}, not a text")
    return text
