"""Writes the weights of a GGUF file as one fp32 safetensors file, in the form the forward pass reads.

Q, K and V are fused row by row into one matrix, and so are gate and up, so that the mapped file is used
as it is. GGUF stores the rows of Q and K of each head with its two rotary halves interleaved; here they
are put back. Memory is bounded: the header is written first, since all sizes are known from the
directory, and then pieces of at most PIECE_BYTES, one after another.

Source: safetensors format (8 bytes of header length, JSON header, data without holes).
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import ModelConfig
from workers.model.gguf_file import GgufFile, TensorInfo

#: Dequantised at once, in bytes of fp32. The intermediate arrays of `dequantize` are a few times that.
PIECE_BYTES = 4 * 2**20
FLOAT_BYTES = 4
#: The data begins at a multiple of this in the file, so that the mapped rows suit vector loads.
DATA_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor and the order in which its rows are taken; None is the stored order."""

    tensor: TensorInfo
    row_order: NDArray[np.intp] | None = None


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: the rows of its parts, one part after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """In the output."""
        return int(np.prod(self.shape)) * FLOAT_BYTES


def unpermuted_rows(num_heads: int, head_dim: int) -> NDArray[np.intp]:
    """Where each row of Q or K is stored.

    Within a head, GGUF alternates rows of the first and of the second rotary half; the order returned has
    the first half, then the second.
    """
    stored = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def plan_output(file: GgufFile, config: ModelConfig) -> list[OutputTensor]:
    """What the output holds, in order.

    Raises CorruptModel for a tensor that is missing or of the wrong shape, and UnsupportedModel for one
    that the forward pass would ignore or that cannot be dequantised.
    """
    _check_types(file)
    planner = _Planner(file)
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    outputs = [planner.output("embedding", planner.part("token_embd", config.vocab_size, hidden))]
    for i in range(config.num_layers):
        stored, layer = f"blk.{i}", f"layers.{i}"
        outputs += [
            planner.output(f"{layer}.attention_norm", planner.part(f"{stored}.attn_norm", hidden)),
            planner.output(
                f"{layer}.qkv",
                planner.part(f"{stored}.attn_q", query_size, hidden, rotary_heads=config.num_heads),
                planner.part(f"{stored}.attn_k", kv_size, hidden, rotary_heads=config.num_kv_heads),
                planner.part(f"{stored}.attn_v", kv_size, hidden),
            ),
            planner.output(
                f"{layer}.attention_out", planner.part(f"{stored}.attn_output", hidden, query_size)
            ),
            planner.output(f"{layer}.mlp_norm", planner.part(f"{stored}.ffn_norm", hidden)),
            planner.output(
                f"{layer}.gate_up",
                planner.part(f"{stored}.ffn_gate", inner, hidden),
                planner.part(f"{stored}.ffn_up", inner, hidden),
            ),
            planner.output(f"{layer}.down", planner.part(f"{stored}.ffn_down", hidden, inner)),
        ]
    outputs.append(planner.output("norm", planner.part("output_norm", hidden)))
    if not config.tie_embeddings:
        outputs.append(planner.output("lm_head", planner.part("output", config.vocab_size, hidden)))
    planner.check_all_used()
    return outputs


def write_safetensors(
    file: GgufFile, outputs: list[OutputTensor], path: Path, progress: Callable[[float], None]
) -> str:
    """Write the file and return the SHA-256 of its bytes, hexadecimal. Raises OSError as `write`."""
    total_bytes = sum(output.num_bytes for output in outputs)
    num_written = 0
    checksum = hashlib.sha256()
    with path.open("wb") as destination:
        header = _header(outputs)
        destination.write(header)
        checksum.update(header)
        for output in outputs:
            for part in output.parts:
                for piece in _pieces(file, part):
                    destination.write(piece)
                    checksum.update(piece)
                    num_written += len(piece)
                    progress(num_written / total_bytes)
    return checksum.hexdigest()


def _header(outputs: list[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + output.num_bytes
        entries[output.name] = {"dtype": "F32", "shape": output.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _pieces(file: GgufFile, part: Part) -> Iterator[memoryview]:
    """The part as fp32 bytes, a few rows at a time."""
    rows = file.rows(part.tensor)
    row_floats = part.tensor.shape[-1]
    step = max(1, PIECE_BYTES // (row_floats * FLOAT_BYTES))
    for first in range(0, len(rows), step):
        chosen: slice | NDArray[np.intp] = slice(first, first + step)
        if part.row_order is not None:
            chosen = part.row_order[first : first + step]
        values = dequantize(np.ascontiguousarray(rows[chosen]), part.tensor.type)
        yield np.ascontiguousarray(values, dtype="<f4").data.cast("B")


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


class _Planner:
    """Takes tensors from the directory by name and shape, and knows which are left."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._unused = dict(file.tensors)

    def part(self, name: str, *shape: int, rotary_heads: int = 0) -> Part:
        """The tensor of this name, which must have this shape; with its rows un-permuted if it has such heads."""
        tensor = self._unused.pop(f"{name}.weight", None)
        if tensor is None:
            raise CorruptModel(str(self._file.path), 0, f"tensor '{name}.weight' is missing")
        if tensor.shape != shape:
            problem = f"tensor {tensor.name!r} has shape {tensor.shape}; the metadata ask for {shape}"
            raise CorruptModel(str(self._file.path), tensor.offset, problem)
        if rotary_heads == 0:
            return Part(tensor)
        return Part(tensor, unpermuted_rows(rotary_heads, shape[0] // rotary_heads))

    def output(self, name: str, *parts: Part) -> OutputTensor:
        """The parts stacked by rows."""
        first = parts[0].tensor.shape
        if len(parts) == 1:
            return OutputTensor(name, first, parts)
        return OutputTensor(name, (sum(part.tensor.shape[0] for part in parts), *first[1:]), parts)

    def check_all_used(self) -> None:
        """A tensor that nobody asked for would change the result, had we known what to do with it."""
        if self._unused:
            names = ", ".join(sorted(self._unused)[:3])
            feature = f"{len(self._unused)} tensors such as {names}"
            raise UnsupportedModel(str(self._file.path), feature, "the tensors of a plain Llama")
