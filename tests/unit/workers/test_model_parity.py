"""Every family with every kind of rope scaling computes what transformers computes from the same folder."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.generate import Session, greedy
from tests.support.hf_folder import VOCAB_SIZE, hf_model, write_hf_folder
from tests.support.hf_reference import hf_greedy, hf_logits
from workers.model.config import ModelConfig, RopeScaling
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare

#: fp32 sums of up to 128 products in another order; logits reach 20.
LOGIT_TOLERANCE = 1e-4
WINDOW = 24
#: Context of the unscaled model where rope is scaled.
ORIGINAL_CONTEXT = 32
#: Longer than the window and the original context, and how it is cut; no chunk ends with a block.
CHUNKINGS = ([53], [7, 30, 1, 15])
NUM_GENERATED = 24

WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
#: Per family the variants of its own; each is tried tied and untied, and with each kind of rope scaling.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "no bias": {},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    "mistral": {
        "window": {"sliding_window": WINDOW},
        "wide heads": {"sliding_window": None, "head_dim": 32},
    },
    "qwen2": {
        "all see all": {},
        "window from layer 2 on": {**WINDOWED, "max_window_layers": 2},
    },
    "qwen3": {
        "wide heads": {"head_dim": 32},
        "bias, window in layers 0 and 2": {
            **WINDOWED,
            "head_dim": 16,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    },
    "smollm3": {
        "every 4th layer not rotated": {},
        "biases, window": {
            **WINDOWED,
            "no_rope_layers": [0, 1, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
        },
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    },
}
#: Options of YaRN that change its numbers.
YARN_OPTIONS: dict[str, dict[str, Any]] = {
    "attention factor": {"attention_factor": 0.8},
    "mscale": {"mscale": 0.7, "mscale_all_dim": 1.3},
    "not truncated": {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads that wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def rope_options(rope: dict[str, Any]) -> dict[str, Any]:
    # Dynamic scaling knows no other original context than this.
    context = ORIGINAL_CONTEXT if rope["rope_type"] in ("dynamic", "linear") else 128
    return {"rope_parameters": {**rope, "rope_theta": 10000.0}, "max_position_embeddings": context}


def load(folder: Path) -> Llama:
    prepared = prepare(str(folder), lambda *_progress: None, folder.parent / "cache")
    return Llama(prepared.config, load_weights(prepared))


def prompt(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_tokens)
    token_ids: list[int] = torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
    return token_ids


def fed(model: Llama, token_ids: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
    session = Session(model, len(token_ids), prompt_len=len(token_ids))
    parts, start = [], 0
    for size in chunks:
        parts.append(session.feed(token_ids[start : start + size]))
        start += size
    assert start == len(token_ids)
    return torch.cat(parts)


def assert_parity(folder: Path) -> ModelConfig:
    """Logits of all positions, and the tokens after them."""
    model, reference = load(folder), hf_model(folder)
    token_ids = prompt(sum(CHUNKINGS[0]))
    # A copy: dynamic scaling remembers the longest sequence that it saw.
    expected = hf_logits(deepcopy(reference), token_ids)
    for chunks in CHUNKINGS:
        torch.testing.assert_close(fed(model, token_ids, chunks), expected, atol=LOGIT_TOLERANCE, rtol=0)
    generated = greedy(model, token_ids, NUM_GENERATED)
    assert generated == hf_greedy(reference, token_ids, NUM_GENERATED)
    # Or a comparison of tokens would mean little.
    assert len(set(generated)) > 4
    return model.config


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    ("family", "variant"), [pair for family in VARIANTS for pair in product([family], VARIANTS[family])]
)
def test_family_equals_transformers(
    tmp_path: Path, family: str, variant: str, rope: str, is_tied: bool
) -> None:
    options = {**VARIANTS[family][variant], **rope_options(ROPES[rope]), "tie_word_embeddings": is_tied}
    config = assert_parity(write_hf_folder(tmp_path / "model", family, **options))
    assert config.architecture == family
    assert config.tie_embeddings is is_tied
    assert config.rope.scaling.value == ("none" if rope == "plain" else rope)
    assert any(config.sliding_windows) is ("window" in variant)


@pytest.mark.parametrize("options", YARN_OPTIONS.values(), ids=YARN_OPTIONS)
def test_options_of_yarn_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    config = assert_parity(write_hf_folder(tmp_path / "model", "llama", **rope_options({**YARN, **options})))
    assert config.rope.scaling is RopeScaling.YARN


@pytest.mark.parametrize("rope", ROPES)
def test_older_spelling_of_the_rope_means_the_same(tmp_path: Path, rope: str) -> None:
    folder = write_hf_folder(tmp_path / "model", "llama", **rope_options(ROPES[rope]))
    config = load(folder).config
    values = json.loads((folder / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    values["rope_scaling"] = None if rope == "plain" else parameters
    (folder / "config.json").write_text(json.dumps(values))
    assert assert_parity(folder) == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_in_several_files_equal_transformers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = write_hf_folder(tmp_path / "model", "qwen2", dtype=dtype, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_parity(folder)


def test_dynamic_scaling_does_not_depend_on_how_a_prompt_is_cut(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "model", "llama", **rope_options(ROPES["dynamic"]))
    model = load(folder)
    token_ids = prompt(80)
    session = Session(model, 96, prompt_len=80)
    session.feed(token_ids[:20])
    whole = Session(model, 96, prompt_len=80)
    whole.feed(token_ids)
    # The first tokens were computed before the rest was seen, and yet for the length of the whole prompt.
    blocks = session.block_table[:1], whole.block_table[:1]
    torch.testing.assert_close(
        session.kv_cache[:, :, blocks[0]], whole.kv_cache[:, :, blocks[1]], atol=1e-5, rtol=0
    )
