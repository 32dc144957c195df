"""Makes folders of Qwen2.5-VL with a few thousand random weights, in the spellings of transformers 4 and 5."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.hf_folder import EOS_TOKEN_ID, SHAPE, VOCAB_SIZE, write_tokenizer

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START_TOKEN_ID, END_TOKEN_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = range(VOCAB_SIZE, VOCAB_SIZE + len(TOKENS))
TEXT: dict[str, Any] = {
    **SHAPE,
    "vocab_size": VOCAB_SIZE + len(TOKENS),
    "eos_token_id": EOS_TOKEN_ID,
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
#: Windows of 4 x 4 embeddings, layers of both kinds, and 6 patches that most grids do not divide into.
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_heads": 4,
    "patch_size": 4,
    "window_size": 32,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
#: The image processor's; a square is 8 x 8 pixels.
MIN_PIXELS, MAX_PIXELS = 4 * 64, 80 * 64
#: See hf_folder: without these greedy output soon repeats one token, whatever the positions are.
SCALES = {"q_proj.weight": 2.0, "k_proj.weight": 2.0, "down_proj.weight": 3.0, "merger.mlp.2.weight": 3.0}


class Spelling(StrEnum):
    """Which version of transformers wrote a folder."""

    #: Flat config.json, `visual.` and `model.` in the weights, preprocessor_config.json.
    OLD = "old"
    #: `model.visual.` and `model.language_model.` in the weights.
    MIDDLE = "middle"
    #: Nested config.json, processor_config.json.
    NEW = "new"


def processor() -> Qwen2VLImageProcessorPil:
    """transformers' image processor of these folders."""
    theirs: Any = Qwen2VLImageProcessorPil(
        patch_size=VISION["patch_size"], min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
    )
    return theirs


def write_qwen_vl_folder(
    folder: Path, spelling: Spelling = Spelling.NEW, *, seed: int = 0, tied: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """Write a model with its tokenizer and image processor; returns it. The same seed gives the same weights."""
    config = Qwen2_5_VLConfig(
        text_config=dict(TEXT),
        vision_config=dict(VISION),
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=VIDEO_TOKEN_ID,
        vision_start_token_id=START_TOKEN_ID,
        vision_end_token_id=END_TOKEN_ID,
        tie_word_embeddings=tied,
    )
    model: Any = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values *= 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            values += 1.0 if "norm" in name or "ln_q" in name else 0.0
            values *= next((scale for end, scale in SCALES.items() if name.endswith(end)), 1.0)
            parameter.copy_(values)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _spell(folder, spelling)
    return model


def _spell(folder: Path, spelling: Spelling) -> None:
    processor_values = json.loads(processor().to_json_string())
    if spelling is Spelling.NEW:
        texts = {"image_processor": processor_values, "processor_class": "Qwen2_5_VLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(texts))
        return
    size = processor_values.pop("size")
    processor_values |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_values))
    values = json.loads((folder / "config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "tie_word_embeddings": values["tie_word_embeddings"],
    }
    vision = values["vision_config"]
    del vision["rope_parameters"]
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": vision["patch_size"]}
    vision["model_type"] = "qwen2_5_vl"
    if spelling is Spelling.OLD:
        del text["layer_types"], text["model_type"]
        values |= text
    else:
        values["text_config"] = text
        _rename_weights(folder)
    (folder / "config.json").write_text(json.dumps(values))


def _rename_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        if name.startswith("visual."):
            renamed[f"model.{name}"] = tensor
        elif name.startswith("model."):
            renamed[f"model.language_model.{name.removeprefix('model.')}"] = tensor
        else:
            renamed[name] = tensor
    save_file(renamed, path, {"format": "pt"})
