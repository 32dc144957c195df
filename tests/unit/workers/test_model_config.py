"""The configuration as JSON, and what it says about the KV cache."""

import pytest

from kvtransfer.layout import KvLayout, incompatibility
from workers.model.config import ModelConfig

CONFIG = ModelConfig(
    architecture="llama",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=100000.0,
    rms_norm_eps=9.999999747378752e-06,
    max_context_tokens=512,
    vocab_size=384,
    tie_embeddings=True,
    eos_token_ids=(2, 0),
    bos_token="<|im_start|>",
    eos_token="<|ende|> é",
)


def test_json_round_trip_is_exact() -> None:
    assert ModelConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"architecture": "llama"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ModelConfig.from_json(text)


def test_kv_layout_names_all_that_must_agree() -> None:
    layout = CONFIG.kv_layout(block_size=16, dtype="float32", model_digest="d")
    assert layout == KvLayout("d", "float32", 16, 2, 2, 16, "rope:theta=100000")
    assert layout.block_bytes == 2 * 2 * 16 * 2 * 16 * 4
    other = CONFIG.kv_layout(block_size=16, dtype="float32", model_digest="e")
    assert incompatibility(layout, other) == "model_digest is 'd' at the sender and 'e' at the receiver"
