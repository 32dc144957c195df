"""From GGUF metadata to a configuration: what is read, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_gguf
from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import RopeConfig, RopeScaling
from workers.model.gguf_file import GgufFile, MetadataValue, TensorInfo, open_gguf
from workers.model.metadata import FAMILIES, ROPE_FACTORS, read_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return open_gguf(write_tiny_gguf(tmp_path_factory.mktemp("metadata") / "tiny.gguf"))


def changed(tiny: GgufFile, values: dict[str, MetadataValue]) -> GgufFile:
    return replace(tiny, metadata={**tiny.metadata, **values})


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", architecture="mamba")
    with pytest.raises(
        UnsupportedModel, match=r"architecture 'mamba', .* supported: 'llama', 'qwen2', 'qwen3', 'smollm3'"
    ):
        read_config(open_gguf(path))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("llama.rope.scaling.type", "longrope", UnsupportedModel),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, UnsupportedModel),
        ("llama.rope.scaling.attn_factor", 1.19, UnsupportedModel),
        ("llama.rope.freq_base_swa", 10000.0, UnsupportedModel),
        ("llama.attention.scale", 0.015, UnsupportedModel),
        ("llama.attention.temperature_scale", 0.1, UnsupportedModel),
        ("llama.attention.value_length", 8, UnsupportedModel),
        ("llama.attn_logit_softcapping", 50.0, UnsupportedModel),
        ("llama.logit_scale", 0.25, UnsupportedModel),
        ("llama.residual_scale", 0.22, UnsupportedModel),
        ("llama.rope.scaling.type", "linear", CorruptModel),
        ("llama.rope.scaling.type", "yarn", CorruptModel),
        ("llama.expert_count", 8, UnsupportedModel),
        ("llama.rope.dimension_count", 8, UnsupportedModel),
        ("split.count", 3, UnsupportedModel),
        ("llama.block_count", 0, CorruptModel),
        ("llama.block_count", "two", CorruptModel),
        ("llama.block_count", 2**31, CorruptModel),
        ("llama.attention.head_count_kv", 3, CorruptModel),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), CorruptModel),
        ("tokenizer.ggml.eos_token_id", 384, CorruptModel),
        ("tokenizer.ggml.bos_token_id", 384, CorruptModel),
        ("tokenizer.ggml.eot_token_id", 384, CorruptModel),
        ("tokenizer.ggml.tokens", [1, 2], CorruptModel),
    ],
)
def test_metadata_that_we_cannot_follow_are_refused(
    tiny: GgufFile, key: str, value: str | float, error: type[Exception]
) -> None:
    changed = replace(tiny, metadata={**tiny.metadata, key: value})
    with pytest.raises(error):
        read_config(changed)


@pytest.mark.parametrize("key", ["llama.block_count", "general.architecture", "tokenizer.ggml.tokens"])
def test_missing_metadata_are_named(tiny: GgufFile, key: str) -> None:
    changed = replace(tiny, metadata={k: v for k, v in tiny.metadata.items() if k != key})
    with pytest.raises(CorruptModel, match=key):
        read_config(changed)


def test_harmless_variants_are_accepted(tiny: GgufFile) -> None:
    harmless: dict[str, MetadataValue] = {
        "llama.rope.scaling.type": "none",
        "llama.attention.sliding_window": 0,
        "llama.logit_scale": 1.0,
        "llama.expert_count": 0,
    }
    assert read_config(changed(tiny, harmless)) == read_config(tiny)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_are_read_under_the_name_of_the_architecture(tmp_path: Path, architecture: str) -> None:
    config = read_config(open_gguf(write_tiny_gguf(tmp_path / "a.gguf", architecture=architecture)))
    assert (config.architecture, config.hidden_size, config.num_kv_heads) == (architecture, 64, 2)


def test_every_fourth_layer_of_smollm3_is_not_rotated(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", architecture="smollm3", num_layers=9)
    assert read_config(open_gguf(path)).nope_layers == {3, 7}


def test_a_window_holds_for_all_layers_or_for_those_of_the_pattern(tiny: GgufFile) -> None:
    window: dict[str, MetadataValue] = {"llama.attention.sliding_window": 128}
    pattern: dict[str, MetadataValue] = {"llama.attention.sliding_window_pattern": [True, False]}
    assert read_config(tiny).sliding_windows == ()
    assert read_config(changed(tiny, window)).sliding_windows == (128, 128)
    assert read_config(changed(tiny, window | pattern)).sliding_windows == (128, 0)
    for unusable in ([True], 2):
        key = "llama.attention.sliding_window_pattern"
        with pytest.raises(CorruptModel):
            read_config(changed(tiny, {**window, key: unusable}))


def test_further_end_tokens_end_an_answer_too(tiny: GgufFile) -> None:
    more: dict[str, MetadataValue] = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    config = read_config(changed(tiny, more))
    assert (config.eos_token_ids, config.eos_token) == ((2, 7), "<|im_end|>")


def test_model_without_a_bos_token_has_an_empty_one(tiny: GgufFile) -> None:
    metadata = {key: value for key, value in tiny.metadata.items() if "bos_token_id" not in key}
    assert read_config(replace(tiny, metadata=metadata)).bos_token == ""


def test_rotation_is_scaled_as_the_metadata_say(tiny: GgufFile) -> None:
    linear: dict[str, MetadataValue] = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    yarn: dict[str, MetadataValue] = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.yarn_attn_factor": 1.5,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
    }
    assert read_config(changed(tiny, linear)).rope == RopeConfig(10000.0, RopeScaling.LINEAR, 4.0)
    assert read_config(changed(tiny, yarn)).rope == RopeConfig(
        theta=10000.0,
        scaling=RopeScaling.YARN,
        factor=4.0,
        original_context_tokens=128,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
    )


def with_rope_factors(tiny: GgufFile, shape: tuple[int, ...]) -> GgufFile:
    """The first numbers of a norm, close to 1, as if they were factors of the frequencies."""
    norm = tiny.tensors["output_norm.weight"]
    factors = TensorInfo(ROPE_FACTORS, shape, norm.type, norm.offset, 4 * shape[0])
    return replace(tiny, tensors={**tiny.tensors, ROPE_FACTORS: factors})


def test_factors_of_the_frequencies_are_read(tiny: GgufFile) -> None:
    rope = read_config(with_rope_factors(tiny, (8,))).rope
    assert rope.scaling is RopeScaling.NONE
    assert len(rope.frequency_factors) == 8
    assert all(0.5 < factor < 1.5 for factor in rope.frequency_factors)


def test_factors_that_do_not_fit_the_heads_or_the_scaling_are_refused(tiny: GgufFile) -> None:
    with pytest.raises(CorruptModel, match=ROPE_FACTORS):
        read_config(with_rope_factors(tiny, (4,)))
    linear: dict[str, MetadataValue] = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    with pytest.raises(UnsupportedModel, match=ROPE_FACTORS):
        read_config(changed(with_rope_factors(tiny, (8,)), linear))
