"""The forward pass of a Llama-family model over a paged KV cache. Inference only, fp32 on the CPU.

Attention over the cache is `phasewise_kernels.paged_attention`; the rest is here, in the order it runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention
from workers.model.config import ModelConfig

#: See `_linear`. By benchmarks/engine/decode_step.py on one AVX2 core; from 6 rows on there is no gain, or a loss.
MAX_FEW_ROWS = 5


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step: those of sequence 0, then of sequence 1, and so on. At least one token."""

    #: [num_tokens] int64.
    token_ids: torch.Tensor
    #: Place of each token in its sequence, [num_tokens] int64.
    positions: torch.Tensor
    #: block_id * block_size + offset where K and V of each token are written, [num_tokens] int64.
    slots: torch.Tensor
    #: Per sequence: its blocks in order; the tokens of this step; all tokens, those of this step included.
    block_tables: Sequence[Sequence[int]]
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    #: Which tokens need logits, [num_rows] int64 indices into token_ids.
    logit_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, under the names that `workers.model.convert` gives them."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    attention_out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Llama:
    """A model whose weights are in memory. Holds no state between steps: that is in the KV cache."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self._embedding = weights["embedding"]
        self._layers = [
            _Layer(**{name: weights[f"layers.{i}.{name}"] for name in _Layer.__dataclass_fields__})
            for i in range(config.num_layers)
        ]
        self._norm = weights["norm"]
        self._lm_head = weights["embedding" if config.tie_embeddings else "lm_head"]
        self._inverse_frequencies = _inverse_frequencies(config)

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """[num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]."""
        config = self.config
        return (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: torch.Tensor,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the tokens of `batch`, write their K and V, and return logits.

        kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] fp32, contiguous.
        on_layers(layer_lo, layer_hi) is called as soon as K and V of layers layer_lo..layer_hi-1 are in
        the cache, every layer_group_size layers and after the last; None means all layers at once.
        Returns [len(logit_rows), vocab_size] fp32.
        """
        config = self.config
        attention = AttentionBatch.build(
            block_tables=batch.block_tables,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            block_size=kv_cache.shape[3],
        )
        angles = torch.outer(batch.positions.float(), self._inverse_frequencies)
        # [num_tokens, 1, head_dim]: the same for all heads. Both halves of a head turn by the same angles.
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        rope = angles.cos(), angles.sin()
        hidden = F.embedding(batch.token_ids, self._embedding)
        group_start = 0
        for i, layer in enumerate(self._layers):
            attended = self._attend(layer, hidden, rope, kv_cache[i], batch.slots, attention)
            hidden = hidden + attended
            hidden = hidden + self._mlp(layer, hidden)
            num_computed = i + 1
            if num_computed - group_start == layer_group_size or num_computed == config.num_layers:
                if on_layers is not None:
                    on_layers(group_start, num_computed)
                group_start = num_computed
        rows = _rms_norm(hidden[batch.logit_rows], self._norm, config.rms_norm_eps)
        return _linear(rows, self._lm_head)

    def _attend(
        self,
        layer: _Layer,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        attention: AttentionBatch,
    ) -> torch.Tensor:
        """Attention block without the residual; hidden: [num_tokens, hidden_size]; kv_cache: one layer's."""
        config = self.config
        num_tokens = hidden.shape[0]
        normed = _rms_norm(hidden, layer.attention_norm, config.rms_norm_eps)
        fused = _linear(normed, layer.qkv).view(num_tokens, -1, config.head_dim)
        # Query and key heads are neighbours, so one rotation serves both.
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = _rotate(fused[:, :num_rotated], *rope)
        query, key = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        k_cache, v_cache = kv_cache[0], kv_cache[1]
        k_cache.flatten(0, 1).index_copy_(0, slots, key)
        v_cache.flatten(0, 1).index_copy_(0, slots, fused[:, num_rotated:])
        attended = paged_attention(query, k_cache, v_cache, attention)
        return _linear(attended.flatten(1), layer.attention_out)

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        """SwiGLU block without the residual."""
        normed = _rms_norm(hidden, layer.mlp_norm, self.config.rms_norm_eps)
        gate, up = _linear(normed, layer.gate_up).chunk(2, dim=-1)
        return _linear(F.silu(gate) * up, layer.down)


def _linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight.T, contiguous; rows: [num_rows, in_size], weight: [out_size, in_size].

    A step of a few sequences reads every weight for a few rows. MKL does that up to twice as fast with
    the weight on the left, for 2 to MAX_FEW_ROWS rows and if the weight is not wider than high.
    """
    out_size, in_size = weight.shape
    if 2 <= rows.shape[0] <= MAX_FEW_ROWS and out_size >= in_size:
        return torch.mm(weight, rows.t()).t().contiguous()
    return F.linear(rows, weight)


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to a root mean square of 1, then by weight. Source: Zhang and Sennrich 2019."""
    return weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps))


def _inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] fp32.

    In fp32 and by the same steps as in transformers, so that both round alike.
    Source: RoFormer (Su et al. 2021), section 3.2.2.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / (config.rope_theta**exponents)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE. heads: [num_tokens, any number of heads, head_dim]; cos, sin: [num_tokens, 1, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
