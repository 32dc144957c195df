"""The frozen language model, differentiable in its embeddings: what the encoder is trained through.

The arithmetic is that of `workers.model.llama` without a cache; matrices may be bf16, the residual stream is fp32.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from workers.model.config import ModelConfig, RopeScaling


class FrozenLlama:
    """Weights as `workers.model.prepare.load_weights` gives them, without gradients."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        is_compiled: bool = False,
    ) -> None:
        if not config.tie_embeddings or config.rope.scaling is not RopeScaling.NONE or config.has_qkv_bias:
            raise ValueError("only a plain Llama with tied embeddings is written here")
        self.config, self.dtype = config, dtype
        self.embedding = weights["embedding"].to(device)
        self._lm_head = self.embedding.to(dtype)
        self._norm = weights["norm"].to(device)
        self._layers = [
            tuple(
                weights[f"layers.{i}.{name}"].to(device, torch.float32 if name.endswith("norm") else dtype)
                for name in ("attention_norm", "qkv", "attention_out", "mlp_norm", "gate_up", "down")
            )
            for i in range(config.num_layers)
        ]
        half = config.head_dim // 2
        self._frequencies = config.rope.theta ** (-torch.arange(half, device=device) / half)
        self._layer = torch.compile(self._layer_of, dynamic=False) if is_compiled else self._layer_of

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """embeds: [batch, length, hidden_size] fp32; positions: [batch, length].

        mask: [batch, length, length] bool, row sees column; no row is empty. Returns like `embeds`, normed.
        """
        angles = positions[:, None, :, None] * self._frequencies
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        hidden, seen = embeds, mask[:, None]
        for layer in self._layers:
            hidden = self._layer(hidden, cos, sin, seen, *layer)
        return F.rms_norm(hidden, hidden.shape[-1:], self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden_size], of `hidden`. Returns [num_rows, vocab_size]."""
        return hidden.to(self.dtype) @ self._lm_head.T

    def _layer_of(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        attention_norm: torch.Tensor,
        qkv: torch.Tensor,
        attention_out: torch.Tensor,
        mlp_norm: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        config, dtype, size = self.config, self.dtype, hidden.shape[-1:]
        normed = F.rms_norm(hidden, size, attention_norm, config.rms_norm_eps).to(dtype)
        heads = (normed @ qkv.T).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        query, key, value = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        groups = config.num_heads // config.num_kv_heads
        key = _rotated(key, cos, sin).repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        attended = F.scaled_dot_product_attention(_rotated(query, cos, sin), key, value, attn_mask=mask)
        hidden = hidden + attended.transpose(1, 2).flatten(2) @ attention_out.T
        normed = F.rms_norm(hidden, size, mlp_norm, config.rms_norm_eps).to(dtype)
        gate, up = (normed @ gate_up.T).chunk(2, dim=-1)
        return hidden + (F.silu(gate) * up) @ down.T


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
