"""Which part of a model each rank of a tensor-parallel group holds. Pure.

Rank r of n has n-th parts of the query heads with the KV heads that they read, and of the inner values of the MLP:

    qkv, gate_up             rows of each matrix that is fused in them, and of their biases
    attention_out, down      columns: each rank computes a summand of the result; its bias is added by rank 0 alone
    lm_head                  rows, n-th parts of the vocabulary, the last one perhaps smaller
    embedding, norms         whole

A model with fewer KV heads than ranks has each of them on several ranks. The embedding is whole on each rank: to look
rows up in a part would take one more collective in each step, and saves (n - 1) / n of what is a fifteenth of
an 8B model. A tied LM head is a view of its rows.
Source: Megatron-LM (Shoeybi et al. 2019), section 3, for columns after rows; the embedding is cut there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from workers.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of how many: 0 <= index < degree."""

    index: int
    degree: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges [lo, hi) of a tensor along one dimension, one after another."""

    dim: int
    ranges: tuple[tuple[int, int], ...]


#: Tensors that are held whole.
WHOLE = Cut(0, ())


def problem(config: ModelConfig, degree: int) -> str | None:
    """Why a model cannot be cut for so many ranks; None when it can."""
    if config.num_heads % degree:
        return f"{config.num_heads} attention heads"
    if config.num_kv_heads % degree and degree % config.num_kv_heads:
        return f"{config.num_kv_heads} KV heads"
    if config.intermediate_size % degree:
        return f"an MLP of {config.intermediate_size} inner values"
    return None


def degrees(config: ModelConfig) -> tuple[int, ...]:
    """All that `problem` has nothing against, ascending."""
    return tuple(one for one in range(1, config.num_heads + 1) if problem(config, one) is None)


def kv_heads(num_kv_heads: int, rank: Rank) -> tuple[int, int]:
    """[lo, hi) of the KV heads that this rank holds, at least one."""
    lo = rank.index * num_kv_heads // rank.degree
    return lo, lo + max(1, num_kv_heads // rank.degree)


def rank_config(config: ModelConfig, rank: Rank) -> ModelConfig:
    """The model that this rank computes. Its LM head is a tensor of its own, of a part of the vocabulary."""
    lo, hi = kv_heads(config.num_kv_heads, rank)
    return replace(
        config,
        num_heads=config.num_heads // rank.degree,
        num_kv_heads=hi - lo,
        intermediate_size=config.intermediate_size // rank.degree,
        tie_embeddings=False,
    )


def vocab_part(vocab_size: int, degree: int) -> int:
    """Rows of the LM head of each rank but the last, which may have fewer."""
    return -(-vocab_size // degree)


def cut(name: str, config: ModelConfig, rank: Rank) -> Cut | None:
    """What this rank holds of a tensor that `convert.output_shapes` names; None: nothing."""
    match name.rpartition(".")[2]:
        case "qkv" | "qkv_bias":
            return Cut(0, _qkv_ranges(config, rank))
        case "gate_up" | "gate_up_bias":
            lo, hi = _part(config.intermediate_size, rank)
            return Cut(0, ((lo, hi), (config.intermediate_size + lo, config.intermediate_size + hi)))
        case "attention_out":
            return Cut(1, (_part(config.num_heads * config.head_dim, rank),))
        case "down":
            return Cut(1, (_part(config.intermediate_size, rank),))
        case "attention_out_bias" | "down_bias":
            return WHOLE if rank.index == 0 else None
        case "lm_head":
            return Cut(0, (vocab_rows(config.vocab_size, rank),))
        case "embedding" | "norm" | "attention_norm" | "mlp_norm" | "q_norm" | "k_norm":
            return WHOLE
    raise ValueError(f"no tensor of a model is called {name}")


def vocab_rows(vocab_size: int, rank: Rank) -> tuple[int, int]:
    """[lo, hi) of the rows of the LM head; a vocabulary of few tokens may leave none for the last ranks."""
    part = vocab_part(vocab_size, rank.degree)
    return min(vocab_size, rank.index * part), min(vocab_size, (rank.index + 1) * part)


def cut_shape(shape: tuple[int, ...], one: Cut) -> tuple[int, ...]:
    """Of what is left of a tensor of this shape."""
    if one == WHOLE:
        return shape
    size = sum(hi - lo for lo, hi in one.ranges)
    return (*shape[: one.dim], size, *shape[one.dim + 1 :])


def cuts(shapes: dict[str, tuple[int, ...]], config: ModelConfig, rank: Rank) -> Iterator[tuple[str, Cut]]:
    """Of all tensors that this rank holds, by name."""
    for name in shapes:
        found = cut(name, config, rank)
        if found is not None:
            yield name, found


def _part(size: int, rank: Rank) -> tuple[int, int]:
    part = size // rank.degree
    return rank.index * part, (rank.index + 1) * part


def _qkv_ranges(config: ModelConfig, rank: Rank) -> tuple[tuple[int, int], ...]:
    size = config.head_dim
    query_rows, kv_rows = config.num_heads * size, config.num_kv_heads * size
    lo, hi = kv_heads(config.num_kv_heads, rank)
    keys = query_rows + lo * size, query_rows + hi * size
    return _part(query_rows, rank), keys, (keys[0] + kv_rows, keys[1] + kv_rows)
