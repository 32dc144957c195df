"""What a conversion writes, tensor by tensor."""

import json
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.support.tiny_model import write_tiny_gguf
from workers.errors import CorruptModel, UnsupportedModel
from workers.model import convert
from workers.model.convert import OutputTensor, plan_output, write_safetensors
from workers.model.gguf_file import GgufFile, open_gguf
from workers.model.gguf_names import gguf_checkpoint, unpermuted_rows
from workers.model.metadata import read_config
from workers.model.source import file_sha256


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return open_gguf(write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tie_embeddings=False))


def stored(file: GgufFile, name: str) -> NDArray[np.float32]:
    tensor = file.tensors[f"{name}.weight"]
    values: NDArray[np.float32] = dequantize(file.rows(tensor), tensor.type)
    return values.reshape(tensor.shape)


def unpermuted(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The formula, on weights instead of row numbers."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def plan(file: GgufFile) -> list[OutputTensor]:
    config = read_config(file)
    return plan_output(gguf_checkpoint(file, config), config)


def write(file: GgufFile, path: Path) -> dict[str, torch.Tensor]:
    write_safetensors(plan(file), path, lambda _done: None)
    weights: dict[str, torch.Tensor] = load_file(path)
    return weights


def test_unpermuted_rows_undo_the_interleaving_of_gguf() -> None:
    num_heads, head_dim = 3, 8
    rows = np.arange(num_heads * head_dim)
    # As a converter to GGUF does it: [head, half, pair] becomes [head, pair, half].
    interleaved = rows.reshape(num_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert (interleaved[unpermuted_rows(num_heads, head_dim)] == rows).all()


@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**20], ids=["row by row", "few rows", "at once"])
def test_weights_are_the_dequantised_ones_fused(
    tiny: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", piece_bytes)
    weights = write(tiny, tmp_path / "w")
    expected = {"embedding": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for i in range(2):
        expected |= {
            f"layers.{i}.attention_norm": f"blk.{i}.attn_norm",
            f"layers.{i}.attention_out": f"blk.{i}.attn_output",
            f"layers.{i}.mlp_norm": f"blk.{i}.ffn_norm",
            f"layers.{i}.down": f"blk.{i}.ffn_down",
        }
        query, key, value = weights[f"layers.{i}.qkv"].split([64, 32, 32])
        assert (query.numpy() == unpermuted(stored(tiny, f"blk.{i}.attn_q"), 4)).all()
        assert (key.numpy() == unpermuted(stored(tiny, f"blk.{i}.attn_k"), 2)).all()
        assert (value.numpy() == stored(tiny, f"blk.{i}.attn_v")).all()
        gate, up = weights[f"layers.{i}.gate_up"].chunk(2)
        assert (gate.numpy() == stored(tiny, f"blk.{i}.ffn_gate")).all()
        assert (up.numpy() == stored(tiny, f"blk.{i}.ffn_up")).all()
    for ours, theirs in expected.items():
        assert (weights[ours].numpy() == stored(tiny, theirs)).all()
    assert len(weights) == len(expected) + 2 * 2


def test_digest_is_that_of_the_file_and_the_data_is_aligned(tiny: GgufFile, tmp_path: Path) -> None:
    path = tmp_path / "w"
    fractions: list[float] = []
    digest = write_safetensors(plan(tiny), path, fractions.append)
    assert digest == file_sha256(path)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    header_length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert (8 + header_length) % 64 == 0
    json.loads(path.read_bytes()[8 : 8 + header_length])


def test_memory_is_bounded_by_a_piece_not_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", 2**14)
    file = open_gguf(write_tiny_gguf(tmp_path / "a.gguf", num_layers=8, hidden=256, intermediate=512))
    outputs = plan(file)
    total_bytes = sum(output.num_bytes for output in outputs)
    write_safetensors(outputs, tmp_path / "warm", lambda _done: None)
    tracemalloc.start()
    write_safetensors(outputs, tmp_path / "w", lambda _done: None)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 2**14 < total_bytes / 20


def test_missing_tensor_is_named(tiny: GgufFile) -> None:
    tensors = {name: tensor for name, tensor in tiny.tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CorruptModel, match=r"'blk.1.ffn_up.weight' is missing"):
        plan(replace(tiny, tensors=tensors))


def test_tensor_that_would_be_ignored_is_refused(tiny: GgufFile) -> None:
    extra = replace(tiny.tensors["output_norm.weight"], name="blk.0.attn_sub_norm.weight")
    with pytest.raises(UnsupportedModel, match=r"1 tensors such as blk.0.attn_sub_norm.weight"):
        plan(replace(tiny, tensors={**tiny.tensors, extra.name: extra}))


def test_wrong_shape_is_named_with_the_right_one(tiny: GgufFile) -> None:
    wrong = replace(tiny.tensors["blk.0.ffn_up.weight"], shape=(64, 96))
    with pytest.raises(CorruptModel, match=r"has shape \(64, 96\); the configuration asks for \(96, 64\)"):
        plan(replace(tiny, tensors={**tiny.tensors, wrong.name: wrong}))
