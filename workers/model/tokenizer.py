"""Builds the tokenizer that a GGUF file describes."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.gguf_file import GgufFile
from workers.model.metadata import Metadata

#: `tokenizer.ggml.token_type` of tokens that stand for themselves and are never text.
CONTROL_TOKEN = 3


def _smollm() -> PreTokenizer:
    """Single digits, then GPT-2's split into words."""
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


#: `tokenizer.ggml.pre` -> how text is cut before merges apply.
PRE_TOKENIZERS = {"smollm": _smollm}


def tokenizer_json(file: GgufFile) -> bytes:
    """tokenizer.json of the `tokenizers` library, UTF-8, with the control tokens as special tokens.

    Raises UnsupportedModel for anything but byte-level BPE with a known pre-tokenizer, and CorruptModel
    for a vocabulary that contradicts itself.
    """
    metadata = Metadata(file)
    kind = metadata.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(metadata.path, f"a {kind!r} tokenizer", "'gpt2' (byte-level BPE)")
    pre_tokenizer = PRE_TOKENIZERS.get(pre := metadata.text("tokenizer.ggml.pre"))
    if pre_tokenizer is None:
        raise UnsupportedModel(metadata.path, f"pre-tokenizer {pre!r}", ", ".join(map(repr, PRE_TOKENIZERS)))
    tokens = metadata.texts("tokenizer.ggml.tokens")
    token_types = metadata.integers("tokenizer.ggml.token_type")
    if len(token_types) != len(tokens) or len(set(tokens)) != len(tokens):
        problem = f"{len(tokens)} tokens, {len(set(tokens))} of them different, with {len(token_types)} types"
        raise CorruptModel(metadata.path, 0, problem)
    tokenizer = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_merges(metadata, set(tokens)))
    )
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type == CONTROL_TOKEN
        ]
    )
    return tokenizer.to_str().encode()


def chat_template(file: GgufFile) -> str:
    """Jinja source of the chat template; empty when the model has none."""
    return Metadata(file).text("tokenizer.chat_template", "")


def _merges(metadata: Metadata, tokens: set[str]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens:
            raise CorruptModel(metadata.path, 0, f"merge {merge!r} names a token that is not there")
        merges.append((left, right))
    return merges
