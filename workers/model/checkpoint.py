"""A model as a source stores it, in words that are the same for every source.

A source (a GGUF file, a Hugging Face folder) says under which name it keeps each `Weight` and how rows of it
are read; `workers.model.convert` writes them as the forward pass reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from workers.model.config import ModelConfig


class Weight(StrEnum):
    """Everything that a model may have; a matrix is [outputs, inputs]. All but the first and the last two are per layer."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "attention_norm"
    Q = "q"
    K = "k"
    V = "v"
    Q_BIAS = "q_bias"
    K_BIAS = "k_bias"
    V_BIAS = "v_bias"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    ATTENTION_OUT = "attention_out"
    ATTENTION_OUT_BIAS = "attention_out_bias"
    MLP_NORM = "mlp_norm"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_BIAS = "gate_bias"
    UP_BIAS = "up_bias"
    DOWN_BIAS = "down_bias"
    NORM = "norm"
    LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is read a few rows at a time."""

    name: str
    #: Rows and, for a matrix, columns; a kernel over patches of pictures has more.
    shape: tuple[int, ...]
    #: read(first, end): rows first..end-1, [end - first, *shape[1:]] fp32, in the order of the forward pass:
    #: each head of Q and K has its first rotary half, then its second.
    read: Callable[[int, int], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a model."""

    #: Of the file or folder, for messages.
    path: str
    #: By stored name.
    tensors: Mapping[str, StoredTensor]
    #: Stored name of each weight; "{layer}" stands for the number of the layer.
    names: Mapping[Weight, str]
    #: Ends of stored names that the forward pass does without.
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VisionCheckpoint:
    """The weights of a vision encoder."""

    #: Of the folder, for messages.
    path: str
    #: By the names in `names`; the stored ones may begin otherwise.
    tensors: Mapping[str, StoredTensor]
    #: By name in the converted file, the tensors whose rows it holds, one after another.
    names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """All that is read from a source."""

    config: ModelConfig
    checkpoint: Checkpoint
    #: Of the `tokenizers` library, UTF-8.
    tokenizer_json: bytes
    #: Jinja; empty when the model has none.
    chat_template: str
    #: None: the model takes no pictures.
    vision: VisionCheckpoint | None = None
