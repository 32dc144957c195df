"""Where a Hugging Face folder keeps each weight, and how its rows are read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.checkpoint import Checkpoint, SourceModel, StoredTensor, VisionCheckpoint, Weight
from workers.model.config import ModelConfig
from workers.model.hf_config import read_config, vision_family, with_vision
from workers.model.hf_folder import TEXT_SOURCE, chat_template, read_tokenizer, weight_files
from workers.model.hf_vision import VisionFamily

NAMES = {
    Weight.EMBEDDING: "model.embed_tokens.weight",
    Weight.ATTENTION_NORM: "model.layers.{layer}.input_layernorm.weight",
    Weight.Q: "model.layers.{layer}.self_attn.q_proj.weight",
    Weight.K: "model.layers.{layer}.self_attn.k_proj.weight",
    Weight.V: "model.layers.{layer}.self_attn.v_proj.weight",
    Weight.Q_BIAS: "model.layers.{layer}.self_attn.q_proj.bias",
    Weight.K_BIAS: "model.layers.{layer}.self_attn.k_proj.bias",
    Weight.V_BIAS: "model.layers.{layer}.self_attn.v_proj.bias",
    Weight.Q_NORM: "model.layers.{layer}.self_attn.q_norm.weight",
    Weight.K_NORM: "model.layers.{layer}.self_attn.k_norm.weight",
    Weight.ATTENTION_OUT: "model.layers.{layer}.self_attn.o_proj.weight",
    Weight.ATTENTION_OUT_BIAS: "model.layers.{layer}.self_attn.o_proj.bias",
    Weight.MLP_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
    Weight.GATE: "model.layers.{layer}.mlp.gate_proj.weight",
    Weight.UP: "model.layers.{layer}.mlp.up_proj.weight",
    Weight.DOWN: "model.layers.{layer}.mlp.down_proj.weight",
    Weight.GATE_BIAS: "model.layers.{layer}.mlp.gate_proj.bias",
    Weight.UP_BIAS: "model.layers.{layer}.mlp.up_proj.bias",
    Weight.DOWN_BIAS: "model.layers.{layer}.mlp.down_proj.bias",
    Weight.NORM: "model.norm.weight",
    Weight.LM_HEAD: "lm_head.weight",
}
#: Types of tensors in the files.
DTYPES = ("F32", "F16", "BF16")
#: Old folders keep the inverse frequencies, which follow from the configuration.
IGNORED = (".rotary_emb.inv_freq",)
#: Rows that are compared at once.
COMPARED_ROWS = 4096


def read_hf_folder(folder: Path) -> SourceModel:
    """All of a model. Raises UnsupportedModel, CorruptModel and ModelUnavailable."""
    tokenizer_json, tokenizer = read_tokenizer(folder)
    config = read_config(folder, tokenizer)
    tensors, vision = _tensors(folder), None
    if (family := vision_family(folder)) is not None:
        tensors, vision = _split(tensors, family, config, folder)
    checkpoint = Checkpoint(str(folder), tensors, NAMES, IGNORED)
    if config.tie_embeddings and NAMES[Weight.LM_HEAD] in checkpoint.tensors:
        # What is stored counts more than what the configuration says of it, as in transformers.
        if _are_equal(checkpoint, NAMES[Weight.EMBEDDING], NAMES[Weight.LM_HEAD]):
            checkpoint = replace(checkpoint, ignored=(*IGNORED, NAMES[Weight.LM_HEAD]))
        else:
            config = replace(config, tie_embeddings=False)
    return SourceModel(config, checkpoint, tokenizer_json, chat_template(folder), vision)


def add_vision(text: SourceModel, folder: Path) -> SourceModel:
    """A text model with the encoder in this folder, whose own chat template counts more.

    Raises UnsupportedModel, CorruptModel and ModelUnavailable.
    """
    family = vision_family(folder)
    if family is None or family.has_mrope or text.vision is not None:
        feature = f"{TEXT_SOURCE} in a model of another architecture, or one that names a model with pictures"
        raise UnsupportedModel(str(folder), feature, "Idefics3 with a text model")
    config = with_vision(text.config, family, folder, Tokenizer.from_str(text.tokenizer_json.decode()))
    rest, vision = _split(_tensors(folder), family, config, folder)
    if rest:
        feature = f"{TEXT_SOURCE} beside text weights such as {min(rest)}"
        raise UnsupportedModel(str(folder), feature, "one or the other")
    template = chat_template(folder) or text.chat_template
    return replace(text, config=config, chat_template=template, vision=vision)


def _split(
    tensors: dict[str, StoredTensor], family: VisionFamily, config: ModelConfig, folder: Path
) -> tuple[dict[str, StoredTensor], VisionCheckpoint]:
    """The text model's weights and the encoder's, by plain names."""
    assert config.vision is not None, "read from the same folder"
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        other = plain.setdefault(family.plain_name(name), tensor)
        if other is not tensor:
            raise CorruptModel(str(folder), None, f"tensors {other.name!r} and {name!r} are the same weight")
    text = {name: tensor for name, tensor in plain.items() if not name.startswith(family.prefixes)}
    vision = {name: tensor for name, tensor in plain.items() if name not in text}
    return text, VisionCheckpoint(str(folder), vision, family.stored_names(config.vision.num_layers))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Reads rows of a tensor from a mapped file."""

    #: What `safe_open` gives; the library has no types.
    file: Any
    name: str

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        rows: torch.Tensor = self.file.get_slice(self.name)[first:end]
        values: NDArray[np.float32] = rows.float().numpy()
        return values


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of every file. The files stay mapped as long as these live."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            file: Any = safe_open(path, framework="pt")
            names = list(file.keys())
        except SafetensorError as error:
            raise CorruptModel(str(path), None, f"not a whole safetensors file: {error}") from error
        for name in names:
            stored = file.get_slice(name)
            if stored.get_dtype() not in DTYPES:
                feature = f"tensor type {stored.get_dtype()} in {name!r}"
                raise UnsupportedModel(str(folder), feature, ", ".join(DTYPES))
            tensors[name] = StoredTensor(name, tuple(stored.get_shape()), _Rows(file, name).read)
    return tensors


def _are_equal(checkpoint: Checkpoint, name: str, other_name: str) -> bool:
    tensor, other = checkpoint.tensors.get(name), checkpoint.tensors[other_name]
    if tensor is None or tensor.shape != other.shape or not tensor.shape:
        return False
    num_rows = tensor.shape[0]
    return all(
        np.array_equal(
            tensor.read(first, min(first + COMPARED_ROWS, num_rows)),
            other.read(first, min(first + COMPARED_ROWS, num_rows)),
        )
        for first in range(0, num_rows, COMPARED_ROWS)
    )
