"""Folders of models that take pictures: what is read from where, by whom, and everything that can be wrong with that."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.support.hf_folder import CHAT_TEMPLATE, VOCAB_SIZE, write_hf_folder
from tests.support.tiny_model import write_tiny_gguf
from tests.support.tiny_vision_models import (
    AROUND,
    GLOBAL,
    IMAGE,
    IMAGE_TOKEN_ID,
    LAYOUTS,
    change_json,
    their_tiles,
    write_vision_folder,
    write_vision_only,
)
from workers.errors import CorruptModel, ModelUnavailable, UnsupportedModel
from workers.model.config import ModelConfig
from workers.model.hf_folder import JsonValues
from workers.model.hf_idefics3 import text_values
from workers.model.llama import Llama
from workers.model.prepare import WEIGHTS, Part, PreparedModel, load_weights, prepare
from workers.model.vision.config import Idefics3Vision
from workers.model.vision.idefics3 import Idefics3Encoder

LAYOUT = LAYOUTS["tiles"]
#: A token of the tokenizer of `write_tokenizer` that no text has, as an image token of its own would be.
TAKEN_TOKEN_ID, TAKEN_TOKEN = 0, "<|endoftext|>"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "model"
    write_vision_folder(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(scope="module")
def text_and_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `text` with a text model, and `model` with an encoder that names it."""
    root = tmp_path_factory.mktemp("apart")
    write_hf_folder(root / "text", "llama", num_hidden_layers=1)
    write_vision_only(root / "model", "../text", TAKEN_TOKEN_ID, LAYOUT, 64)
    return root


@pytest.fixture
def apart(text_and_vision: Path, tmp_path: Path) -> Path:
    """A copy of `model` with `text` beside it."""
    shutil.copytree(text_and_vision, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


def opened(folder: Path) -> PreparedModel:
    return prepare(str(folder), lambda *_progress: None, folder.parent / "cache")


def vision_of(prepared: PreparedModel) -> Idefics3Vision:
    assert isinstance(prepared.config.vision, Idefics3Vision)
    return prepared.config.vision


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_image_processor(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    change_json(folder / "processor_config.json", image_processor=values | changes)


def test_configuration_comes_from_all_files(folder: Path) -> None:
    prepared = opened(folder)
    vision = vision_of(prepared)
    assert prepared.config.architecture == "idefics3"
    assert (vision.hidden_size, vision.num_layers, vision.text_hidden_size) == (48, 2, 64)
    assert (vision.tile_size, vision.longest_edge, vision.is_tiled, vision.resample) == (24, 60, True, 1)
    assert (vision.image_token, vision.image_token_id) == (IMAGE, IMAGE_TOKEN_ID)
    assert (vision.around_text, vision.global_text) == (AROUND, GLOBAL)
    assert ModelConfig.from_json(prepared.config.to_json()) == prepared.config
    assert opened(folder) == prepared


def test_each_phase_reads_its_own_weights_and_opens_no_other_file(folder: Path) -> None:
    prepared = opened(folder)
    both = load_weights(prepared)
    text = load_weights(prepared, {Part.TEXT})
    Llama(prepared.config, text)
    (prepared.folder / WEIGHTS).unlink()
    vision = load_weights(prepared, {Part.VISION})
    Idefics3Encoder(vision_of(prepared), vision)
    assert text.keys() | vision.keys() == both.keys()
    assert not text.keys() & vision.keys()
    assert all(name.startswith("vision.") for name in vision)
    assert all(torch.equal(tensor, both[name]) for name, tensor in (text | vision).items())


def test_a_damaged_vision_file_is_converted_again(folder: Path) -> None:
    prepared = opened(folder)
    path = prepared.folder / "vision.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    assert opened(folder) == prepared
    assert path.read_bytes() == content


def test_a_model_without_pictures_has_no_such_part(text_and_vision: Path) -> None:
    prepared = opened(text_and_vision / "text")
    assert prepared.config.vision is None
    assert load_weights(prepared, {Part.VISION}) == {}
    assert load_weights(prepared).keys() == load_weights(prepared, {Part.TEXT}).keys()


def test_names_of_a_base_model_and_bfloat16_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    theirs = write_vision_folder(folder, dtype=torch.bfloat16, tied=True)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    change_weights(folder, rename)
    weights = load_weights(opened(folder))
    projection = theirs.model.connector.modality_projection.proj.weight
    assert torch.equal(weights["vision.projection"], projection)
    assert torch.equal(weights["embedding"], theirs.model.text_model.embed_tokens.weight)
    attention = theirs.model.vision_model.encoder.layers[1].self_attn
    parts = [attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias]
    assert torch.equal(weights["vision.layers.1.qkv_bias"], torch.cat(parts))


def test_digest_follows_the_image_processor(folder: Path) -> None:
    digest = opened(folder).digest
    change_image_processor(folder, image_mean=[0.4, 0.5, 0.5])
    assert opened(folder).digest != digest


def test_texts_around_pictures_come_from_the_tokenizer(folder: Path) -> None:
    change_json(
        folder / "tokenizer_config.json",
        fake_image_token={"content": "<around>"},
        extra_special_tokens={"global_image_token": ""},
    )
    vision = vision_of(opened(folder))
    assert (vision.around_text, vision.global_text) == ("<around>", "")


def test_keys_that_text_config_leaves_out_are_those_of_transformers() -> None:
    told = {"model_type": "llama", "vocab_size": 9, "rope_theta": 5e5, "hidden_size": None}
    values = text_values(JsonValues("c", {"text_config": told, "eos_token_id": 7}))
    assert values.positive("hidden_size") == 4096
    assert values.positive("num_hidden_layers") == 32
    assert values.positive("vocab_size") == 9
    assert values.get("eos_token_id") == 7
    assert values.get("tie_word_embeddings") is False


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        (
            {"image_token_id": VOCAB_SIZE + 50},
            CorruptModel,
            "434, which is not in the tokenizer's vocabulary",
        ),
        ({"image_token_id": 2**40}, CorruptModel, "not in the tokenizer's vocabulary"),
        ({"vision_config": None}, CorruptModel, "lacks 'vision_config'"),
        ({"text_config": None}, CorruptModel, "lacks 'text_config'"),
        ({"scale_factor": 4}, CorruptModel, "'image_seq_len' is 9; a tile has 1 embeddings"),
        ({"scale_factor": 0}, CorruptModel, "'scale_factor' is '0'"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantization_config"),
        ({"vision_config": {"hidden_act": "gelu"}}, UnsupportedModel, "hidden_act = gelu"),
        ({"vision_config": {"num_channels": 1}}, UnsupportedModel, "1 channels"),
        ({"vision_config": {"num_attention_heads": 5}}, CorruptModel, "48 in 5 heads"),
        ({"vision_config": {"hidden_size": 64}}, CorruptModel, r"shape \(48, 3, 4, 4\); .* \(64, 3, 4, 4\)"),
        ({"vision_config": {"image_size": 28}}, CorruptModel, r"shape \(36, 48\); .* \(49, 48\)"),
        (
            {"vision_config": {"num_hidden_layers": 3}},
            CorruptModel,
            "layers.2.layer_norm1.weight' is missing",
        ),
        ({"vision_config": {"num_hidden_layers": 1}}, UnsupportedModel, "16 tensors such as vision_model"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, CorruptModel, "1000000000 layers of its vision"),
        ({"text_config": {"model_type": "gemma"}}, UnsupportedModel, "type 'gemma'"),
    ],
)
def test_config_that_makes_no_sense_is_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], problem: str
) -> None:
    old = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        merge = isinstance(value, dict) and key in old
        change_json(folder / "config.json", **{key: old[key] | value if merge else value})
    with pytest.raises(error, match=problem):
        opened(folder)


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"do_rescale": False}, UnsupportedModel, "do_rescale = false"),
        ({"size": {"height": 9, "width": 9}}, UnsupportedModel, "a size with longest_edge"),
        ({"max_image_size": {"longest_edge": 20}}, CorruptModel, "'image_seq_len' is 9; a tile has 4"),
        ({"image_mean": [0.5, "x", 0.5]}, CorruptModel, "'image_mean'"),
        ({"image_mean": [0.5]}, CorruptModel, "three numbers"),
        ({"resample": 9}, CorruptModel, "filter 9"),
        ({"do_image_splitting": "yes"}, CorruptModel, "'do_image_splitting'"),
    ],
)
def test_image_processor_that_makes_no_sense_is_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], problem: str
) -> None:
    change_image_processor(folder, **changes)
    with pytest.raises(error, match=problem):
        opened(folder)


def test_a_folder_without_an_image_processor_is_incomplete(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    with pytest.raises(
        ModelUnavailable, match=r"neither processor_config\.json nor preprocessor_config\.json"
    ):
        opened(folder)


def test_an_image_token_that_is_read_as_text_is_refused(folder: Path) -> None:
    token_id = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("Ġ")
    change_json(folder / "config.json", image_token_id=token_id)
    with pytest.raises(CorruptModel, match="does not read as that token"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (
            lambda weights: weights.update({"model.connector.modality_projection.proj.weight": torch.ones(32, 192)}),
            CorruptModel, r"'model.connector.modality_projection.proj.weight' has shape \(32, 192\); .* \(64, 192\)",
        ),
        (
            lambda weights: weights.pop("model.vision_model.post_layernorm.bias"),
            CorruptModel, "'vision_model.post_layernorm.bias' is missing",
        ),
        (
            lambda weights: weights.update({"model.vision_model.head.weight": torch.ones(2)}),
            UnsupportedModel, "1 tensors such as vision_model.head.weight",
        ),
        (
            lambda weights: weights.update({"text_model.norm.weight": torch.ones(64)}),
            CorruptModel, "'.*norm.weight' and '.*norm.weight' are the same weight",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[Any], None], error: type[Exception], problem: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(error, match=problem):
        opened(folder)


def test_text_may_come_from_another_model(apart: Path) -> None:
    text, prepared = opened(apart.parent / "text"), opened(apart)
    assert prepared.tokenizer_json == text.tokenizer_json
    assert prepared.chat_template == text.chat_template == CHAT_TEMPLATE
    assert prepared.config.architecture == "idefics3"
    assert prepared.config.num_layers == text.config.num_layers == 1
    assert vision_of(prepared).image_token == TAKEN_TOKEN
    ours, theirs = load_weights(prepared, {Part.TEXT}), load_weights(text)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stored = load_file(apart / "model.safetensors")
    assert stored["model.vision_model.post_layernorm.weight"].dtype is torch.float16
    vision = load_weights(prepared, {Part.VISION})
    assert torch.equal(vision["vision.norm"], stored["model.vision_model.post_layernorm.weight"].float())


def test_text_may_come_from_a_gguf_file(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    text = prepare(str(tmp_path / "tiny.gguf"), lambda *_progress: None, tmp_path / "cache")
    write_vision_only(tmp_path / "model", "../tiny.gguf", 0, LAYOUT, text.config.hidden_size)
    tokenizer = Tokenizer.from_buffer(text.tokenizer_json)
    token_id = text.config.eos_token_ids[0]
    change_json(tmp_path / "model" / "config.json", image_token_id=token_id)
    vision = vision_of(opened(tmp_path / "model"))
    assert vision.image_token == tokenizer.id_to_token(token_id)
    assert vision.text_hidden_size == text.config.hidden_size


def test_a_chat_template_of_its_own_counts_more(apart: Path) -> None:
    (apart / "chat_template.jinja").write_text("{{ messages }}")
    assert opened(apart).chat_template == "{{ messages }}"


def test_digest_covers_the_text_model(apart: Path) -> None:
    digests = [opened(apart).digest]
    change_json(apart.parent / "text" / "config.json", rms_norm_eps=1e-5)
    digests.append(opened(apart).digest)
    change_json(apart / "processor_config.json", comment="x")
    digests.append(opened(apart).digest)
    assert len(set(digests)) == 3


def test_text_source_that_makes_no_sense_is_refused(apart: Path) -> None:
    config, text = apart / "config.json", apart.parent / "text" / "config.json"
    for value, error, problem in (
        (3, CorruptModel, "'phasewise_text_source' is '3'"),
        ("../nowhere", ModelUnavailable, "no such file"),
        ("package:no-such-package", ModelUnavailable, "not installed"),
        (".", UnsupportedModel, "phasewise_text_source of a model that has one itself"),
    ):
        change_json(config, phasewise_text_source=value)
        with pytest.raises(error, match=problem):
            opened(apart)
    change_json(config, phasewise_text_source="../text", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModel, match="a model of another architecture"):
        opened(apart)
    change_json(config, architectures=["Idefics3ForConditionalGeneration"])
    change_json(text, hidden_size=32)
    with pytest.raises(CorruptModel, match="damaged"):
        opened(apart)


def test_text_weights_beside_a_text_source_are_refused(apart: Path) -> None:
    change_weights(apart, lambda weights: weights.update({"lm_head.weight": torch.ones(4, 64)}))
    with pytest.raises(UnsupportedModel, match=r"phasewise_text_source beside text weights such as lm_head"):
        opened(apart)


def test_an_encoder_apart_embeds_as_one_that_came_with_its_text(apart: Path) -> None:
    prepared = opened(apart)
    vision = vision_of(prepared)
    encoder = Idefics3Encoder(vision, load_weights(prepared, {Part.VISION}))
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    plan = vision.plan(50, 30)
    pixels = encoder.prepare(image, plan, range(len(plan.tiles)))
    assert torch.equal(torch.stack(pixels), their_tiles(LAYOUT, image)[0].float())
    embeddings = encoder.encode(pixels)
    assert [one.shape for one in embeddings] == [(9, 64)] * len(plan.tiles)
    assert all(bool(one.isfinite().all()) for one in embeddings)
