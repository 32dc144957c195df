"""The configuration as JSON, and what it says about the KV cache."""

from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.layout import KvLayout, incompatibility
from workers.model.config import ModelConfig, RopeConfig, RopeScaling

CONFIG = ModelConfig(
    architecture="llama",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=RopeConfig(theta=100000.0),
    rms_norm_eps=9.999999747378752e-06,
    max_context_tokens=512,
    vocab_size=384,
    tie_embeddings=True,
    eos_token_ids=(2, 0),
    bos_token="<|im_start|>",
    eos_token="<|ende|> é",
)


YARN = RopeConfig(10000.0, RopeScaling.YARN, 4.0, 4096, attention_factor=1.1386294361119891, truncate=False)
FULL = replace(
    CONFIG,
    rope=YARN,
    has_qkv_bias=True,
    has_attention_out_bias=True,
    has_mlp_bias=True,
    has_qk_norm=True,
    sliding_windows=(0, 24),
    nope_layers=frozenset({1}),
)


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["plain", "everything"])
def test_json_round_trip_is_exact(config: ModelConfig) -> None:
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert again.rope.scaling is config.rope.scaling
    hash(again)
    again.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, "4 heads of 16 over 3 KV heads"),
        ({"head_dim": 15}, "4 heads of 15"),
        ({"max_context_tokens": 2**31}, "context of 2147483648 tokens"),
        ({"sliding_windows": (4,)}, "1 sliding windows for 2 layers"),
        ({"sliding_windows": (4, -1)}, "sliding window of -1"),
        ({"nope_layers": frozenset({2})}, r"layers \[2\] without rotation of 2"),
        ({"eos_token_ids": (384,)}, "vocabulary of 384"),
        ({"rope": RopeConfig(theta=0.0)}, "theta 0"),
        ({"rope": RopeConfig(1e4, RopeScaling.DYNAMIC, 2.0)}, "dynamic without the context"),
        ({"rope": RopeConfig(1e4, RopeScaling.LLAMA3, 2.0, 64, high_freq_factor=1.0)}, "frequency factors"),
        ({"rope": RopeConfig(1e4, RopeScaling.YARN, 2.0, 64, beta_slow=64.0)}, "beta_slow 64"),
    ],
)
def test_shape_that_no_model_can_have_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change).validate()


def test_layers_without_a_window_see_everything() -> None:
    assert [CONFIG.window(0), FULL.window(0), FULL.window(1)] == [0, 0, 24]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"architecture": "llama"}', CONFIG.to_json().replace("theta", "base")]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ModelConfig.from_json(text)


def test_kv_layout_names_all_that_must_agree() -> None:
    layout = CONFIG.kv_layout(block_size=16, dtype="float32", model_digest="d", weight_dtype="int8")
    assert layout == KvLayout("d", "float32", 16, 2, 2, 16, "rope:theta=100000", weight_dtype="int8")
    assert layout.block_bytes == 2 * 2 * 16 * 2 * 16 * 4
    other = CONFIG.kv_layout(block_size=16, dtype="float32", model_digest="e", weight_dtype="fp8")
    assert incompatibility(layout, other) == "model_digest is 'd' at the sender and 'e' at the receiver"


def test_kv_of_another_rotation_is_refused() -> None:
    def encoding(config: ModelConfig) -> str:
        return config.kv_layout(
            block_size=16, dtype="float32", model_digest="d", weight_dtype="int8"
        ).position_encoding

    assert encoding(FULL) == (
        "rope:theta=10000,scaling=yarn,factor=4,original_context_tokens=4096,"
        "attention_factor=1.1386294361119891,truncate=False;nope=1"
    )
    others = [
        CONFIG,
        replace(FULL, nope_layers=frozenset({0})),
        replace(FULL, rope=replace(YARN, beta_fast=31.0)),
        replace(FULL, rope=replace(YARN, factor=4.000000000000001)),
    ]
    assert len({encoding(config) for config in [FULL, *others]}) == 5
