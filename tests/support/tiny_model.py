"""Writes a Llama of a few thousand random weights as a real GGUF file, so that tests take the real way in."""

from itertools import product
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Q4, Q8, F32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
CONTROL, NORMAL = 3, 1
#: Sharp attention and a strong MLP: with plain random weights greedy output soon repeats one token, and a
#: test that compares tokens would not see a wrong position.
QK_SCALE, DOWN_SCALE = 2.0, 3.0


def write_tiny_gguf(
    path: Path,
    *,
    num_layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 96,
    vocab: int = 384,
    max_context_tokens: int = 512,
    tie_embeddings: bool = True,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
    seed: int = 0,
) -> Path:
    """Write the file and return `path`.

    hidden is a multiple of 32 and of 2 * heads, intermediate a multiple of 32, vocab at least 259 (control
    tokens and single bytes; the rest are merges of two letters). Matrices are Q4_1, embeddings Q8_0.
    The same arguments give the same file.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(num_layers)
    writer.add_context_length(max_context_tokens)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tiny_tokenizer(writer, vocab, pre_tokenizer)
    rng = np.random.default_rng(seed)
    kv_size = hidden // heads * kv_heads
    _add_matrix(writer, rng, "token_embd", vocab, hidden, Q8)
    for i in range(num_layers):
        _add_norm(writer, rng, f"blk.{i}.attn_norm", hidden)
        _add_matrix(writer, rng, f"blk.{i}.attn_q", hidden, hidden, Q4, QK_SCALE)
        _add_matrix(writer, rng, f"blk.{i}.attn_k", kv_size, hidden, Q4, QK_SCALE)
        _add_matrix(writer, rng, f"blk.{i}.attn_v", kv_size, hidden, Q4)
        _add_matrix(writer, rng, f"blk.{i}.attn_output", hidden, hidden, Q4)
        _add_norm(writer, rng, f"blk.{i}.ffn_norm", hidden)
        _add_matrix(writer, rng, f"blk.{i}.ffn_gate", intermediate, hidden, Q4)
        _add_matrix(writer, rng, f"blk.{i}.ffn_up", intermediate, hidden, Q4)
        _add_matrix(writer, rng, f"blk.{i}.ffn_down", hidden, intermediate, Q4, DOWN_SCALE)
    _add_norm(writer, rng, "output_norm", hidden)
    if not tie_embeddings:
        _add_matrix(writer, rng, "output", vocab, hidden, Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tiny_tokenizer(writer: GGUFWriter, vocab: int, pre_tokenizer: str) -> None:
    pairs = list(product("etaoinsrhldu", repeat=2))[: vocab - len(CONTROL_TOKENS) - 256]
    tokens = [*CONTROL_TOKENS, *sorted(ByteLevel.alphabet()), *(left + right for left, right in pairs)]
    assert len(tokens) == vocab, f"vocab is 259 to {len(tokens)}"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(CONTROL_TOKENS) + [NORMAL] * (vocab - len(CONTROL_TOKENS)))
    writer.add_token_merges([f"{left} {right}" for left, right in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS_TOKEN_ID)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_matrix(
    writer: GGUFWriter,
    rng: np.random.Generator,
    name: str,
    rows: int,
    columns: int,
    tensor_type: GGMLQuantizationType,
    scale: float = 1.0,
) -> None:
    values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / columns**0.5)
    writer.add_tensor(f"{name}.weight", quantize(values, tensor_type), raw_dtype=tensor_type)


def _add_norm(writer: GGUFWriter, rng: np.random.Generator, name: str, size: int) -> None:
    values = (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)
    writer.add_tensor(f"{name}.weight", values, raw_dtype=F32)
