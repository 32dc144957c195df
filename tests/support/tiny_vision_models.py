"""Makes folders of Idefics3 and SmolVLM with a few thousand random weights, in the spellings of transformers 4 and 5."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from tests.support.hf_folder import EOS_TOKEN_ID, SHAPE, VOCAB_SIZE, write_tokenizer

IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
#: Of tiles beyond these the tokenizer reads the text that says which they are.
TOKENS = (IMAGE, AROUND, GLOBAL, "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>")
IMAGE_TOKEN_ID, AROUND_TOKEN_ID, GLOBAL_TOKEN_ID = range(VOCAB_SIZE, VOCAB_SIZE + 3)
#: See hf_folder: without these greedy output soon repeats one token, whatever is in the pictures.
SCALES = {
    "q_proj.weight": 2.0, "k_proj.weight": 2.0, "down_proj.weight": 3.0, "modality_projection.proj.weight": 3.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's shape, as far as pictures depend on it. Lengths in pixels."""

    patch_size: int = 4
    #: What the table of positions is for.
    image_size: int = 24
    tile_size: int = 24
    scale_factor: int = 2
    longest_edge: int = 60
    is_tiled: bool = True
    hidden_size: int = 48
    num_layers: int = 2

    @property
    def tile_embeddings(self) -> int:
        """Embeddings of one tile."""
        return (self.tile_size // self.patch_size // self.scale_factor) ** 2


#: Tiles as large as the table of positions, smaller, with pixels left over, and larger; one view only.
LAYOUTS = {
    "tiles": Layout(),
    "small tiles": Layout(image_size=40, tile_size=24, scale_factor=3),
    "odd tiles": Layout(patch_size=5, image_size=63, tile_size=33, scale_factor=3, longest_edge=100),
    "large tiles": Layout(image_size=24, tile_size=32, longest_edge=70),
    "one view": Layout(is_tiled=False, image_size=32, tile_size=32, scale_factor=4),
}


def image_processor(layout: Layout, *, is_smolvlm: bool = False) -> Any:
    """transformers' image processor of such a folder."""
    cls = SmolVLMImageProcessorPil if is_smolvlm else Idefics3ImageProcessorPil
    return cls(
        size={"longest_edge": layout.longest_edge},
        max_image_size={"longest_edge": layout.tile_size},
        do_image_splitting=layout.is_tiled,
    )


def their_tiles(
    layout: Layout, image: NDArray[np.uint8], *, is_smolvlm: bool = False
) -> tuple[torch.Tensor, str]:
    """What transformers makes of a picture: pixels of its tiles, [num_tiles, 3, side, side], and its text in a prompt."""
    processor = image_processor(layout, is_smolvlm=is_smolvlm)
    found = processor(Image.fromarray(image), return_row_col_info=True, return_tensors="pt")
    rows, cols = found["rows"][0][0], found["cols"][0][0]
    text = get_image_prompt_string(rows, cols, layout.tile_embeddings, AROUND, IMAGE, GLOBAL)
    return found["pixel_values"][0], text


def write_vision_folder(
    folder: Path,
    layout: Layout = LAYOUTS["tiles"],
    *,
    is_smolvlm: bool = False,
    is_old: bool = False,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """Write a model with its tokenizer and image processor; returns it in transformers, fp32.

    is_old: image processor and rotation as transformers 4 writes them. The same arguments give the same weights.
    """
    text: dict[str, Any] = {
        **SHAPE,
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE + len(TOKENS),
        "max_position_embeddings": 2048,
        "eos_token_id": EOS_TOKEN_ID,
        "num_hidden_layers": 3,
    }
    vision = {
        "hidden_size": layout.hidden_size,
        "intermediate_size": 72,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": 4,
        "patch_size": layout.patch_size,
        "image_size": layout.image_size,
    }
    config = (SmolVLMConfig if is_smolvlm else Idefics3Config)(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=layout.scale_factor,
        tie_word_embeddings=tied,
    )
    cls: Any = SmolVLMForConditionalGeneration if is_smolvlm else Idefics3ForConditionalGeneration
    model = cls(config).eval()
    _fill(model, seed)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_processor(folder, layout, is_smolvlm=is_smolvlm, is_old=is_old)
    return model.float()


def write_vision_only(
    folder: Path, text_source: str, image_token_id: int, layout: Layout, hidden_size: int
) -> None:
    """A folder with the encoder's weights alone, for a text model that is elsewhere and whose size is `hidden_size`."""
    write_vision_folder(folder, layout)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    weights = {
        name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(("model.vision_model.", "model.connector."))
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    (projection,) = (name for name in weights if "modality_projection" in name)
    weights[projection] = torch.randn(hidden_size, weights[projection].shape[1], generator=generator).half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    config |= {"phasewise_text_source": text_source, "image_token_id": image_token_id}
    (folder / "config.json").write_text(json.dumps(config))


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a file's object, adding the file if need be; None removes."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path.write_text(json.dumps(values))


def _fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values *= 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            values += 1.0 if "norm" in name and name.endswith("weight") else 0.0
            values *= next((scale for end, scale in SCALES.items() if name.endswith(end)), 1.0)
            parameter.copy_(values)


def _write_processor(folder: Path, layout: Layout, *, is_smolvlm: bool, is_old: bool) -> None:
    values = json.loads(image_processor(layout, is_smolvlm=is_smolvlm).to_json_string())
    name = "SmolVLMProcessor" if is_smolvlm else "Idefics3Processor"
    both = {"image_seq_len": layout.tile_embeddings, "processor_class": name}
    if not is_old:
        (folder / "processor_config.json").write_text(json.dumps({**both, "image_processor": values}))
        return
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    (folder / "processor_config.json").write_text(json.dumps(both))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text.pop("tie_word_embeddings", None)
    # Files named differences from the defaults alone.
    text["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(config))
