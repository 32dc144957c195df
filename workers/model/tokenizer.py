"""Builds the tokenizer that a GGUF file describes.

Two kinds: BPE over bytes (`gpt2`), whose way of cutting text into words has a name, and SentencePiece's BPE
over characters (`llama`), where the token with the best score is merged first.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.gguf_file import GgufFile
from workers.model.metadata import Metadata, read_bos_token_id

#: Values of `tokenizer.ggml.token_type`. Control tokens stand for themselves and are never text.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
#: What SentencePiece writes for a space.
SPACE = "▁"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"\p{N}{1,3}|" + _REST
_QWEN2 = _ENDINGS + r"\p{N}|" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Words:
    """How text is cut into words before merges apply, and what goes with it."""

    #: Each cuts what the one before it left whole. Matches, and what lies between them, are pieces.
    patterns: tuple[str, ...]
    #: A word that is a token is that token, whatever the merges say.
    ignores_merges: bool = False
    #: Texts begin with the bos token, when the metadata do not say.
    adds_bos: bool = False
    #: Unicode is composed first (NFC).
    is_composed: bool = False


#: By `tokenizer.ggml.pre`. Source of the patterns: tokenizer.json of the models, for "default" llama.cpp.
WORDS = {
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Words((_GPT2,)),
    "smollm": Words((r"\p{N}", _GPT2)),
    "llama-bpe": Words((_LLAMA3,), ignores_merges=True, adds_bos=True),
    # Llama 3's without a bos: SmolLM3.
    "smaug-bpe": Words((_LLAMA3,), ignores_merges=True),
    "qwen2": Words((_QWEN2,), is_composed=True),
    "tekken": Words((_TEKKEN,), ignores_merges=True, adds_bos=True),
}


def tokenizer_json(file: GgufFile) -> bytes:
    """tokenizer.json of the `tokenizers` library, UTF-8.

    Control tokens are special tokens, those that a user defined are added tokens. A bos token that texts
    begin with is added by its post-processor. Raises UnsupportedModel for a kind of tokenizer or a way of
    cutting words that we lack, and CorruptModel for a vocabulary that contradicts itself.
    """
    metadata = Metadata(file)
    vocabulary = _Vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        words = _words(metadata)
        tokenizer = _byte_level(metadata, vocabulary, words)
        adds_bos = words.adds_bos
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata, vocabulary)
        adds_bos = True
    else:
        supported = "'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        raise UnsupportedModel(metadata.path, f"a {kind!r} tokenizer", supported)
    tokenizer.add_tokens(vocabulary.added_tokens())
    _add_bos(tokenizer, metadata, vocabulary, adds_bos)
    return tokenizer.to_str().encode()


def chat_template(file: GgufFile) -> str:
    """Jinja source of the chat template; empty when the model has none."""
    return Metadata(file).text("tokenizer.chat_template", "")


class _Vocabulary:
    """Tokens with their types, checked."""

    def __init__(self, metadata: Metadata) -> None:
        self.tokens = metadata.texts("tokenizer.ggml.tokens")
        self.types = metadata.integers("tokenizer.ggml.token_type")
        num_different = len(set(self.tokens))
        if not len(self.types) == len(self.tokens) == num_different:
            problem = (
                f"{len(self.tokens)} tokens, {num_different} of them different, with {len(self.types)} types"
            )
            raise CorruptModel(metadata.path, None, problem)
        #: Ids. Tokens that only fill up the embedding table are nobody's text.
        self.ids = {
            token: i
            for i, (token, token_type) in enumerate(zip(self.tokens, self.types, strict=True))
            if token_type != UNUSED
        }

    def of_type(self, token_type: int) -> list[str]:
        """In the order of their ids."""
        return [
            token for token, its_type in zip(self.tokens, self.types, strict=True) if its_type == token_type
        ]

    def added_tokens(self) -> list[AddedToken]:
        """Those that are found in a text before anything else."""
        return [
            AddedToken(token, special=token_type != USER_DEFINED, normalized=False)
            for token, token_type in zip(self.tokens, self.types, strict=True)
            if token_type in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]


def _words(metadata: Metadata) -> Words:
    if not metadata.has("tokenizer.ggml.pre"):
        feature = "no name for how text is cut into words (tokenizer.ggml.pre); it was converted long ago"
        raise UnsupportedModel(metadata.path, feature, "a file converted anew")
    name = metadata.text("tokenizer.ggml.pre")
    words = WORDS.get(name)
    if words is None:
        raise UnsupportedModel(metadata.path, f"pre-tokenizer {name!r}", ", ".join(map(repr, WORDS)))
    return words


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary, words: Words) -> Tokenizer:
    merges = _written_merges(metadata, vocabulary.ids.keys())
    tokenizer = Tokenizer(BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=words.ignores_merges))
    if words.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    unknown = vocabulary.of_type(UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary.ids,
            merges=_scored_merges(metadata, vocabulary),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = metadata.flag("tokenizer.ggml.add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if adds_space else spaces
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if adds_space else []),
        ]
    )
    return tokenizer


def _written_merges(metadata: Metadata, tokens: AbstractSet[str]) -> list[tuple[str, str]]:
    """The merges that the file lists, first ones first."""
    merges: list[tuple[str, str]] = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens:
            raise CorruptModel(metadata.path, None, f"merge {merge!r} names a token that is not there")
        merges.append((left, right))
    return merges


def _scored_merges(metadata: Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """All ways to put a token together from two others, those with the best score first.

    Among the ways of one token, the one with the longer left part is first.
    """
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        problem = f"{len(vocabulary.tokens)} tokens and {len(scores)} scores"
        raise CorruptModel(metadata.path, None, problem)
    score_of = {token: scores[vocabulary.ids[token]] for token in vocabulary.of_type(NORMAL)}
    merges = [
        (score, token[:end], token[end:])
        for token, score in score_of.items()
        for end in range(len(token) - 1, 0, -1)
        if token[:end] in score_of and token[end:] in score_of
    ]
    # The sort is stable.
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _add_bos(tokenizer: Tokenizer, metadata: Metadata, vocabulary: _Vocabulary, adds_bos: bool) -> None:
    if metadata.flag("tokenizer.ggml.add_eos_token", default=False):
        feature = "tokenizer.ggml.add_eos_token = True: no text goes on behind its end"
        raise UnsupportedModel(metadata.path, feature, "add_eos_token absent or False")
    if not metadata.flag("tokenizer.ggml.add_bos_token", default=adds_bos):
        return
    token_id = read_bos_token_id(metadata, len(vocabulary.tokens))
    if token_id is None:
        raise CorruptModel(metadata.path, None, "texts begin with a bos token, and its metadata name none")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="bos $A",
        special_tokens=[{"id": "bos", "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]}],
    )
