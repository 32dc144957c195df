"""Rotary position embeddings: the angles of each token. `phasewise_kernels.rope_write` turns heads by them.

In fp32 and by the same steps as in transformers, so that both round alike.
Sources: RoFormer (Su et al. 2021), section 3.2.2; YaRN (Peng et al. 2023), sections 3.1 to 3.4; Llama 3.1
(model card and reference code); NTK-aware scaling is described in YaRN's appendix A; Qwen2-VL (Wang et al. 2024),
section 2.1, for M-RoPE.
"""

import math

import torch

from workers.model.config import ModelConfig, RopeConfig, RopeScaling

#: What is added to the end of YaRN's ramp when it has no length.
MIN_RAMP = 0.001


class Rope:
    """cos and sin for the tokens of a step."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        """device: of the tokens' positions and of what comes out; the CPU when None."""
        self._rope = config.rope
        self._head_dim = config.head_dim
        self._inverse_frequencies = _inverse_frequencies(config.rope, config.head_dim).to(device)
        self._exponents = _exponents(config.head_dim).to(device)
        #: M-RoPE: the axis of each frequency, [head_dim / 2].
        axes = torch.arange(3).repeat_interleave(torch.tensor(config.rope.mrope_section or (0, 0, 0)))
        self._axes = axes.to(device)

    def cos_sin(
        self, positions: torch.Tensor, rope_lens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each [num_tokens, 1, head_dim] fp32: the same for all heads; both halves turn by the same angles.

        positions: [num_tokens] int64; with M-RoPE also [3, num_tokens], in time, height and width. rope_lens:
        [num_tokens] int64, the length of sequence that a token's frequencies are for, positions + 1 when None; it
        matters to dynamic scaling alone.
        """
        frequencies = self._inverse_frequencies[None, :]
        if self._rope.scaling is RopeScaling.DYNAMIC:
            frequencies = self._dynamic(positions + 1 if rope_lens is None else rope_lens)
        # [num_tokens, 1], or one position for each frequency.
        turned = positions[:, None] if positions.dim() == 1 else positions[self._axes].T
        angles = turned.float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self._rope.attention_factor != 1.0:
            cos, sin = cos * self._rope.attention_factor, sin * self._rope.attention_factor
        return cos, sin

    @property
    def can_move(self) -> bool:
        """Keys can be turned to other positions: the angles of a token depend on its position alone."""
        return self._rope.scaling is not RopeScaling.DYNAMIC and not self._rope.mrope_section

    def move(
        self, keys: torch.Tensor, old_positions: torch.Tensor, new_positions: torch.Tensor
    ) -> torch.Tensor:
        """Rotated keys as they would be at other positions, to the rounding of float32.

        keys: [num_tokens, num_kv_heads, head_dim] fp32, rotated for old_positions. Both positions: [num_tokens] int64.
        Returns the same shape. Raises ValueError when the angles depend on more than that.
        """
        if not self.can_move:
            raise ValueError(
                "keys cannot be moved: with dynamic scaling their angles depend on the prompt's length, with M-RoPE on "
                "the pictures before them"
            )
        frequencies = self._inverse_frequencies[None, :]
        # The difference of two angles that were rounded as `cos_sin` rounds them. No attention factor: keys have it.
        new, old = (positions[:, None].float() * frequencies for positions in (new_positions, old_positions))
        angles = new.double() - old.double()
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        first, second = keys.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _dynamic(self, rope_lens: torch.Tensor) -> torch.Tensor:
        """Inverse frequencies of each token, [num_tokens, head_dim / 2]."""
        rope, dim = self._rope, self._head_dim
        is_stretched = rope_lens > rope.original_context_tokens
        stretch = rope.factor * rope_lens.float() / rope.original_context_tokens - (rope.factor - 1)
        # Where it is not stretched `stretch` may be below 0, whose power is no number; it is not used there.
        theta = rope.theta * stretch.clamp(min=1.0) ** (dim / (dim - 2))
        stretched = 1.0 / (theta[:, None] ** self._exponents)
        return torch.where(is_stretched[:, None], stretched, self._inverse_frequencies)


def _exponents(head_dim: int) -> torch.Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] fp32; of DYNAMIC those without stretch."""
    plain: torch.Tensor = 1.0 / (rope.theta ** _exponents(head_dim))
    match rope.scaling:
        case RopeScaling.LINEAR:
            return plain / rope.factor
        case RopeScaling.YARN:
            return _yarn(rope, head_dim, plain)
        case RopeScaling.LLAMA3:
            return _llama3(rope, plain)
        case RopeScaling.NONE if rope.frequency_factors:
            return plain / torch.tensor(rope.frequency_factors)
        case RopeScaling.NONE | RopeScaling.DYNAMIC:
            return plain


def _yarn(rope: RopeConfig, head_dim: int, plain: torch.Tensor) -> torch.Tensor:
    """Fast dimensions as they are, slow ones divided by `factor`, and a ramp between."""
    first, last = (
        head_dim
        * math.log(rope.original_context_tokens / (num_turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
        for num_turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += MIN_RAMP
    dimensions = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((dimensions - first) / (last - first)).clamp(0, 1)
    slow = 1.0 / (rope.factor * rope.theta ** _exponents(head_dim))
    return slow * (1 - kept) + plain * kept


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Short wavelengths as they are, long ones divided by `factor`, and a mixture between."""
    wavelengths = 2 * math.pi / plain
    longest_kept = rope.original_context_tokens / rope.high_freq_factor
    shortest_divided = rope.original_context_tokens / rope.low_freq_factor
    share = (rope.original_context_tokens / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - share) * plain / rope.factor + share * plain
    scaled = torch.where(wavelengths > shortest_divided, plain / rope.factor, mixed)
    return torch.where(wavelengths < longest_kept, plain, scaled)
