"""The shape of a KV cache as both ends of a transfer must agree on it. Pure."""

from dataclasses import dataclass

from phasewise_kernels.kv_int4.rows import row_bytes

#: What a pool may keep numbers in, and bits of each. float8_e4m3fn is stored without a scale: values beyond 448 saturate. int4 is rows of
#: `phasewise_kernels/kv_int4`, whose scales come on top.
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "int4": 4}
INT4 = "int4"


def check_dtype(name: str) -> None:
    """Raises ValueError for what is no key of DTYPE_BITS."""
    if name not in DTYPE_BITS:
        raise ValueError(f"dtype {name!r} is none of {', '.join(DTYPE_BITS)}")


def head_bytes(dtype: str, head_dim: int) -> int:
    """K or V of one head of a token. dtype: a key of DTYPE_BITS."""
    return row_bytes(head_dim) if dtype == INT4 else head_dim * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What the bytes of a block pool mean.

    A pool is [num_layers, 2 (K, V), num_blocks, block_size, heads, head_dim], where `heads` are those of one
    tensor-parallel rank: [head_lo, head_hi) of the model's `num_kv_heads`. Of int4 the last is the bytes of a row.
    On the wire KV is ordered [layer, K then V, token, head, head_dim], whatever the blocks of either side are.
    """

    #: SHA-256 of the model's weights and configuration, hexadecimal.
    model_digest: str
    #: A key of DTYPE_BITS.
    dtype: str
    block_size: int
    num_layers: int
    #: Of the model, over all ranks.
    num_kv_heads: int
    head_dim: int
    #: Rotary embedding and its scaling, for example "rope:theta=100000".
    position_encoding: str
    #: Heads that this pool holds; (0, 0) stands for all.
    head_lo: int = 0
    head_hi: int = 0
    #: What the model's weights are kept in where this KV is computed, as `workers.api.WeightDtype` names it; "" where that says nothing.
    weight_dtype: str = ""

    @property
    def heads(self) -> tuple[int, int]:
        """[lo, hi) of the model's KV heads that this pool holds."""
        return (self.head_lo, self.head_hi) if self.head_hi > 0 else (0, self.num_kv_heads)

    @property
    def num_heads(self) -> int:
        """Heads that this pool holds."""
        lo, hi = self.heads
        return hi - lo

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer, of the heads here."""
        return 2 * self.num_heads * head_bytes(self.dtype, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """One block over all layers."""
        return self.num_layers * self.block_size * self.token_bytes


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one possibly partly filled.

    num_tokens >= 0; block_size >= 1 (tokens per block).
    Source: PagedAttention block table (vLLM, SOSP'23, section 4).
    """
    return -(-num_tokens // block_size)


def incompatibility(sender: KvLayout, receiver: KvLayout) -> str | None:
    """Why KV of `sender` may not be written into a cache of `receiver`; None when it may.

    Block size, dtypes and head range may differ: what arrives is put into the receiver's blocks, converted, and
    taken as far as the heads of both overlap. Another model, or another meaning of its K and V, can never be used.
    """
    must_agree = ("model_digest", "num_layers", "num_kv_heads", "head_dim", "position_encoding")
    differences = [
        f"{name} is {ours!r} at the sender and {theirs!r} at the receiver"
        for name in must_agree
        if (ours := getattr(sender, name)) != (theirs := getattr(receiver, name))
    ]
    if not differences and shared_heads(sender, receiver) is None:
        differences = [
            f"the sender has KV heads {list(sender.heads)} and the receiver {list(receiver.heads)}"
        ]
    return "; ".join(differences) or None


def inexactness(sender: KvLayout, receiver: KvLayout) -> str | None:
    """Why KV of `sender`, which may be written into a cache of `receiver`, is near to what that computes and not the same; None when it is."""
    if sender.weight_dtype != receiver.weight_dtype:
        theirs, ours = (one.weight_dtype or "others" for one in (sender, receiver))
        return f"is computed with weights in {theirs}, and KV here with weights in {ours}"
    bits = DTYPE_BITS[sender.dtype]
    # What fp8 has rounded is not what a receiver in four bits would pack, either.
    if sender.dtype != receiver.dtype and (bits < 16 or bits < DTYPE_BITS[receiver.dtype]):
        return f"is in {sender.dtype}, and KV here in {receiver.dtype}"
    return None


def shared_heads(sender: KvLayout, receiver: KvLayout) -> tuple[int, int] | None:
    """[lo, hi) of the model's heads that both hold; None when there are none."""
    lo = max(sender.heads[0], receiver.heads[0])
    hi = min(sender.heads[1], receiver.heads[1])
    return (lo, hi) if lo < hi else None
