"""Text comes token by token, in whole characters, and is what decoding all tokens at once makes."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import BPEDecoder, ByteFallback, ByteLevel, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceNormalizer
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelPreTokenizer

from orchestrator.errors import UnusableModel
from orchestrator.gateway.detokeniser import TextStream, TokenTexts
from orchestrator.gateway.stop_strings import StopStrings
from tests.support.fake_worker import byte_tokenizer

FAMILY = "👩‍👩‍👧‍👦"
TEXTS = [
    "plain words, twice words",
    f"a{FAMILY}b{FAMILY}",
    "世界你好。",
    "नमस्ते é\n\n  x",
    "x \ufffd",
]
#: Tokens of the byte-level tokenizer beside the single bytes: parts of characters, and more than one.
BYTE_PIECES = [
    "ab",
    " a",
    "世".encode()[:2],
    "世".encode()[1:],
    "界a".encode(),
    b"\xff\xfe",
    FAMILY[:2].encode()[3:],
]


def byte_level_tokenizer() -> Tokenizer:
    """Special tokens, all bytes, some longer tokens, and an added token that is text."""
    tokenizer = byte_tokenizer()
    alphabet = _alphabet()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for piece in BYTE_PIECES:
        raw = piece.encode() if isinstance(piece, str) else piece
        vocabulary["".join(alphabet[byte] for byte in raw)] = len(vocabulary)
    vocabulary["far"] = len(vocabulary) + 5  # ids between are no token
    longer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    longer.pre_tokenizer = ByteLevelPreTokenizer(add_prefix_space=False)
    longer.decoder = ByteLevel()
    longer.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_end|>")])
    longer.add_tokens([AddedToken("<tool 世>", normalized=False)])
    return longer


def _alphabet() -> dict[int, str]:
    """How bytes are written; taken from what the library does to characters with such bytes."""
    pre_tokenizer = ByteLevelPreTokenizer(add_prefix_space=False, use_regex=False)
    found: dict[int, str] = {}
    code: int
    for code in [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)]:
        raw, written = chr(code).encode(), pre_tokenizer.pre_tokenize_str(chr(code))[0][0]
        found.update(zip(raw, written, strict=True))
    # Bytes that are in no UTF-8 text: the last ones of the alphabet that prints as itself.
    return found | {byte: chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


def sentence_piece_tokenizer(*, is_stripped: bool = True) -> Tokenizer:
    """As converted from SentencePiece with byte fallback; is_stripped: as Llama's, else as Gemma's."""
    words = [
        "▁",
        "▁▁",
        "▁a",
        "a",
        "b",
        "▁wor",
        "ds",
        "世",
        "é",
        "▁世a",
        "\u200d",
        "<0x4",
        "<0xZZ>",
        "\ufffd",
        " ",
        "\n",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("▁", "a"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = NormalizerSequence([Prepend("▁"), ReplaceNormalizer(" ", "▁")])
    steps: list[Any] = [Replace("▁", " "), ByteFallback(), Fuse()]
    tokenizer.decoder = Sequence([*steps, Strip(" ", 1, 0)] if is_stripped else steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool▁世>", normalized=False)])
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level_tokenizer(),
    "Llama": sentence_piece_tokenizer(),
    "Gemma": sentence_piece_tokenizer(is_stripped=False),
}
TOKEN_TEXTS = {name: TokenTexts(tokenizer) for name, tokenizer in TOKENIZERS.items()}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def id_of(name: str, token: str) -> int:
    """The id of a token that is there."""
    token_id = TOKENIZERS[name].token_to_id(token)
    assert token_id is not None
    return token_id


def cut(token_ids: list[int], bounds: list[int]) -> list[list[int]]:
    """The tokens in batches that end at these places."""
    places = sorted({0, len(token_ids), *(min(bound, len(token_ids)) for bound in bounds)})
    return [token_ids[begin:end] for begin, end in pairwise(places)]


def streamed(stream: TextStream, batches: list[list[int]]) -> str:
    return "".join(stream.push(batch).text for batch in batches) + stream.finish().text


def is_whole(text: str) -> bool:
    return text.encode().decode() == text


@each_tokenizer
@given(data=st.data(), bounds=st.lists(st.integers(0, 40)))
def test_pieces_make_what_decoding_at_once_makes(name: str, data: st.DataObject, bounds: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    beyond = tokenizer.get_vocab_size() + 10
    token_ids = data.draw(st.lists(st.integers(0, beyond), max_size=40))
    pieces = streamed(TextStream(TOKEN_TEXTS[name].detokenizer()), cut(token_ids, bounds))
    known = [token_id for token_id in token_ids if tokenizer.id_to_token(token_id) is not None]
    assert pieces == tokenizer.decode(known, skip_special_tokens=True)


@each_tokenizer
@given(data=st.data())
def test_runs_of_byte_tokens_are_decoded_as_at_once(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    first = tokenizer.token_to_id("<0x00>") or 3
    a_byte = st.integers(first, first + 255)
    of_text = st.sampled_from(TEXTS).map(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    )
    parts = data.draw(st.lists(st.one_of(of_text, st.lists(a_byte, max_size=5)), max_size=6))
    token_ids = [token_id for part in parts for token_id in part]
    pieces = streamed(TextStream(TOKEN_TEXTS[name].detokenizer()), [[token_id] for token_id in token_ids])
    assert pieces == tokenizer.decode(token_ids, skip_special_tokens=True)


@each_tokenizer
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_in_whole_characters(name: str, text: str) -> None:
    stream = TextStream(TOKEN_TEXTS[name].detokenizer())
    pieces = [stream.push([i]).text for i in TOKENIZERS[name].encode(text, add_special_tokens=False).ids]
    assert all(map(is_whole, pieces))
    # Gemma's normalizer puts a space in front, and its decoder leaves it there.
    expected = f" {text}" if name == "Gemma" else text
    assert "".join(pieces) + stream.finish().text == expected


def test_an_emoji_of_many_characters_comes_character_by_character() -> None:
    stream = TextStream(TOKEN_TEXTS["byte level"].detokenizer())
    ids = byte_tokenizer().encode(FAMILY).ids
    pieces = [stream.push([token_id]).text for token_id in ids]
    assert [piece for piece in pieces if piece] == list(FAMILY)


def test_a_run_of_byte_tokens_comes_when_it_is_over() -> None:
    stream = TextStream(TOKEN_TEXTS["Llama"].detokenizer())
    run = [id_of("Llama", f"<0x{byte:02X}>") for byte in "界".encode()]
    assert [stream.push([token_id]).text for token_id in [*run, id_of("Llama", "b")]] == [
        "",
        "",
        "",
        "界b",
    ]


def test_text_that_continues_a_prompt_keeps_its_first_space() -> None:
    token_ids = [id_of("Llama", token) for token in ("▁a", "▁wor", "ds")]
    assert streamed(TextStream(TOKEN_TEXTS["Llama"].detokenizer()), [token_ids]) == "a words"
    going_on = TOKEN_TEXTS["Llama"].detokenizer(is_continuation=True)
    assert streamed(TextStream(going_on), [token_ids]) == " a words"


def test_without_stop_strings_all_tokens_count() -> None:
    stream = TextStream(TOKEN_TEXTS["byte level"].detokenizer())
    delta = stream.push(byte_tokenizer().encode("ab").ids)
    assert (delta.text, delta.stop, delta.num_tokens) == ("ab", None, 2)


def first_complete(text: str, begin: int, strings: list[str]) -> tuple[str, str | None]:
    """The reference: text up to the stop string that is complete first, counting from `begin` characters on."""
    for end in range(begin + 1, len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@each_tokenizer
@given(
    data=st.data(),
    bounds=st.lists(st.integers(0, 30)),
    strings=st.lists(st.text("ab 世<\ufffd", min_size=1, max_size=4), min_size=1, max_size=4),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_end_the_text_as_in_the_whole_text(
    name: str, data: st.DataObject, bounds: list[int], strings: list[str], min_tokens: int
) -> None:
    tokenizer, texts = TOKENIZERS[name], TOKEN_TEXTS[name]
    favourites = [
        tokenizer.token_to_id(token) for token in ("a", "b", "ab", "▁a", "世", "<s>", "<|im_end|>", "▁")
    ]
    token = st.one_of(
        st.sampled_from([i for i in favourites if i is not None]),
        st.integers(0, tokenizer.get_vocab_size() - 1),
    )
    token_ids = data.draw(st.lists(token, max_size=30))
    # A stop string counts from the text on that the last of min_tokens tokens brings.
    plain = texts.detokenizer()
    before = plain.push(token_ids[: max(min_tokens - 1, 0)])
    if len(token_ids) < min_tokens:
        before += plain.push(token_ids[min_tokens - 1 :]) + plain.flush()
    whole = streamed(TextStream(texts.detokenizer()), [token_ids])
    expected, stop = first_complete(whole, len(before), strings)

    stream = TextStream(texts.detokenizer(), StopStrings(strings), min_tokens=min_tokens)
    pieces: list[str] = []
    num_tokens = 0
    for batch in cut(token_ids, bounds):
        delta = stream.push(batch)
        pieces.append(delta.text)
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            break
    else:
        delta = stream.finish()
        pieces.append(delta.text)
    assert ("".join(pieces), delta.stop) == (expected, stop)
    if stop is not None and delta.num_tokens:
        needed = texts.detokenizer()
        assert (expected + stop) in needed.push(token_ids[:num_tokens])
        shorter = texts.detokenizer()
        assert len(shorter.push(token_ids[: num_tokens - 1])) < len(expected + stop)


def byte_stream(*strings: str, min_tokens: int = 0) -> TextStream:
    """One token for each byte."""
    return TextStream(TokenTexts(byte_tokenizer()).detokenizer(), StopStrings(strings), min_tokens=min_tokens)


def ids(text: str) -> list[int]:
    return list(byte_tokenizer().encode(text).ids)


def test_what_may_begin_a_stop_string_is_held_back_until_decided() -> None:
    stream = byte_stream("\n\nUser:")
    assert [stream.push([token_id]).text for token_id in ids("a\n\nUs!")] == ["a", "", "", "", "", "\n\nUs!"]


def test_the_token_that_completes_a_stop_string_is_the_last_that_counts() -> None:
    stream = byte_stream("cd")
    delta = stream.push(ids("abcdef"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("ab", "cd", 4)


def test_a_stop_string_at_the_end_of_kept_bytes_is_found_when_the_text_is_over() -> None:
    stream = TextStream(TOKEN_TEXTS["Llama"].detokenizer(), StopStrings(["\n"]))
    delta = stream.push([id_of("Llama", "b"), id_of("Llama", "<0x0A>")])
    assert (delta.text, delta.stop) == ("b", None)
    assert stream.finish().stop == "\n"


def test_held_back_text_comes_when_no_more_tokens_do() -> None:
    stream = byte_stream("abc")
    assert stream.push(ids("xab")).text == "x"
    assert stream.finish().text == "ab"


def test_a_stop_string_before_min_tokens_is_text_and_the_next_one_ends_it() -> None:
    stream = byte_stream("ab", min_tokens=3)
    delta = stream.push(ids("ababab"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("ab", "ab", 4)


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        (BPEDecoder(), "BPEDecoder"),
        (Sequence([Fuse(), ByteFallback()]), "Fuse ByteFallback"),
        (Sequence([ByteFallback(), Fuse(), Strip(" ", 1, 1)]), "Strip at the end"),
        (Sequence([]), ""),
    ],
)
def test_a_decoder_that_is_not_followed_is_refused(decoder: Any, kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoder
    with pytest.raises(UnusableModel, match=f"decodes by '{kind}'; supported: 'ByteLevel', and"):
        TokenTexts(tokenizer)


def test_replacement_by_regular_expression_is_refused() -> None:
    tokenizer = sentence_piece_tokenizer()
    state = json.loads(tokenizer.to_str())
    state["decoder"]["decoders"][0]["pattern"] = {"Regex": "▁+"}
    with pytest.raises(UnusableModel, match="regular expression"):
        TokenTexts(Tokenizer.from_str(json.dumps(state)))
