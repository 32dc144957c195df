"""What a folder of Qwen2.5-VL says of itself, and what is said of one that is damaged or unusual."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.tiny_qwen_vl import (
    IMAGE_TOKEN_ID,
    MAX_PIXELS,
    MIN_PIXELS,
    Spelling,
    write_qwen_vl_folder,
)
from workers.errors import CorruptModel, ModelUnavailable, PhasewiseWorkerError, UnsupportedModel
from workers.model.hf_folder import JsonValues, read_json
from workers.model.hf_qwen2_5_vl import read_vision, text_values
from workers.model.hf_rope import read_mrope
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

HIDDEN_SIZE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Spelling, Path]:
    root = tmp_path_factory.mktemp("folders")
    for spelling in Spelling:
        write_qwen_vl_folder(root / spelling, spelling)
    return {spelling: root / spelling for spelling in Spelling}


def vision_of(folder: Path) -> Qwen25Vision:
    values = read_json(folder / "config.json")
    return read_vision(values, folder, Tokenizer.from_file(str(folder / "tokenizer.json")), HIDDEN_SIZE)


def test_every_spelling_says_the_same(folders: dict[Spelling, Path]) -> None:
    visions = {vision_of(folder) for folder in folders.values()}
    assert len(visions) == 1
    (vision,) = visions
    vision.validate()
    assert (vision.min_pixels, vision.max_pixels) == (MIN_PIXELS, MAX_PIXELS)
    assert (vision.image_token, vision.image_token_id) == ("<|image_pad|>", IMAGE_TOKEN_ID)
    assert (vision.start_token, vision.end_token) == ("<|vision_start|>", "<|vision_end|>")
    texts = [text_values(read_json(folder / "config.json")) for folder in folders.values()]
    ropes = {read_mrope(text, "somewhere", 1e6) for text in texts}
    assert [(rope.mrope_section, rope.theta) for rope, _ in ropes] == [((2, 3, 3), 10000.0)]
    assert {text.positive("num_hidden_layers") for text in texts} == {3}


def _in_vision(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["vision_config"].update(changes)


CONFIG_CHANGES: list[tuple[Callable[[dict[str, Any]], object], type[PhasewiseWorkerError], str]] = [
    (lambda values: values.pop("vision_config"), CorruptModel, "lacks 'vision_config'"),
    (_in_vision(hidden_act="gelu"), UnsupportedModel, "hidden_act = gelu"),
    (_in_vision(in_channels=4), UnsupportedModel, "4 channels"),
    (_in_vision(rope_parameters={"rope_type": "yarn"}), UnsupportedModel, "'yarn'"),
    (_in_vision(out_hidden_size=32), CorruptModel, "'out_hidden_size' is 32"),
    (_in_vision(fullatt_block_indexes=[1, "x"]), CorruptModel, "not a list of integers"),
    (_in_vision(depth=-1), CorruptModel, "'depth' is '-1'"),
    (_in_vision(patch_size=7), CorruptModel, "'patch_size' is not the 7 of config.json"),
    (lambda values: values.update(image_token_id=9999), CorruptModel, "'image_token_id' is 9999"),
    (lambda values: values.update(vision_end_token_id=2**40), CorruptModel, "the tokenizer in"),
]


@pytest.mark.parametrize(("change", "kind", "problem"), CONFIG_CHANGES)
def test_an_odd_config_is_an_error_that_names_the_key(
    folders: dict[Spelling, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    kind: type[PhasewiseWorkerError],
    problem: str,
) -> None:
    folder = _copied(folders[Spelling.NEW], tmp_path, "config.json", change)
    with pytest.raises(kind, match=problem):
        vision_of(folder)


PROCESSOR_CHANGES: list[tuple[dict[str, Any], type[PhasewiseWorkerError], str]] = [
    ({"do_resize": False}, UnsupportedModel, "do_resize = false"),
    ({"do_normalize": "no"}, CorruptModel, "'do_normalize' is 'no'"),
    ({"merge_size": 4}, CorruptModel, "'merge_size' is not the 2"),
    ({"image_mean": [0.5, "x", 0.5]}, CorruptModel, "not a list of numbers"),
    ({"size": {"longest_edge": 0}}, CorruptModel, "'longest_edge' is '0'"),
]


@pytest.mark.parametrize(("changes", "kind", "problem"), PROCESSOR_CHANGES)
def test_an_odd_image_processor_is_an_error_that_names_the_key(
    folders: dict[Spelling, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[PhasewiseWorkerError],
    problem: str,
) -> None:
    folder = _copied(
        folders[Spelling.NEW],
        tmp_path,
        "processor_config.json",
        lambda values: values["image_processor"].update(changes),
    )
    with pytest.raises(kind, match=problem):
        vision_of(folder)


def test_a_folder_without_image_processor_says_what_is_missing(
    folders: dict[Spelling, Path], tmp_path: Path
) -> None:
    folder = _copied(folders[Spelling.OLD], tmp_path, "config.json", lambda _values: None)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"preprocessor_config\.json describes its image processor"):
        vision_of(folder)


@pytest.mark.parametrize("section", ["x", [2, 3, "3"], [2, -3, 3], {"a": 1}])
def test_mrope_sections_that_are_no_sizes_are_refused(section: object) -> None:
    values = JsonValues(
        "config.json", {"rope_parameters": {"mrope_section": section}, "max_position_embeddings": 64}
    )
    with pytest.raises(CorruptModel, match="'mrope_section'"):
        read_mrope(values, "somewhere", 1e6)


def test_mrope_can_be_stretched_and_has_the_published_sections_where_none_are_named() -> None:
    told = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    values = JsonValues("config.json", {"rope_scaling": told, "max_position_embeddings": 32768})
    rope, context_tokens = read_mrope(values, "somewhere", 1e6)
    assert (rope.scaling, rope.mrope_section, context_tokens) == ("yarn", (16, 24, 24), 131072)


def _copied(source: Path, target: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The files of `source` but the weights, with one of them changed."""
    for path in source.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((target / name).read_text())
    change(values)
    (target / name).write_text(json.dumps(values))
    return target
