"""Each type of tensor, read from a file, against its definition written out plainly."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from tests.support.tiny_model import add_tiny_tokenizer
from workers.model.checkpoint import StoredTensor
from workers.model.config import ModelConfig, RopeConfig
from workers.model.gguf_file import open_gguf
from workers.model.gguf_names import gguf_checkpoint

ROWS, COLUMNS = 5, 512
CONFIG = ModelConfig(
    architecture="qwen2", num_layers=1, hidden_size=COLUMNS, intermediate_size=32, num_heads=1,
    num_kv_heads=1, head_dim=2, rope=RopeConfig(10000.0), rms_norm_eps=1e-6, max_context_tokens=8,
    vocab_size=384, tie_embeddings=True, eos_token_ids=(2,), bos_token="", eos_token="",
)  # fmt: skip


def half(block: bytes, offset: int) -> float:
    return float(struct.unpack_from("<e", block, offset)[0])


def f32(block: bytes) -> list[float]:
    return [struct.unpack("<f", block)[0]]


def f16(block: bytes) -> list[float]:
    return [half(block, 0)]


def bf16(block: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + block)[0]]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * number for number in struct.unpack_from("<32b", block, 2)]


def q4_0(block: bytes) -> list[float]:
    numbers = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block, 0) * (number - 8) for number in numbers]


def q4_1(block: bytes) -> list[float]:
    numbers = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [half(block, 0) * number + half(block, 2) for number in numbers]


def q4_k(block: bytes) -> list[float]:
    """Eight parts of 32; the 6-bit scale and minimum of each are packed into 12 bytes."""
    scale, minimum, packed, numbers = half(block, 0), half(block, 2), block[4:16], block[16:]
    values = []
    for i in range(8):
        if i < 4:
            part_scale, part_minimum = packed[i] & 63, packed[i + 4] & 63
        else:
            part_scale = packed[i + 4] & 15 | packed[i - 4] >> 6 << 4
            part_minimum = packed[i + 4] >> 4 | packed[i] >> 6 << 4
        for byte in numbers[i // 2 * 32 : i // 2 * 32 + 32]:
            number = byte >> 4 if i % 2 else byte & 15
            values.append(scale * part_scale * number - minimum * part_minimum)
    return values


def q6_k(block: bytes) -> list[float]:
    """Sixteen parts of 16: four low bits of each number, two high bits, and an 8-bit scale for each part."""
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    scale = half(block, 208)
    values = []
    for i in range(256):
        first, quarter, j = i // 128, i % 128 // 32, i % 32
        low_byte = low[first * 64 + quarter % 2 * 32 + j]
        low_bits = low_byte >> 4 if quarter >= 2 else low_byte & 15
        high_bits = high[first * 32 + j] >> 2 * quarter & 3
        values.append(scale * scales[i // 16] * ((high_bits << 4 | low_bits) - 32))
    return values


TYPES: dict[GGMLQuantizationType, Callable[[bytes], list[float]]] = {
    GGMLQuantizationType.F32: f32,
    GGMLQuantizationType.F16: f16,
    GGMLQuantizationType.BF16: bf16,
    GGMLQuantizationType.Q8_0: q8_0,
    GGMLQuantizationType.Q4_0: q4_0,
    GGMLQuantizationType.Q4_1: q4_1,
    GGMLQuantizationType.Q4_K: q4_k,
    GGMLQuantizationType.Q6_K: q6_k,
}
#: Where blocks keep numbers in fp16, which random bytes must not make infinite.
HALVES = {"F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_rows(tensor_type: GGMLQuantizationType) -> NDArray[np.uint8]:
    """[ROWS, bytes of a row]: random bits, with scales between -2 and 2."""
    rng = np.random.default_rng(3)
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if tensor_type is GGMLQuantizationType.F32:
        return rng.standard_normal((ROWS, COLUMNS), dtype=np.float32).view(np.uint8)
    if tensor_type is GGMLQuantizationType.BF16:
        return np.ascontiguousarray(
            rng.standard_normal((ROWS, COLUMNS), dtype=np.float32).view(np.uint16)[:, 1::2]
        ).view(np.uint8)
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // block_elements, block_bytes), dtype=np.uint8)
    for offset in HALVES[tensor_type.name]:
        scales = rng.uniform(-2, 2, (len(blocks), 1)).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(ROWS, -1)


def stored(path: Path, tensor_type: GGMLQuantizationType, rows: NDArray[np.uint8]) -> StoredTensor:
    """The rows, written to a file and found there."""
    writer = GGUFWriter(path, "qwen2")
    add_tiny_tokenizer(writer, 384, "smollm")
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_shape=rows.shape, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_checkpoint(open_gguf(path), CONFIG).tensors["blk.0.ffn_up.weight"]


@pytest.mark.parametrize("tensor_type", TYPES, ids=lambda tensor_type: tensor_type.name)
def test_values_are_those_of_the_definition(tmp_path: Path, tensor_type: GGMLQuantizationType) -> None:
    rows = random_rows(tensor_type)
    block_bytes = GGML_QUANT_SIZES[tensor_type][1]
    data = rows.tobytes()
    expected: list[float] = []
    for start in range(0, len(data), block_bytes):
        expected += TYPES[tensor_type](data[start : start + block_bytes])
    tensor = stored(tmp_path / "a.gguf", tensor_type, rows)
    assert tensor.shape == (ROWS, COLUMNS)
    values = tensor.read(0, ROWS)
    assert values.dtype == np.float32
    # The definition is computed in double precision here.
    np.testing.assert_allclose(values.reshape(-1), expected, rtol=1e-6, atol=1e-4)
    assert np.array_equal(np.concatenate([tensor.read(0, 2), tensor.read(2, 5)]), values)
