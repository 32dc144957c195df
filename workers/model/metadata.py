"""From GGUF metadata to a ModelConfig, refusing what the forward pass does not do."""

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import ModelConfig
from workers.model.gguf_file import GgufFile, MetadataValue

ARCHITECTURE = "llama"

#: Optional keys (after the architecture's name) that change the forward pass, and the values that do not.
HARMLESS_VALUES: dict[str, tuple[MetadataValue, ...]] = {
    "rope.scaling.type": ("none",),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "attention.causal": (True,),
}


class Metadata:
    """Typed look-ups. A key that is absent, or of another type, is an error that names it."""

    def __init__(self, file: GgufFile) -> None:
        self.path = str(file.path)
        self._values = file.metadata

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer that is 0 or more."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a non-negative integer")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer that is 1 or more."""
        value = self.integer(key, default)
        if value == 0:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._get(key, None)
        texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(texts) != len(value):
            raise self._wrong(key, value, "an array of strings")
        return texts

    def integers(self, key: str) -> list[int]:
        """An array of integers."""
        value = self._get(key, None)
        numbers = [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(numbers) != len(value):
            raise self._wrong(key, value, "an array of integers")
        return numbers

    def has(self, key: str) -> bool:
        """Whether the file says anything under this key."""
        return key in self._values

    def _get(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self._values.get(key, default)
        if value is None:
            raise CorruptModel(self.path, 0, f"its metadata lacks {key!r}")
        return value

    def _wrong(self, key: str, value: MetadataValue, expected: str) -> CorruptModel:
        return CorruptModel(self.path, 0, f"metadata {key!r} is {str(value)[:80]!r}, not {expected}")


def read_config(file: GgufFile) -> ModelConfig:
    """The configuration of a Llama-family model.

    Raises UnsupportedModel for another architecture or a variant of attention that we lack, and
    CorruptModel for metadata that is missing or contradicts itself.
    """
    metadata = Metadata(file)
    architecture = metadata.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedModel(metadata.path, f"architecture {architecture!r}", f"{ARCHITECTURE!r}")
    _refuse_variants(file, metadata)
    tokens = metadata.texts("tokenizer.ggml.tokens")
    eos_token_id = metadata.integer("tokenizer.ggml.eos_token_id")
    bos_token_id = metadata.integer("tokenizer.ggml.bos_token_id", eos_token_id)
    if max(eos_token_id, bos_token_id) >= len(tokens):
        raise CorruptModel(metadata.path, 0, f"its special tokens lie outside the {len(tokens)} tokens")
    hidden_size = metadata.positive("llama.embedding_length")
    num_heads = metadata.positive("llama.attention.head_count")
    num_kv_heads = metadata.positive("llama.attention.head_count_kv", num_heads)
    head_dim = metadata.positive("llama.attention.key_length", max(hidden_size // num_heads, 1))
    if num_heads % num_kv_heads or head_dim % 2:
        problem = f"{num_heads} heads of {head_dim} over {num_kv_heads} KV heads"
        raise CorruptModel(metadata.path, 0, problem)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.positive(key, head_dim) != head_dim:
            feature = f"{key} {metadata.integer(key)} and heads of {head_dim}"
            raise UnsupportedModel(metadata.path, feature, "equal ones")
    return ModelConfig(
        architecture=architecture,
        num_layers=metadata.positive("llama.block_count"),
        hidden_size=hidden_size,
        intermediate_size=metadata.positive("llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=metadata.number("llama.rope.freq_base", 10000.0),
        rms_norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        max_context_tokens=metadata.positive("llama.context_length"),
        vocab_size=len(tokens),
        tie_embeddings="output.weight" not in file.tensors,
        eos_token_ids=(eos_token_id,),
        bos_token=tokens[bos_token_id],
        eos_token=tokens[eos_token_id],
    )


def _refuse_variants(file: GgufFile, metadata: Metadata) -> None:
    for key, harmless in HARMLESS_VALUES.items():
        value = file.metadata.get(f"{ARCHITECTURE}.{key}")
        if value is not None and value not in harmless:
            feature = f"{ARCHITECTURE}.{key} = {value!r}"
            raise UnsupportedModel(metadata.path, feature, f"{key} absent or {harmless[0]!r}")
    num_files = metadata.integer("split.count", 1)
    if num_files > 1:
        raise UnsupportedModel(metadata.path, f"{num_files} parts", "models in one file")
