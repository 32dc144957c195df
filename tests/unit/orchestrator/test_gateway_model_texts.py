"""Tokenising, chat templates, and text that comes back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from orchestrator.errors import InvalidRequest, UnusableModel
from orchestrator.gateway.model_texts import ChatTurn, ModelTexts
from orchestrator.gateway.stop_strings import StopStrings
from tests.support.fake_worker import byte_ids, byte_model, byte_tokenizer, without_byte_level

TEXTS = ModelTexts(byte_model())
TOKENIZER = byte_tokenizer()
#: Loops, conditions, filters and white space.
LOOPS = (
    "{{ bos_token }}\n{% for message in messages %}\n    {% if loop.first and message['role'] != 'system' %}\n"
    "{{ 'default' }}{{ eos_token }}\n    {% endif %}\n  {{- message['role'] + ': ' + message['content'] | trim }}\n"
    "{% if message['content'] | length > 3 %}{% continue %}{% endif %}{{ message | tojson }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}go{% endif %}"
)


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    stream = TEXTS.text_stream()
    pieces = [stream.push([token_id]).text for token_id in TEXTS.encode(text)]
    assert "".join(pieces) + stream.finish().text == TOKENIZER.decode(TEXTS.encode(text))


def test_stop_strings_and_min_tokens_reach_the_stream() -> None:
    stream = TEXTS.text_stream(StopStrings(["b"]), min_tokens=4)
    delta = stream.push(byte_ids("abab"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("aba", "b", 4)


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool 世>", normalized=False)])
    texts = ModelTexts(byte_model(tokenizer_json=tokenizer.to_str().encode()))
    assert texts.text_stream().push(texts.encode("a<tool 世>b")).text == "a<tool 世>b"


def test_a_tokenizer_that_cuts_or_fills_up_texts_does_not_do_so_to_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30)
    texts = ModelTexts(byte_model(tokenizer_json=tokenizer.to_str().encode()))
    assert texts.encode("a prompt of words") == TEXTS.encode("a prompt of words")


def test_a_token_id_beyond_any_vocabulary_is_refused() -> None:
    described = json.loads(TOKENIZER.to_str())
    described["model"]["vocab"]["far"] = 2**32 - 1
    with pytest.raises(UnusableModel, match="a token with id 4294967295"):
        ModelTexts(byte_model(tokenizer_json=json.dumps(described).encode()))


@pytest.mark.parametrize(
    "template",
    [
        LOOPS,
        "{% for message in messages %}{%- generation %}\n {{ message.content }}\n{% endgeneration -%}\n.{% endfor %}",
        "{% if tools is defined and tools is none and documents is none %}none{% endif %}{{ tools }}",
        "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}{{ 'ä' | tojson(False, 2) }}",
        "{{ strftime_now('%Y-%B') | length > 6 }}",
    ],
)
def test_templates_are_rendered_as_transformers_does(template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    messages = [{"role": "user", "content": " häß <b> "}, {"role": "assistant", "content": "x"}]
    expected = reference.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    turns = [ChatTurn(message["role"], (message["content"],)) for message in messages]
    assert ModelTexts(byte_model(chat_template=template)).render_chat(turns) == expected


def test_a_template_that_refuses_makes_the_request_invalid() -> None:
    with pytest.raises(InvalidRequest, match=r"chat\.messages is refused.*not this one"):
        TEXTS.render_chat([ChatTurn("user", ("raise",))])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role.x }}",
    ],
)
def test_a_template_that_breaks_or_reaches_out_makes_the_request_invalid(template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ModelTexts(byte_model(chat_template=template)).render_chat([ChatTurn("user", ("x",))])


@pytest.mark.parametrize(
    ("template", "problem"), [("", "has no chat template"), ("{% if %}", "cannot be read")]
)
def test_without_a_template_chat_is_refused_and_text_is_not(template: str, problem: str) -> None:
    texts = ModelTexts(byte_model(chat_template=template))
    assert not texts.has_chat_template
    assert texts.encode("ab") == byte_ids("ab")
    with pytest.raises(InvalidRequest, match=problem):
        texts.render_chat([ChatTurn("user", ("x",))])


@pytest.mark.parametrize("tokenizer_json", [b"", b"{}", b"\xff", json.dumps({"model": 1}).encode()])
def test_a_broken_tokenizer_is_refused(tokenizer_json: bytes) -> None:
    with pytest.raises(UnusableModel, match="cannot be read"):
        ModelTexts(byte_model(tokenizer_json=tokenizer_json))


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(UnusableModel, match="'Metaspace'; supported: 'ByteLevel'"):
        ModelTexts(byte_model(tokenizer_json=without_byte_level()))
