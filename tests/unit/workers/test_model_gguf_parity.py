"""Models of every family, written as llama.cpp's converter writes them, against transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.support.generate import Session, greedy
from tests.support.gguf_export import export_gguf, randomise
from tests.support.hf_reference import hf_greedy, hf_logits
from workers.model.config import ModelConfig, RopeScaling
from workers.model.gguf_file import open_gguf
from workers.model.llama import Llama
from workers.model.metadata import read_config
from workers.model.prepare import load_weights, prepare

NUM_LAYERS = 5
#: Longer than the sliding window and than the context of the unscaled models.
PROMPT_TOKENS = 70
CHUNKS = (1, 30, 16, 22, 1)
SHAPE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, own LM head": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": (LlamaConfig, {"head_dim": 32}),
    "llama, linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "llama, yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama, yarn of its own": (
        LlamaConfig,
        {"rope_parameters": {**YARN, "attention_factor": 1.2, "beta_fast": 16.0}},
    ),
    "llama, llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral, window": (MistralConfig, {"sliding_window": 24, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, yarn, own LM head": (Qwen2Config, {"rope_parameters": YARN, "tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "smollm3": (SmolLM3Config, {}),
}


def reference(case: str, *, as_half: bool = False) -> PreTrainedModel:
    make_config, options = CASES[case]
    model = AutoModelForCausalLM.from_config(make_config(**{**SHAPE, **options})).eval()
    randomise(model, as_half=as_half)
    return model


def prompt(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    token_ids: list[int] = torch.randint(3, 384, (num_tokens,), generator=generator).tolist()
    return token_ids


def load(path: Path, model: PreTrainedModel, tensor_type: GGMLQuantizationType) -> Llama:
    source = str(export_gguf(path / "model.gguf", model, tensor_type))
    prepared = prepare(source, lambda *_progress: None, path / "cache")
    return Llama(prepared.config, load_weights(prepared))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = reference(case)
    ours = load(tmp_path, theirs, GGMLQuantizationType.F32)
    token_ids = prompt(PROMPT_TOKENS)
    expected = hf_logits(theirs, token_ids)
    session = Session(ours, PROMPT_TOKENS)
    chunked = [session.feed(chunk.tolist()) for chunk in torch.tensor(token_ids).split(CHUNKS)]
    torch.testing.assert_close(torch.cat(chunked), expected, atol=1e-4, rtol=0)
    assert greedy(ours, token_ids, 24) == hf_greedy(theirs, token_ids, 24)


@pytest.mark.parametrize("tensor_type", [GGMLQuantizationType.F16, GGMLQuantizationType.F32])
@pytest.mark.parametrize("case", ["llama, biases", "qwen2", "qwen3", "smollm3"])
def test_converted_weights_are_those_of_transformers(
    tmp_path: Path, case: str, tensor_type: GGMLQuantizationType
) -> None:
    theirs = reference(case, as_half=True)
    source = str(export_gguf(tmp_path / "model.gguf", theirs, tensor_type))
    prepared = prepare(source, lambda *_progress: None, tmp_path / "cache")
    ours = load_file(prepared.folder / "model.safetensors")
    layer = theirs.model.layers[NUM_LAYERS - 1]
    attention, name = layer.self_attn, f"layers.{NUM_LAYERS - 1}"
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(ours["embedding"], theirs.model.embed_tokens.weight)
    assert torch.equal(ours[f"{name}.qkv"], torch.cat([part.weight for part in projections]))
    assert torch.equal(ours[f"{name}.attention_out"], attention.o_proj.weight)
    assert torch.equal(ours[f"{name}.down"], layer.mlp.down_proj.weight)
    assert (f"{name}.qkv_bias" in ours) == prepared.config.has_qkv_bias == (projections[0].bias is not None)
    if prepared.config.has_qkv_bias:
        assert torch.equal(ours[f"{name}.qkv_bias"], torch.cat([part.bias for part in projections]))


def config_of(tmp_path: Path, case: str) -> ModelConfig:
    return read_config(open_gguf(export_gguf(tmp_path / "model.gguf", reference(case))))


def test_scaling_of_yarn_without_a_factor_for_attention_has_that_of_the_paper(tmp_path: Path) -> None:
    rope = config_of(tmp_path, "llama, yarn").rope
    assert (rope.scaling, rope.factor, rope.original_context_tokens) == (RopeScaling.YARN, 4.0, 32)
    assert rope.attention_factor == pytest.approx(1.138629, abs=1e-6)


def test_scaling_of_llama3_is_a_factor_for_each_frequency(tmp_path: Path) -> None:
    rope = config_of(tmp_path, "llama, llama3").rope
    assert rope.scaling is RopeScaling.NONE
    assert len(rope.frequency_factors) == 8
    assert rope.frequency_factors[0] == 1.0
    assert rope.frequency_factors[-1] == 8.0


def test_configuration_says_what_the_family_has(tmp_path: Path) -> None:
    qwen2, qwen3, smollm3, mistral = (
        config_of(tmp_path, case) for case in ("qwen2", "qwen3", "smollm3", "mistral, window")
    )
    assert (qwen2.has_qkv_bias, qwen2.has_attention_out_bias, qwen2.has_qk_norm) == (True, False, False)
    assert (qwen3.has_qkv_bias, qwen3.has_qk_norm, qwen3.head_dim) == (False, True, 32)
    assert (smollm3.nope_layers, qwen3.nope_layers) == (frozenset({3}), frozenset())
    assert (mistral.sliding_windows, smollm3.sliding_windows) == ((24,) * NUM_LAYERS, ())
