"""Writes a transformers model as GGUF, with the names, row orders and metadata of llama.cpp's converter."""

import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tests.support.tiny_model import QK_SCALE, add_tiny_tokenizer

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "smollm3": MODEL_ARCH.SMOLLM3,
}
INTERLEAVED = (MODEL_ARCH.LLAMA, MODEL_ARCH.SMOLLM3)


def randomise(model: PreTrainedModel, *, seed: int = 0, as_half: bool = False) -> None:
    """Give every weight a value that matters to the logits; as_half: one that fp16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            scale = QK_SCALE if "q_proj" in name or "k_proj" in name else 1.0
            values *= scale / weight.shape[1] ** 0.5
        elif name.endswith("bias"):
            values *= 0.5
        else:
            values = 1 + 0.1 * values
        weight.data = values.half().float() if as_half else values


def export_gguf(
    path: Path, model: PreTrainedModel, tensor_type: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Write the file, its matrices as `tensor_type`, with the tiny tokenizer; returns `path`."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if architecture in INTERLEAVED:
        writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, config.rope_parameters, head_dim)
    add_tiny_tokenizer(writer, config.vocab_size, "smollm")
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        if architecture in INTERLEAVED and ".q_proj." in name:
            values = _interleaved(values, config.num_attention_heads)
        if architecture in INTERLEAVED and ".k_proj." in name:
            values = _interleaved(values, config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"llama.cpp has no name for {name}"
        this_type = tensor_type if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(stored, quantize(values, this_type), raw_dtype=this_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """[head, half, pair] becomes [head, pair, half]."""
    halves = values.reshape(num_heads, 2, len(values) // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_rope(writer: GGUFWriter, rope: dict[str, float], head_dim: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
            if "attention_factor" in rope:
                writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        case "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))


def _llama3_factors(rope: dict[str, float], head_dim: int) -> NDArray[np.float32]:
    """What the frequency of each pair of dimensions is divided by."""
    context, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        share = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(factors, dtype=np.float32)
