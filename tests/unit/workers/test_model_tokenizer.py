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
from workers.model.tokenizer import UNUSED, USER_DEFINED, chat_template, tokenizer_json

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


@pytest.mark.parametrize(
    ("key", "value", "feature"),
    [
        ("tokenizer.ggml.model", "t5", "a 't5' tokenizer"),
        ("tokenizer.ggml.pre", "gpt-4o", "pre-tokenizer 'gpt-4o'"),
        ("tokenizer.ggml.add_eos_token", True, "add_eos_token = True"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(
    tiny: GgufFile, key: str, value: MetadataValue, feature: str
) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        tokenizer_json(changed(tiny, key, value))


def test_file_that_does_not_say_how_words_are_cut_is_refused(tiny: GgufFile) -> None:
    metadata = {key: value for key, value in tiny.metadata.items() if key != "tokenizer.ggml.pre"}
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre.*converted anew"):
        tokenizer_json(replace(tiny, metadata=metadata))


@pytest.mark.parametrize(("pre", "adds_bos"), [("smollm", False), ("llama-bpe", True), ("tekken", True)])
def test_bos_token_is_added_as_the_metadata_say_or_else_as_is_usual(
    tiny: GgufFile, pre: str, adds_bos: bool
) -> None:
    file = changed(tiny, "tokenizer.ggml.pre", pre)
    plain = build(file).encode("tea", add_special_tokens=False).ids
    with_bos = [1, *plain]
    assert build(file).encode("tea").ids == (with_bos if adds_bos else plain)
    assert build(changed(file, "tokenizer.ggml.add_bos_token", True)).encode("tea").ids == with_bos
    assert build(changed(file, "tokenizer.ggml.add_bos_token", False)).encode("tea").ids == plain


def test_bos_token_that_is_to_be_added_must_be_named(tiny: GgufFile) -> None:
    metadata = {key: value for key, value in tiny.metadata.items() if "bos_token_id" not in key}
    with pytest.raises(CorruptModel, match="bos token"):
        tokenizer_json(replace(tiny, metadata={**metadata, "tokenizer.ggml.add_bos_token": True}))


def with_type(tiny: GgufFile, token_id: int, token: str, token_type: int) -> GgufFile:
    tokens, types = (list(tiny.metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))
    tokens[token_id], types[token_id] = token, token_type
    values = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return replace(tiny, metadata={**tiny.metadata, **values})


def test_tokens_that_a_user_defined_are_found_in_texts_and_are_text(tiny: GgufFile) -> None:
    tokenizer = build(with_type(tiny, 0, "<é think>", USER_DEFINED))
    encoded = tokenizer.encode("a<é think>a")
    assert encoded.ids[1] == 0
    assert len(encoded.ids) == 3
    assert tokenizer.decode(encoded.ids) == "a<é think>a"
    assert not tokenizer.get_added_tokens_decoder()[0].special


def test_tokens_that_only_fill_the_embedding_table_are_no_text(tiny: GgufFile) -> None:
    tokenizer = build(with_type(tiny, 0, "tea", UNUSED))
    assert 0 not in tokenizer.encode("tea").ids
    assert tokenizer.id_to_token(0) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.token_type", [1]),
        ("tokenizer.ggml.token_type", ["a"]),
        ("tokenizer.ggml.tokens", ["same"] * 384),
        ("tokenizer.ggml.merges", ["no-such pair"]),
        ("tokenizer.ggml.merges", ["e"]),
        ("tokenizer.ggml.add_bos_token", "yes"),
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
