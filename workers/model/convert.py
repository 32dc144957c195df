"""Writes the weights of a model as one fp32 safetensors file, in the form the forward pass reads.

Q, K and V are fused row by row into one matrix, and so are gate and up, so that the mapped file is used
as it is. Memory is bounded: the header is written first, since all sizes are known beforehand, and then
pieces of at most PIECE_BYTES, one after another.

Source: safetensors format (8 bytes of header length, JSON header, data without holes).
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.checkpoint import Checkpoint, StoredTensor, VisionCheckpoint, Weight
from workers.model.config import ModelConfig
from workers.model.vision.config import VisionConfig
from workers.model.vision.shapes import vision_shapes

#: Read at once, in bytes of fp32. Dequantising takes a few times that.
PIECE_BYTES = 4 * 2**20
FLOAT_BYTES = 4
#: The data begins at a multiple of this in the file, so that the mapped rows suit vector loads.
DATA_ALIGNMENT = 64

#: Tensors of a layer in the output, and the weights whose rows they hold, one weight after another.
LAYER_OUTPUTS = {
    "attention_norm": (Weight.ATTENTION_NORM,),
    "qkv": (Weight.Q, Weight.K, Weight.V),
    "qkv_bias": (Weight.Q_BIAS, Weight.K_BIAS, Weight.V_BIAS),
    "q_norm": (Weight.Q_NORM,),
    "k_norm": (Weight.K_NORM,),
    "attention_out": (Weight.ATTENTION_OUT,),
    "attention_out_bias": (Weight.ATTENTION_OUT_BIAS,),
    "mlp_norm": (Weight.MLP_NORM,),
    "gate_up": (Weight.GATE, Weight.UP),
    "gate_up_bias": (Weight.GATE_BIAS, Weight.UP_BIAS),
    "down": (Weight.DOWN,),
    "down_bias": (Weight.DOWN_BIAS,),
}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: the rows of its parts, one part after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """In the output."""
        return math.prod(self.shape) * FLOAT_BYTES


def weight_shapes(config: ModelConfig) -> dict[Weight, tuple[int, ...]]:
    """The weights that a model of this configuration has, with their shapes."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    shapes: dict[Weight, tuple[int, ...]] = {
        Weight.EMBEDDING: (config.vocab_size, hidden),
        Weight.ATTENTION_NORM: (hidden,),
        Weight.Q: (query_size, hidden),
        Weight.K: (kv_size, hidden),
        Weight.V: (kv_size, hidden),
        Weight.ATTENTION_OUT: (hidden, query_size),
        Weight.MLP_NORM: (hidden,),
        Weight.GATE: (inner, hidden),
        Weight.UP: (inner, hidden),
        Weight.DOWN: (hidden, inner),
        Weight.NORM: (hidden,),
    }
    if config.has_qkv_bias:
        shapes |= {Weight.Q_BIAS: (query_size,), Weight.K_BIAS: (kv_size,), Weight.V_BIAS: (kv_size,)}
    if config.has_qk_norm:
        shapes |= {Weight.Q_NORM: (config.head_dim,), Weight.K_NORM: (config.head_dim,)}
    if config.has_attention_out_bias:
        shapes[Weight.ATTENTION_OUT_BIAS] = (hidden,)
    if config.has_mlp_bias:
        shapes |= {Weight.GATE_BIAS: (inner,), Weight.UP_BIAS: (inner,), Weight.DOWN_BIAS: (hidden,)}
    if not config.tie_embeddings:
        shapes[Weight.LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def output_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the output, by name."""
    shapes = weight_shapes(config)
    outputs = {"embedding": shapes[Weight.EMBEDDING], "norm": shapes[Weight.NORM]}
    if not config.tie_embeddings:
        outputs["lm_head"] = shapes[Weight.LM_HEAD]
    for name, weights in LAYER_OUTPUTS.items():
        if weights[0] in shapes:
            num_rows = sum(shapes[weight][0] for weight in weights)
            shape = (num_rows, *shapes[weights[0]][1:])
            outputs |= {f"layers.{i}.{name}": shape for i in range(config.num_layers)}
    return outputs


def plan_output(checkpoint: Checkpoint, config: ModelConfig) -> list[OutputTensor]:
    """What the output holds, in order.

    Raises CorruptModel for a tensor that is missing or of the wrong shape, and UnsupportedModel for one
    that the forward pass would ignore.
    """
    planner = _Planner(checkpoint, weight_shapes(config))
    outputs = [planner.output("embedding", (Weight.EMBEDDING,))]
    for i in range(config.num_layers):
        outputs += [
            planner.output(f"layers.{i}.{name}", weights, i)
            for name, weights in LAYER_OUTPUTS.items()
            if weights[0] in planner.shapes
        ]
    outputs.append(planner.output("norm", (Weight.NORM,)))
    if not config.tie_embeddings:
        outputs.append(planner.output("lm_head", (Weight.LM_HEAD,)))
    planner.check_all_used()
    return outputs


def plan_vision_output(checkpoint: VisionCheckpoint, config: VisionConfig) -> list[OutputTensor]:
    """What the output of a vision encoder holds, in order. Raises as `plan_output`."""
    unused = dict(checkpoint.tensors)
    outputs = []
    for name, shape in vision_shapes(config).items():
        stored = checkpoint.names[name]
        part_shape = (shape[0] // len(stored), *shape[1:])
        parts = tuple(_take(unused, part, part_shape, checkpoint.path) for part in stored)
        outputs.append(OutputTensor(name, shape, parts))
    _check_all_used(unused, (), checkpoint.path)
    return outputs


def write_safetensors(outputs: list[OutputTensor], path: Path, progress: Callable[[float], None]) -> str:
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
                for piece in _pieces(part):
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


def _pieces(part: StoredTensor) -> Iterator[memoryview]:
    """The part as fp32 bytes, a few rows at a time."""
    num_rows = part.shape[0]
    step = max(1, PIECE_BYTES // (math.prod(part.shape[1:]) * FLOAT_BYTES))
    for first in range(0, num_rows, step):
        values = part.read(first, min(first + step, num_rows))
        yield np.ascontiguousarray(values, dtype="<f4").data.cast("B")


class _Planner:
    """Takes tensors by weight and layer, and knows which are left."""

    def __init__(self, checkpoint: Checkpoint, shapes: dict[Weight, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._checkpoint = checkpoint
        self._unused = dict(checkpoint.tensors)

    def output(self, name: str, weights: tuple[Weight, ...], layer: int = 0) -> OutputTensor:
        """The weights stacked by rows."""
        parts = tuple(self._part(weight, layer) for weight in weights)
        num_rows = sum(part.shape[0] for part in parts)
        return OutputTensor(name, (num_rows, *parts[0].shape[1:]), parts)

    def _part(self, weight: Weight, layer: int) -> StoredTensor:
        name = self._checkpoint.names[weight].format(layer=layer)
        return _take(self._unused, name, self.shapes[weight], self._checkpoint.path)

    def check_all_used(self) -> None:
        """See _check_all_used."""
        _check_all_used(self._unused, self._checkpoint.ignored, self._checkpoint.path)


def _take(unused: dict[str, StoredTensor], name: str, shape: tuple[int, ...], path: str) -> StoredTensor:
    tensor = unused.pop(name, None)
    if tensor is None:
        raise CorruptModel(path, None, f"tensor {name!r} is missing")
    if tensor.shape != shape:
        problem = f"tensor {tensor.name!r} has shape {tensor.shape}; the configuration asks for {shape}"
        raise CorruptModel(path, None, problem)
    return tensor


def _check_all_used(unused: dict[str, StoredTensor], ignored: tuple[str, ...], path: str) -> None:
    """A tensor that nobody asked for would change the result, had we known what to do with it."""
    left = sorted(name for name in unused if not name.endswith(ignored))
    if left:
        feature = f"{len(left)} tensors such as {', '.join(left[:3])}"
        raise UnsupportedModel(path, feature, "the tensors that docs/models.md names")
