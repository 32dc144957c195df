"""The shape of a KV cache as both ends of a transfer must agree on it. Pure."""

from dataclasses import dataclass, fields

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What the bytes of a block mean.

    A block holds `block_size` tokens of K and V over all layers; in a chunk its bytes are ordered
    [layer, K then V, block, token, kv head, head_dim].
    """

    #: SHA-256 of the model's weights and configuration, hexadecimal.
    model_digest: str
    #: A key of DTYPE_BYTES.
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    #: Rotary embedding and its scaling, for example "rope:theta=100000".
    position_encoding: str

    def chunk_bytes(self, *, num_layers: int, num_blocks: int) -> int:
        """Payload of a chunk that covers these many layers and blocks."""
        per_token = 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]
        return num_layers * num_blocks * self.block_size * per_token

    @property
    def block_bytes(self) -> int:
        """One block over all layers."""
        return self.chunk_bytes(num_layers=self.num_layers, num_blocks=1)


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one possibly partly filled.

    num_tokens >= 0; block_size >= 1 (tokens per block).
    Source: PagedAttention block table (vLLM, SOSP'23, section 4).
    """
    return -(-num_tokens // block_size)


def incompatibility(sender: KvLayout, receiver: KvLayout) -> str | None:
    """Why KV of `sender` may not be written into a cache of `receiver`; None when it may."""
    differences = [
        f"{field.name} is {ours!r} at the sender and {theirs!r} at the receiver"
        for field in fields(KvLayout)
        if (ours := getattr(sender, field.name)) != (theirs := getattr(receiver, field.name))
    ]
    return "; ".join(differences) or None
