"""Tokenizers of each family, described as llama.cpp's converter does it, against the family's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from tests.support.tiny_model import write_tiny_gguf
from workers.errors import CorruptModel
from workers.model.gguf_file import GgufFile, MetadataValue, open_gguf
from workers.model.tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer_json

BYTE = 6
TEXTS = {
    "prose": "It's 23 °C; ISN'T that  nice?\n\nYes, WE'LL see. It is nice, that is what it is.",
    "Python": "def f(x: int) -> int:\n\treturn x ** 2  # squared\n\n\n    pass\r\n",
    "C": "for (int i = 0; i < 1234567; ++i) { /* path/to//file */ }\n//\n/",
    "CJK": "日本の首都は東京です。中国的首都是北京。한국어 텍스트 東京は日本の首都",
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈! ✅",
    "accents": "Ça coûte 10 €, naïve façade, Ελλάδα, العربية, ไทย १२३",
    "decomposed": "cafe\u0301 A\u030a e\u0301",
    "spaces": " leading,   many    spaces and a tail   ",
    "cases": "camelCaseWords and SCREAMING_CASE HTTPServer 3.14 1e-5 ½ Ⅷ 2024 20245",
    "tokens": "<|im_start|>user\nhi<think>hm</think><|im_end|>\n",
    "nothing": "",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFINED = ("<think>", "</think>")
#: The pattern of Mistral's tokenizer.json.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return open_gguf(write_tiny_gguf(tmp_path_factory.mktemp("families") / "tiny.gguf"))


def build(tiny: GgufFile, **values: MetadataValue) -> Tokenizer:
    """From a file whose tokenizer is described by these values."""
    names = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return Tokenizer.from_str(tokenizer_json(replace(tiny, metadata=names)).decode())


def smollm() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def tiktoken(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def llama3() -> Tokenizer:
    return tiktoken(TikTokenConverter(vocab_file="").pattern)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: GPT2Tokenizer().backend_tokenizer,
    "smollm": smollm,
    "llama-bpe": llama3,
    "smaug-bpe": llama3,
    "qwen2": lambda: Qwen2Tokenizer().backend_tokenizer,
    "tekken": lambda: tiktoken(TEKKEN),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny: GgufFile) -> tuple[Tokenizer, Tokenizer]:
    """The family's own tokenizer, trained on the texts, and ours, built from what a converter writes of it."""
    theirs = FAMILIES[request.param]()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([*TEXTS.values()] * 2, trainer)
    theirs.add_tokens([AddedToken(token, special=False, normalized=False) for token in DEFINED])
    theirs.decoder = decoders.ByteLevel()
    vocabulary = theirs.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = dict.fromkeys(SPECIAL, CONTROL) | dict.fromkeys(DEFINED, USER_DEFINED)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    ours = build(
        tiny,
        model="gpt2",
        pre=request.param,
        tokens=list(tokens),
        token_type=[types.get(token, NORMAL) for token in tokens],
        merges=[f"{left} {right}" for left, right in merges],
        add_bos_token=False,
    )
    return theirs, ours


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_have_the_tokens_of_the_family(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    theirs, ours = pair
    expected = theirs.encode(text)
    assert ours.encode(text).tokens == expected.tokens
    assert ours.decode(expected.ids) == theirs.decode(expected.ids)


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_any_text_has_the_tokens_of_the_family(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    theirs, ours = pair
    assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("default", "a+b 12345 c!", ["a", "+", "b", "Ġ", "123", "45", "Ġc", "!"]),
        ("gpt-2", "it's  12345", ["it", "'s", "Ġ", "Ġ12345"]),
        ("smollm", "it's  123", ["it", "'s", "ĠĠ", "1", "2", "3"]),
        ("llama-bpe", "IT'S (a) 12345", ["IT", "'S", "Ġ(", "a", ")", "Ġ", "123", "45"]),
        ("qwen2", "IT'S (a) 123", ["IT", "'S", "Ġ(", "a", ")", "Ġ", "1", "2", "3"]),
        ("tekken", "camelCase HTTPServer //\n1", ["camel", "Case", "ĠHTTPServer", "Ġ//Ċ", "1"]),
    ],
)
def test_words_are_cut_as_the_name_says(tiny: GgufFile, pre: str, text: str, words: list[str]) -> None:
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in tiny.metadata.items()}
    kept = {name: values[name] for name in ("model", "tokens", "token_type", "merges", "bos_token_id")}
    tokenizer = build(tiny, **{**kept, "pre": pre})
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


class Pieces:
    """A SentencePiece vocabulary, and its algorithm written out plainly."""

    def __init__(self) -> None:
        spaced = [text.replace(" ", "▁") for text in TEXTS.values()]
        trained = Tokenizer(BPE())
        trained.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=500, show_progress=False))
        vocabulary = trained.get_vocab()
        by_age = sorted(vocabulary, key=vocabulary.__getitem__)
        # As SentencePiece has it: the first merge has the best score, single characters the worst.
        pieces = [piece for piece in by_age if len(piece) > 1] + [
            piece for piece in by_age if len(piece) == 1
        ]
        self.control = ["<unk>", "<s>", "</s>"]
        self.bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        self.tokens = [*self.control, *self.bytes, *pieces]
        self.types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
        self.scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
        self.score_of = dict(zip(pieces, self.scores[259:], strict=True))

    def encode(self, text: str) -> list[str]:
        """Merge the neighbours with the best score until none make a token; the first ones among equals."""
        symbols = list("▁" + text.replace(" ", "▁")) if text else []
        while True:
            joined = [left + right for left, right in pairwise(symbols)]
            known = [i for i, piece in enumerate(joined) if piece in self.score_of]
            if not known:
                break
            i = max(known, key=lambda i: (self.score_of[joined[i]], -i))
            symbols[i : i + 2] = [joined[i]]
        tokens: list[str] = []
        for symbol in symbols:
            in_bytes = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            tokens += [symbol] if symbol in self.score_of else in_bytes
        return tokens


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces()


@pytest.fixture(scope="module")
def sentence_piece(tiny: GgufFile, pieces: Pieces) -> Tokenizer:
    return build(tiny, **described(pieces))


def described(pieces: Pieces, **more: MetadataValue) -> dict[str, MetadataValue]:
    return {
        "model": "llama",
        "pre": "default",
        "tokens": list(pieces.tokens),
        "token_type": list(pieces.types),
        "scores": list(pieces.scores),
        "bos_token_id": 1,
        **more,
    }


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_sentence_piece_tokens_are_those_of_its_algorithm(
    sentence_piece: Tokenizer, pieces: Pieces, text: str
) -> None:
    encoded = sentence_piece.encode(text, add_special_tokens=False)
    assert encoded.tokens == pieces.encode(text)
    assert sentence_piece.decode(encoded.ids) == text


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40) | st.text("abcdefit's \n", max_size=40))
def test_any_text_comes_back_from_sentence_piece(
    sentence_piece: Tokenizer, pieces: Pieces, text: str
) -> None:
    encoded = sentence_piece.encode(text, add_special_tokens=False)
    assert encoded.tokens == pieces.encode(text)
    # What is no piece is spelt in bytes, and the sign for a space cannot be told from a space.
    assert sentence_piece.decode(encoded.ids) == text.replace("▁", " ")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_sentence_piece_has_the_tokens_of_transformers(
    sentence_piece: Tokenizer, pieces: Pieces, text: str
) -> None:
    vocabulary = {token: i for i, token in enumerate(pieces.tokens)}
    scores = dict(zip(pieces.tokens, pieces.scores, strict=True))
    merges = generate_merges(vocabulary, scores, skip_tokens=[*pieces.control, *pieces.bytes])
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges)
    # Unlike SentencePiece it puts no space before a text that has one.
    text = text.lstrip(" ")
    ids = sentence_piece.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text, add_special_tokens=False)


def test_sentence_piece_begins_with_a_bos_token_unless_the_metadata_say_otherwise(
    tiny: GgufFile, pieces: Pieces, sentence_piece: Tokenizer
) -> None:
    plain = sentence_piece.encode("it is", add_special_tokens=False).ids
    assert sentence_piece.encode("it is").ids == [1, *plain]
    without = build(tiny, **described(pieces, add_bos_token=False))
    assert without.encode("it is").ids == plain


def test_sentence_piece_without_a_space_in_front(tiny: GgufFile, pieces: Pieces) -> None:
    tokenizer = build(tiny, **described(pieces, add_space_prefix=False))
    assert not tokenizer.encode("it is", add_special_tokens=False).tokens[0].startswith("▁")
    ids = tokenizer.encode(" it is", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " it is"


def test_scores_that_are_missing_are_corrupt(tiny: GgufFile, pieces: Pieces) -> None:
    with pytest.raises(CorruptModel, match="scores"):
        build(tiny, **described(pieces, scores=[0.0]))
