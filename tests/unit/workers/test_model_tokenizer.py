"""Tokenizers built from GGUF metadata: the tiny one, and that of the embedded model."""

from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.support.embedded_model import embedded_prepared, embedded_tokenizer
from tests.support.tiny_model import write_tiny_gguf
from workers.errors import CorruptModel, UnsupportedModel
from workers.model.gguf_file import GgufFile, MetadataValue, open_gguf
from workers.model.tokenizer import chat_template, tokenizer_json

TEXTS = {
    "text": "It's 23 °C; isn't that  nice?\n\nYes.",
    "code": "def f(x: int) -> int:\n\treturn x ** 2  # squared\n",
    "CJK": "日本の首都は東京です。中国的首都是北京。",
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈!",
    "accents": "Ça coûte 10 €, naïve façade, Ελλάδα, العربية",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return open_gguf(write_tiny_gguf(tmp_path_factory.mktemp("tokenizer") / "tiny.gguf"))


def build(file: GgufFile) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(file).decode())


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_the_tiny_tokenizer(tiny: GgufFile, text: str) -> None:
    tokenizer = build(tiny)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_earlier_merges_go_first_and_digits_stay_single(tiny: GgufFile) -> None:
    merges = tiny.metadata["tokenizer.ggml.merges"]
    assert isinstance(merges, list)
    assert merges.index("e a") < merges.index("t e")
    assert build(tiny).encode("tea 12").tokens == ["t", "ea", "Ġ", "1", "2"]


def test_control_tokens_are_one_token_and_are_skipped_in_text(tiny: GgufFile) -> None:
    tokenizer = build(tiny)
    encoded = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert [encoded.ids[0], encoded.ids[-1]] == [1, 2]
    assert tokenizer.decode(encoded.ids) == "a"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"


def changed(tiny: GgufFile, key: str, value: MetadataValue) -> GgufFile:
    return replace(tiny, metadata={**tiny.metadata, key: value})


def test_other_kinds_of_tokenizer_are_refused(tiny: GgufFile) -> None:
    with pytest.raises(UnsupportedModel, match="'llama' tokenizer"):
        tokenizer_json(changed(tiny, "tokenizer.ggml.model", "llama"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.token_type", [1]),
        ("tokenizer.ggml.token_type", ["a"]),
        ("tokenizer.ggml.tokens", ["same"] * 384),
        ("tokenizer.ggml.merges", ["no-such pair"]),
        ("tokenizer.ggml.merges", ["e"]),
    ],
)
def test_contradictory_vocabulary_is_corrupt(tiny: GgufFile, key: str, value: MetadataValue) -> None:
    with pytest.raises(CorruptModel):
        tokenizer_json(changed(tiny, key, value))


def test_model_without_a_chat_template_has_an_empty_one(tiny: GgufFile) -> None:
    metadata = {key: value for key, value in tiny.metadata.items() if key != "tokenizer.chat_template"}
    assert chat_template(replace(tiny, metadata=metadata)) == ""


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_embedded_tokenizer_round_trips(text: str) -> None:
    tokenizer = embedded_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def chat_token_ids(question: str) -> list[int]:
    template = jinja2.Environment(autoescape=False).from_string(embedded_prepared().chat_template)
    text = template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
    token_ids: list[int] = embedded_tokenizer().encode(text, add_special_tokens=False).ids
    return token_ids


def test_chat_prompt_has_the_token_ids_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(embedded_prepared().tokenizer_json)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs.chat_template = embedded_prepared().chat_template
    question = "What is the capital of France?"
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert chat_token_ids(question) == expected
    assert len(expected) == 37
    assert expected[0] == 1
