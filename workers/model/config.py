"""The shape of a model, read from GGUF metadata and kept as JSON. Pure."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvtransfer.layout import KvLayout


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything but the weights that the forward pass and the gateway need to know."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_context_tokens: int
    vocab_size: int
    #: The LM head is the embedding table.
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: all query heads, then the K heads, then the V heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read what `to_json` wrote. Raises ValueError when it is not that."""
        values: Any = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("not a model configuration of this version")
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})

    def kv_layout(self, *, block_size: int, dtype: str, model_digest: str) -> KvLayout:
        """The layout of a KV cache of this model; dtype is a key of DTYPE_BYTES."""
        return KvLayout(
            model_digest=model_digest,
            dtype=dtype,
            block_size=block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            position_encoding=f"rope:theta={self.rope_theta:g}",
        )
