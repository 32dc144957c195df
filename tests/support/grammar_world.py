"""Small tokenizers and a model that draws its logits at random, for tests of grammars."""

from functools import cache

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from workers.api import Grammar
from workers.engine.grammar import GrammarCompiler, GrammarState
from workers.engine.grammar_masks import GrammarMasks

EOS, OTHER_STOP = 0, 1
SPECIAL_TOKENS = ["<eos>", "<stop>"]
#: Merges that cross the borders of JSON's parts and of characters: tokens that a grammar must look into.
WORDS = ['"}', '":', '", ', "}]", '{"', "true", "ull", "name", "12", "00", " the", "\n\n", "Answer", "ab"]
#: More brackets than a search for an end looks at.
WORDS += [left + right for left in '"])}' for right in '"])}>']
BYTE_LEVEL_HALVES = [b"\xc3\xa9", b"\xf0\x9f", b"\x98\x80", b"a\xc3"]


def _added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


@cache
def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: each byte has a letter; some tokens end inside a character."""
    letters = _byte_letters()
    tokens = [*SPECIAL_TOKENS, *sorted(letters.values())]
    merges: list[tuple[str, str]] = []
    for text in [*(word.encode() for word in WORDS), *BYTE_LEVEL_HALVES]:
        parts = [letters[byte] for byte in text]
        joined = parts[0]
        for part in parts[1:]:
            if joined + part not in tokens:
                tokens.append(joined + part)
                merges.append((joined, part))
            joined += part
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _added(tokenizer)


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece's kind: characters, and `<0x41>` for the bytes of those that it lacks."""
    printable = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL_TOKENS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "é", *printable]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = list(word.replace(" ", "▁"))
        joined = parts[0]
        for part in parts[1:]:
            if part not in tokens or joined not in tokens:
                break
            if joined + part not in tokens:
                tokens.append(joined + part)
                merges.append((joined, part))
            joined += part
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _added(tokenizer)


def compiler_of(tokenizer: Tokenizer, *, num_padding: int = 5) -> GrammarCompiler:
    """A compiler for a model whose logits have some more columns than the tokenizer has tokens."""
    vocab_size = tokenizer.get_vocab_size() + num_padding
    return GrammarCompiler(tokenizer.to_str().encode(), vocab_size, [EOS])


@cache
def shared_compiler(kind: str) -> tuple[Tokenizer, GrammarCompiler]:
    """One tokenizer and its compiler, for all tests of a process; kind: `level` or `fallback`."""
    tokenizer = byte_level_tokenizer() if kind == "level" else byte_fallback_tokenizer()
    return tokenizer, compiler_of(tokenizer)


def random_text(
    kind: str, grammar: Grammar, *, seed: int, max_new_tokens: int, eos_bias: float = 0.0
) -> tuple[bytes, GrammarState, list[int]]:
    """What a model of random logits writes under the grammar, greedily: text, last state, tokens."""
    tokenizer, compiler = shared_compiler(kind)
    vocab_size = tokenizer.get_vocab_size() + 5
    state = compiler.compile(grammar).start(max_new_tokens=max_new_tokens)
    rng = np.random.default_rng(seed)
    masks = GrammarMasks(vocab_size)
    token_ids: list[int] = []
    try:
        while len(token_ids) < max_new_tokens and not state.must_stop:
            logits = torch.from_numpy(rng.standard_normal((1, vocab_size), dtype=np.float32))
            logits[0, EOS] += eos_bias
            masks.begin([state])
            masks.rule_out(logits)
            assert state.problem is None, state.problem
            token_id = state.settle(int(logits.argmax()))
            assert state.accept([token_id]) == 1
            token_ids.append(token_id)
            if token_id == EOS:
                break
    finally:
        masks.close()
    return text_of(kind, token_ids), state, token_ids


def text_of(kind: str, token_ids: list[int]) -> bytes:
    """Bytes of the tokens, without special ones; no replacement of half characters."""
    tokenizer, _compiler = shared_compiler(kind)
    return b"".join(_token_bytes(tokenizer, kind, token_id) for token_id in token_ids)


def _token_bytes(tokenizer: Tokenizer, kind: str, token_id: int) -> bytes:
    token = tokenizer.id_to_token(token_id)
    if token in SPECIAL_TOKENS:
        return b""
    if kind == "level":
        values = {letter: byte for byte, letter in _byte_letters().items()}
        return bytes(values[letter] for letter in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@cache
def _byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
