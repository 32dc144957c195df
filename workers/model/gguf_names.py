"""Where a GGUF file keeps each weight, and how its rows are read."""

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from workers.errors import UnsupportedModel
from workers.model.checkpoint import Checkpoint, SourceModel, StoredTensor, Weight
from workers.model.config import ModelConfig
from workers.model.gguf_file import GgufFile, TensorInfo
from workers.model.metadata import FAMILIES, ROPE_FACTORS, read_config
from workers.model.tokenizer import chat_template, tokenizer_json

NAMES = {
    Weight.EMBEDDING: "token_embd.weight",
    Weight.ATTENTION_NORM: "blk.{layer}.attn_norm.weight",
    Weight.Q: "blk.{layer}.attn_q.weight",
    Weight.K: "blk.{layer}.attn_k.weight",
    Weight.V: "blk.{layer}.attn_v.weight",
    Weight.Q_BIAS: "blk.{layer}.attn_q.bias",
    Weight.K_BIAS: "blk.{layer}.attn_k.bias",
    Weight.V_BIAS: "blk.{layer}.attn_v.bias",
    Weight.Q_NORM: "blk.{layer}.attn_q_norm.weight",
    Weight.K_NORM: "blk.{layer}.attn_k_norm.weight",
    Weight.ATTENTION_OUT: "blk.{layer}.attn_output.weight",
    Weight.ATTENTION_OUT_BIAS: "blk.{layer}.attn_output.bias",
    Weight.MLP_NORM: "blk.{layer}.ffn_norm.weight",
    Weight.GATE: "blk.{layer}.ffn_gate.weight",
    Weight.UP: "blk.{layer}.ffn_up.weight",
    Weight.DOWN: "blk.{layer}.ffn_down.weight",
    Weight.GATE_BIAS: "blk.{layer}.ffn_gate.bias",
    Weight.UP_BIAS: "blk.{layer}.ffn_up.bias",
    Weight.DOWN_BIAS: "blk.{layer}.ffn_down.bias",
    Weight.NORM: "output_norm.weight",
    Weight.LM_HEAD: "output.weight",
}


def read_gguf(file: GgufFile) -> SourceModel:
    """All of a model. Raises UnsupportedModel and CorruptModel as the functions that it calls."""
    config = read_config(file)
    return SourceModel(config, gguf_checkpoint(file, config), tokenizer_json(file), chat_template(file))


def gguf_checkpoint(file: GgufFile, config: ModelConfig) -> Checkpoint:
    """The weights of the file. Raises UnsupportedModel for a type of tensor that cannot be dequantised."""
    _check_types(file)
    num_heads: dict[str, int] = {}
    if FAMILIES[config.architecture].is_interleaved:
        for i in range(config.num_layers):
            for weight in (Weight.Q, Weight.Q_BIAS):
                num_heads[NAMES[weight].format(layer=i)] = config.num_heads
            for weight in (Weight.K, Weight.K_BIAS):
                num_heads[NAMES[weight].format(layer=i)] = config.num_kv_heads
    tensors = {}
    for name, info in file.tensors.items():
        order = None
        if name in num_heads and info.shape[0] % (2 * num_heads[name]) == 0:
            order = unpermuted_rows(num_heads[name], info.shape[0] // num_heads[name])
        tensors[name] = StoredTensor(name, info.shape, _Rows(file, info, order).read)
    # What says how positions are rotated is in the configuration.
    ignored = (ROPE_FACTORS,) if config.rope.frequency_factors else ()
    return Checkpoint(str(file.path), tensors, NAMES, ignored)


def unpermuted_rows(num_heads: int, head_dim: int) -> NDArray[np.intp]:
    """Where each row of Q or K is stored.

    Within a head, GGUF alternates rows of the first and of the second rotary half; the order returned has
    the first half, then the second.
    """
    stored = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Dequantises rows of a tensor, in `order` if that is not the stored one."""

    file: GgufFile
    info: TensorInfo
    order: NDArray[np.intp] | None

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        rows = self.file.rows(self.info)
        chosen: slice | NDArray[np.intp] = slice(first, end)
        if self.order is not None:
            chosen = self.order[first:end]
        if len(self.info.shape) == 1:
            # One stored row; what is asked for are its elements.
            values = dequantize(rows, self.info.type)[0][chosen]
        else:
            values = dequantize(np.ascontiguousarray(rows[chosen]), self.info.type)
        return np.asarray(values, dtype=np.float32)


def _check_types(file: GgufFile) -> None:
    """Try each tensor type once, so that a type we lack is known before anything is written."""
    by_type = {tensor.type: tensor for tensor in file.tensors.values()}
    for tensor_type, tensor in by_type.items():
        block_bytes = GGML_QUANT_SIZES[tensor_type][1]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
        except NotImplementedError as error:
            feature = f"tensor type {tensor_type.name} in {tensor.name!r}"
            raise UnsupportedModel(str(file.path), feature, ", ".join(_supported_types())) from error


def _supported_types() -> list[str]:
    names = []
    for tensor_type in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor_type][1]), np.uint8), tensor_type)
        except NotImplementedError:
            continue
        names.append(tensor_type.name)
    return names
