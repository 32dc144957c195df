"""What is read from a Hugging Face folder beside the weights, and everything that is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.support.hf_folder import CHAT_TEMPLATE, write_hf_folder
from workers.errors import CorruptModel, ModelUnavailable, UnsupportedModel
from workers.model.config import ModelConfig
from workers.model.prepare import PreparedModel, load_weights, prepare


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def opened(folder: Path) -> PreparedModel:
    return prepare(str(folder), lambda *_progress: None, folder.parent / "cache")


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


def config_of(folder: Path) -> ModelConfig:
    return opened(folder).config


def test_all_that_a_worker_needs_comes_from_the_folder(llama: Path, folder: Path) -> None:
    prepared = opened(folder)
    assert prepared.chat_template == CHAT_TEMPLATE
    assert prepared.tokenizer_json == (llama / "tokenizer.json").read_bytes()
    assert (prepared.config.bos_token, prepared.config.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert prepared.config.eos_token_ids == (2,)
    stored = load_file(folder / "model.safetensors")
    query, key, value = (stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(load_weights(prepared)["layers.1.qkv"], torch.cat((query, key, value)))


def test_digest_follows_every_file_that_matters_and_no_other(folder: Path) -> None:
    digests = [opened(folder).digest]
    (folder / "README.md").write_text("Read me.")
    assert opened(folder).digest == digests[0]
    change(folder, "generation_config.json", eos_token_id=[0, 2])
    digests.append(opened(folder).digest)
    (folder / "chat_template.jinja").write_text("other")
    digests.append(opened(folder).digest)
    change(folder, rms_norm_eps=1e-5)
    digests.append(opened(folder).digest)
    assert len(set(digests)) == 4


def test_end_tokens_of_generation_come_before_those_of_the_configuration(folder: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=[2, 0, 2])
    change(folder, eos_token_id=1)
    assert config_of(folder).eos_token_ids == (2, 0)
    (folder / "generation_config.json").unlink()
    assert config_of(folder).eos_token_ids == (1,)
    change(folder, eos_token_id=None)
    assert config_of(folder).eos_token_ids == (2,)


def test_special_tokens_are_found_in_older_files_too(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    change(folder, "special_tokens_map.json", bos_token={"content": "<|endoftext|>", "lstrip": False})
    config = config_of(folder)
    assert (config.bos_token, config.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("short", "short"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], ""),
        (None, ""),
    ],
)
def test_chat_template_of_older_folders_is_in_the_tokenizers_configuration(
    folder: Path, stored: object, expected: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template=stored)
    assert opened(folder).chat_template == expected


def test_contexts_that_scaling_reaches(folder: Path) -> None:
    contexts = {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 3.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0},
    }
    found = {}
    for name, rope in contexts.items():
        change(folder, rope_parameters=rope)
        found[name] = config_of(folder).max_context_tokens
    assert found == {"linear": 1024, "dynamic": 1536, "yarn": 2048}
    change(folder, rope_parameters={**contexts["yarn"], "original_max_position_embeddings": 128})
    assert config_of(folder).max_context_tokens == 512


def test_equal_head_beside_tied_embeddings_is_left_out_and_another_one_is_used(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    change(folder, tie_word_embeddings=True)
    assert not config_of(folder).tie_embeddings
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert config_of(folder).tie_embeddings
    assert "lm_head" not in load_weights(opened(folder))


def test_stored_frequencies_of_old_folders_are_left_out(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors")
    opened(folder)


#: config.json values that are refused, and what is said of each.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["MambaForCausalLM"]},
        "'MambaForCausalLM'.*LlamaForCausalLM, MistralForCausalLM, Qwen2.*Qwen3.*SmolLM3ForCausalLM",
    ),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "Other"]}, "'LlamaForCausalLM', 'Other'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq"),
    "own code": ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
    "experts": ({"num_local_experts": 8}, "num_local_experts = 8"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
    "partial rotation, new spelling": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor = 0\.5",
    ),
    "scaled logits": ({"logits_scaling": 8.0}, r"logits_scaling = 8\.0"),
    "rope type": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope type 'longrope'.*default, linear, dynamic, yarn, llama3",
    ),
    "rope type, old spelling": ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
    "rope parameter": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3]}},
        "rope parameter 'mrope_section'",
    ),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope parameter 'full_attention'",
    ),
    "layer type": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "layers of type 'chunked_attention'",
    ),
}


@pytest.mark.parametrize(("values", "message"), VARIANTS.values(), ids=VARIANTS)
def test_what_would_change_the_result_is_refused_by_name(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    change(folder, **values)
    with pytest.raises(UnsupportedModel, match=message):
        opened(folder)


#: config.json values that contradict themselves or lack something.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"architectures": None}, "lacks 'architectures'"),
    "no size": ({"hidden_size": None}, "lacks 'hidden_size'"),
    "text for a number": ({"num_hidden_layers": "two"}, "'num_hidden_layers' is 'two'"),
    "endless layers": ({"num_hidden_layers": 10**9}, "names 1000000000 layers"),
    "zero layers": ({"num_hidden_layers": 0}, "not a positive integer"),
    "a context beyond numbers": ({"max_position_embeddings": 10**400}, "not at most"),
    "a context beyond tokens": ({"max_position_embeddings": 2**40}, "a context of 1099511627776 tokens"),
    "rotation beyond numbers": ({"rope_theta": 10**400, "rope_parameters": None}, "'rope_theta' is '1000"),
    "factor beyond numbers": (
        {"rope_parameters": {"rope_type": "linear", "factor": 1e308}},
        "not a positive number up to",
    ),
    "factor beyond contexts": ({"rope_parameters": {"rope_type": "dynamic", "factor": 1e30}}, "a context of"),
    "text for a flag": ({"attention_bias": "no"}, "not true or false"),
    "heads": ({"num_key_value_heads": 3}, "4 heads of 16 over 3 KV heads"),
    "end token": ({"eos_token_id": "end"}, "not an id or a list of ids"),
    "factor": ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
    "negative factor": ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "'factor' is '-1'"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
    "rope": ({"rope_parameters": [1]}, "not an object"),
    "layer count": ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
    "vocabulary": ({"vocab_size": 400}, r"has shape \(384, 64\); the configuration asks for \(400, 64\)"),
    "unrotated layers": (
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
        "1 entries for 2 layers",
    ),
    "KV heads": (
        {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 0},
        "not a positive integer",
    ),
}


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_configuration_that_makes_no_sense_is_named(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    if "eos_token_id" in values:
        (folder / "generation_config.json").unlink()
    change(folder, **values)
    with pytest.raises(CorruptModel, match=message):
        opened(folder)


def test_tensors_that_would_be_ignored_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"1 tensors such as model.layers.0.self_attn.q_proj.bias"):
        opened(folder)


def test_tensor_types_that_are_no_floating_point_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"tensor type I8 in 'model.norm.weight'.*F32, F16, BF16"):
        opened(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_no_pickle_is_ever_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsupportedModel, match=rf"'{name}', a pickle.*safetensors"):
        opened(folder)
    with pytest.raises(UnsupportedModel, match=rf"'{name}', a pickle.*safetensors"):
        opened(folder / name)


def test_index_leads_to_no_pickle_and_out_of_no_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    for name in ("pytorch_model.bin", "../other.safetensors"):
        change(folder, "model.safetensors.index.json", weight_map={"a": name})
        with pytest.raises(CorruptModel, match="names the file"):
            opened(folder)
    change(folder, "model.safetensors.index.json", weight_map={})
    with pytest.raises(CorruptModel, match="names no file"):
        opened(folder)
    change(folder, "model.safetensors.index.json", weight_map={"a": "model-1.safetensors"})
    with pytest.raises(ModelUnavailable, match=r"model-1.safetensors is missing.*download"):
        opened(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"neither model.safetensors nor"):
        opened(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CorruptModel, match="not a whole safetensors file"):
        opened(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptModel, match=r"tokenizer.json is damaged: it is not a tokenizer"):
        opened(folder)
    (folder / "config.json").write_text("[]")
    (folder / "tokenizer.json").write_text(Tokenizer.from_str(MINIMAL_TOKENIZER).to_str())
    with pytest.raises(CorruptModel, match=r"config.json is damaged: it is not an object"):
        opened(folder)
    for text, problem in (
        ("{", "not JSON"),
        ('{"hidden_act": "\\ud800"}', "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CorruptModel, match=rf"config.json is damaged: it is {problem}"):
            opened(folder)


def test_a_template_that_is_no_utf_8_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(CorruptModel, match=r"chat_template.jinja is damaged at byte 2: it is not UTF-8"):
        opened(folder)


def test_weights_without_a_shape_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights |= {"lm_head.weight": torch.tensor(1.0), "model.embed_tokens.weight": torch.tensor(1.0)}
    save_file(weights, folder / "model.safetensors")
    change(folder, tie_word_embeddings=True)
    with pytest.raises(CorruptModel, match=r"'model.embed_tokens.weight' has shape \(\)"):
        opened(folder)


MINIMAL_TOKENIZER = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


def test_missing_tokenizer_says_how_to_make_one(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelUnavailable, match=r"tokenizer.model alone is not read.*save_pretrained"):
        opened(folder)


def test_safetensors_file_alone_names_its_folder(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"Name its folder"):
        opened(folder / "model.safetensors")
