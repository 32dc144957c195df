"""Qwen2.5-VL's vision encoder. Inference only, on the device of the weights.

Patches stay in the order of the embeddings that they become: square by square of merge_size x merge_size. Windows are
tables of indices into them, so that nothing is put in another order and back.
Source: Qwen2.5-VL (Bai et al. 2025), section 2.1.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray
from PIL import Image

from phasewise_kernels.rms_norm.op import rms_norm
from phasewise_kernels.swiglu.op import swiglu
from workers.api import ImageReduction
from workers.embeddings.kept import KeptEmbeddings
from workers.errors import ImageRejected
from workers.model.vision.plan import ImagePlan
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

NORM_EPS = 1e-6
NUM_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, from the weights that `workers.model.convert` names."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    attention_out: torch.Tensor
    attention_out_bias: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor


#: Who attends to whom: the patches of one row of a table do, to each other. One table per length of row,
#: [num_segments, length] int64; each patch is in one row of one table.
_Segments = list[torch.Tensor]


class Qwen25Encoder:
    """See VisionEncoder. Holds no state between calls."""

    def __init__(self, config: Qwen25Vision, weights: Mapping[str, torch.Tensor]) -> None:
        """weights: those whose names begin with "vision.", fp32 on a CPU, or all of one dtype on a GPU."""
        self.config = config
        kernel = weights["vision.patch_embedding"].view(
            config.hidden_size, NUM_CHANNELS, config.temporal_patch_size, config.patch_size**2
        )
        # A still picture is the same in all frames of a patch, so the kernel's frames can be summed beforehand.
        self._patch_embedding = kernel.sum(dim=2, dtype=torch.float32).to(kernel.dtype).flatten(1)
        self._layers = [
            _Layer(**{name: weights[f"vision.layers.{i}.{name}"] for name in _Layer.__dataclass_fields__})
            for i in range(config.num_layers)
        ]
        self._merger = {
            name: weights[f"vision.merger_{name}"] for name in ("norm", "in", "in_bias", "out", "out_bias")
        }
        exponents = torch.arange(0, config.head_dim // 2, 2, dtype=torch.float) / (config.head_dim // 2)
        #: Radians per patch, the same down and across, [head_dim / 4].
        self._inverse_frequencies: torch.Tensor = 1.0 / (config.rope_theta**exponents)

    def prepare(self, image: NDArray[np.uint8], plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        """Of the one tile that a picture is: its pixels, [3, height, width] fp32, after resizing."""
        return [self._pixels(image, plan) for _ in tiles]

    def encode_reduced(
        self, pixels: torch.Tensor, reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        """See VisionEncoder: always refused."""
        del pixels, reduction
        raise ImageRejected(
            "the pictures of Qwen2.5-VL cannot be reduced, only those of Idefics3 and SmolVLM; send it without "
            "image_reduction"
        )

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See VisionEncoder. Pictures of different sizes go through the layers together."""
        if not pixels:
            return []
        config = self.config
        square = config.square_size
        grids = [(one.shape[1] // square, one.shape[2] // square) for one in pixels]
        device = self._patch_embedding.device
        # First: a copy from the host waits for what is on the stream.
        cos, sin = (one.to(device) for one in self._rotation(grids))
        pictures, windows = (
            [table.to(device) for table in _segments(config, grids, side)]
            for side in (0, config.window_embeddings)
        )
        hidden = torch.cat([self._embed_patches(one) for one in pixels])
        # What a layer's MLP adds to `hidden`: the next norm does that on its way.
        added: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            segments = pictures if i in config.full_attention_layers else windows
            normed = rms_norm(hidden, layer.attention_norm, NORM_EPS, added=added)
            attended = self._attend(layer, normed, (cos, sin), segments)
            projected = F.linear(attended, layer.attention_out, layer.attention_out_bias)
            normed = rms_norm(hidden, layer.mlp_norm, NORM_EPS, added=projected)
            gated = swiglu(F.linear(normed, layer.gate_up, layer.gate_up_bias))
            added = F.linear(gated, layer.down, layer.down_bias)
        merged = self._merge(rms_norm(hidden, self._merger["norm"], NORM_EPS, added=added))
        return list(torch.split_with_sizes(merged, [rows * cols for rows, cols in grids]))

    def _pixels(self, image: NDArray[np.uint8], plan: ImagePlan) -> torch.Tensor:
        config, tile = self.config, plan.tiles[0]
        size = (tile.cols * config.patch_size, tile.rows * config.patch_size)
        resized = np.asarray(Image.fromarray(image).resize(size, config.resample))
        # Scaled in float64 and rounded before the rest, as the processor does it.
        scaled = (resized.astype(np.float64) * config.rescale_factor).astype(np.float32)
        normed = (scaled - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normed.transpose(2, 0, 1)))

    def _embed_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_patches, hidden_size]."""
        patch, merge = self.config.patch_size, self.config.merge_size
        _, height, width = pixels.shape
        rows, cols = height // patch, width // patch
        patches = pixels.view(NUM_CHANNELS, rows // merge, merge, patch, cols // merge, merge, patch)
        # [square rows, square cols, merge, merge, channel, patch, patch]
        flat = patches.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * cols, -1)
        return F.linear(flat.to(self._patch_embedding.dtype), self._patch_embedding)

    def _rotation(self, grids: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each patch, each [num_patches, 1, head_dim]: half of the pairs turn by its row, half by its column."""
        merge = self.config.merge_size
        angles = []
        for rows, cols in grids:
            axes = torch.meshgrid(torch.arange(rows * merge), torch.arange(cols * merge), indexing="ij")
            down, across = (axis.view(rows, merge, cols, merge).transpose(1, 2).flatten() for axis in axes)
            both = [axis[:, None].float() * self._inverse_frequencies for axis in (down, across)]
            angles.append(torch.cat((*both, *both), dim=-1))
        packed = torch.cat(angles)[:, None]
        return packed.cos(), packed.sin()

    def _attend(
        self,
        layer: _Layer,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        segments: _Segments,
    ) -> torch.Tensor:
        """[num_patches, hidden_size]."""
        num_patches, num_heads = len(normed), self.config.num_heads
        query, key, value = (
            F.linear(normed, layer.qkv, layer.qkv_bias).view(num_patches, 3, num_heads, -1).unbind(1)
        )
        query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        attended = torch.empty_like(query)
        for table in segments:
            # [num_segments, length, num_heads, head_dim], with heads before the length for torch.
            q, k, v = (heads[table].transpose(1, 2) for heads in (query, key, value))
            attended[table] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return attended.view(num_patches, -1)

    def _merge(self, normed: torch.Tensor) -> torch.Tensor:
        """[num_patches / merge_size ** 2, text_hidden_size]: the patches of each square become one embedding."""
        squares = normed.view(-1, normed.shape[1] * self.config.merge_size**2)
        inner = F.gelu(F.linear(squares, self._merger["in"], self._merger["in_bias"]))
        return F.linear(inner, self._merger["out"], self._merger["out_bias"])


def _segments(config: Qwen25Vision, grids: Sequence[tuple[int, int]], side: int) -> _Segments:
    """Windows of side x side squares, smaller at the right and lower edges; side 0: whole pictures."""
    by_length: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    first = 0
    for rows, cols in grids:
        squares = torch.arange(first, first + rows * cols).view(rows, cols)
        first += rows * cols
        height, width = side or rows, side or cols
        for top, left in product(range(0, rows, height), range(0, cols, width)):
            window = squares[top : top + height, left : left + width]
            by_length[window.numel()].append(window.flatten())
    patches = torch.arange(config.merge_size**2)
    return [
        (torch.stack(windows)[:, :, None] * len(patches) + patches).flatten(1)
        for windows in by_length.values()
    ]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of each head, in fp32. heads: [num_patches, num_heads, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
