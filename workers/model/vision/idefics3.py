"""The vision encoder of Idefics3 and SmolVLM, and its connector to the text model.

`embed_tiles` is plain torch that gradients flow through, so that training and serving compute the same.
Sources: Idefics3 (Laurençon et al. 2024), section 3; positions by fraction of the picture: NaViT (Dehghani et al. 2023),
section 2.1.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray
from PIL import Image

from workers.api import ImageReduction
from workers.embeddings.kept import KeptEmbeddings
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.merging import key_places, merge_windows
from workers.model.vision.plan import ImagePlan

#: Places in a picture stay below 1 by this, as in transformers.
PLACE_MARGIN = 1e-6


class Idefics3Encoder:
    """See VisionEncoder. Holds no state between calls."""

    def __init__(self, config: Idefics3Vision, weights: Mapping[str, torch.Tensor]) -> None:
        """weights: those whose names begin with "vision.", fp32 on a CPU, or all of one dtype on a GPU."""
        self.config = config
        self._weights = weights
        table = weights["vision.position_embedding"]
        # By the CPU for all devices: what rounding does to the places is a part of the model.
        self._position_ids = position_ids(config, torch.device("cpu")).to(table.device)
        values = np.arange(256)[:, None] * config.rescale_factor
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        #: What each value of red, green and blue becomes, [256, 3]: rounded after each step as the processor does it.
        self._pixel_values: NDArray[np.float32] = (values.astype(np.float32) - mean) / std

    def prepare(self, image: NDArray[np.uint8], plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        """See VisionEncoder; each is [3, tile_size, tile_size] fp32. The picture is resized anew in each call."""
        config = self.config
        size = config.tile_size
        rows, cols = config.grid(plan.width, plan.height)
        resized = _resize(Image.fromarray(image), config.resized(plan.width, plan.height), config)
        whole = _resize(resized, (cols * size, rows * size), config)
        prepared = []
        for tile in tiles:
            if tile == len(plan.tiles) - 1:
                # The global view is made of what was cut, not of the picture as it came.
                view = _resize(whole, (size, size), config)
            else:
                left, top = tile % cols * size, tile // cols * size
                view = whole.crop((left, top, left + size, top + size))
            prepared.append(self._pixels(view))
        return prepared

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See VisionEncoder."""
        return list(self.embed(torch.stack(list(pixels)))) if pixels else []

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of tiles in one tensor, [num_tiles, 3, tile_size, tile_size], on the device of the weights and of any floating type;
        returns [num_tiles, tile_embeddings, text_hidden_size] of the dtype of the weights. On a GPU nothing is waited for.
        """
        return embed_tiles(self.config, self._weights, pixels, self._position_ids)

    @torch.inference_mode()
    def encode_reduced(
        self, pixels: torch.Tensor, reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        """See VisionEncoder. Squares are merged after the first layer, so the others compute fewer patches.

        The keys are those that get most attention in the last layer, from all patches, since there is no class token.
        """
        config, weights = self.config, self._weights
        hidden = _embed_patches(config, weights, pixels[None], self._position_ids)
        places = torch.arange(config.tile_embeddings, device=pixels.device)
        attention = torch.empty(0)
        for i in range(config.num_layers):
            if i == config.num_layers - 1:
                attention = _attention_received(config, weights, f"vision.layers.{i}", hidden)
            hidden = _layer(config, weights, f"vision.layers.{i}", hidden)
            if i == 0:
                squares, places = merge_windows(_squares(config, hidden)[0], reduction.merge_threshold)
                # From here on the patches of a square are neighbours.
                hidden = squares.flatten(0, 1)[None]
                if i == config.num_layers - 1:
                    attention = _squares(config, attention[None, :, None])[0][places].flatten()
        hidden = _norm(config, weights, "vision.norm", hidden)
        embeddings = F.linear(hidden.view(len(places), -1), weights["vision.projection"])
        is_key = key_places(attention.view(len(places), -1).sum(dim=1), reduction.key_fraction)
        return embeddings, KeptEmbeddings(tuple(places.tolist()), tuple(is_key.tolist()))

    def _pixels(self, view: Image.Image) -> torch.Tensor:
        red_green_blue = np.moveaxis(np.asarray(view), -1, 0)
        channels = [np.take(self._pixel_values[:, i], channel) for i, channel in enumerate(red_green_blue)]
        return torch.from_numpy(np.stack(channels))


def embed_tiles(
    config: Idefics3Vision,
    weights: Mapping[str, torch.Tensor],
    pixels: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings of tiles. Differentiable; any device and floating type.

    weights: by the names of the converted file, "vision." and what `workers.model.hf_idefics3` lists.
    pixels: [num_tiles, 3, tile_size, tile_size]. places: what `position_ids` returns, where it is known.
    Returns [num_tiles, tile_embeddings, text_hidden_size].
    """
    if places is None:
        places = position_ids(config, pixels.device)
    hidden = _embed_patches(config, weights, pixels, places)
    for i in range(config.num_layers):
        hidden = _layer(config, weights, f"vision.layers.{i}", hidden)
    hidden = _norm(config, weights, "vision.norm", hidden)
    return F.linear(_squares(config, hidden).flatten(2), weights["vision.projection"])


def position_ids(config: Idefics3Vision, device: torch.device) -> torch.Tensor:
    """Row of the table of positions for each patch of a tile, [tile_patches ** 2] int64.

    The table is for position_side x position_side patches; each patch takes the row of where in the picture it lies.
    Rounding makes some take their neighbour's, so the operations are those of transformers, in their order.
    """
    side = config.position_side
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)
    step = 1.0 / torch.tensor(config.tile_patches, device=device)
    places = torch.arange(config.tile_patches, dtype=torch.float32, device=device) * step
    buckets = torch.bucketize(places.clamp(max=1.0 - PLACE_MARGIN), boundaries, right=True)
    return (buckets[:, None] * side + buckets).flatten()


def _resize(image: Image.Image, size: tuple[int, int], config: Idefics3Vision) -> Image.Image:
    return image.resize(size, config.resample)


def _embed_patches(
    config: Idefics3Vision, weights: Mapping[str, torch.Tensor], pixels: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """What the first layer takes, [num_tiles, tile_patches ** 2, hidden_size]."""
    kernel = weights["vision.patch_embedding"].flatten(1)
    patches = _patches(config, pixels).to(kernel.dtype)
    hidden = F.linear(patches, kernel, weights["vision.patch_embedding_bias"])
    positions: torch.Tensor = weights["vision.position_embedding"][places]
    return hidden + positions


def _patches(config: Idefics3Vision, pixels: torch.Tensor) -> torch.Tensor:
    """[num_tiles, tile_patches ** 2, 3 * patch_size ** 2]; pixels beyond the last whole patch are left out."""
    patch, side = config.patch_size, config.tile_patches
    num_tiles, num_channels = pixels.shape[:2]
    whole = pixels[:, :, : side * patch, : side * patch]
    split = whole.reshape(num_tiles, num_channels, side, patch, side, patch)
    # [num_tiles, row, column, channel, patch, patch]
    return split.permute(0, 2, 4, 1, 3, 5).reshape(num_tiles, side**2, -1)


def _layer(
    config: Idefics3Vision, weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor
) -> torch.Tensor:
    """[num_tiles, num_patches, hidden_size]."""
    query, key, value = _query_key_value(config, weights, name, hidden)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden = hidden + _linear(weights, f"{name}.attention_out", attended)
    normed = _norm(config, weights, f"{name}.mlp_norm", hidden)
    inner = F.gelu(_linear(weights, f"{name}.up", normed), approximate="tanh")
    return hidden + _linear(weights, f"{name}.down", inner)


def _query_key_value(
    config: Idefics3Vision, weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor
) -> torch.Tensor:
    """[3, num_tiles, num_heads, num_patches, head_dim]."""
    normed = _norm(config, weights, f"{name}.attention_norm", hidden)
    qkv = _linear(weights, f"{name}.qkv", normed).view(*hidden.shape[:2], 3, config.num_heads, -1)
    return qkv.permute(2, 0, 3, 1, 4)


def _attention_received(
    config: Idefics3Vision, weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor
) -> torch.Tensor:
    """How much all patches of one tile attend to each in this layer, mean of heads and patches, [num_patches]."""
    query, key, _ = _query_key_value(config, weights, name, hidden)
    scores: torch.Tensor = (query @ key.transpose(-1, -2)).float() / config.head_dim**0.5
    return scores.softmax(dim=-1).mean(dim=(0, 1, 2))


def _squares(config: Idefics3Vision, hidden: torch.Tensor) -> torch.Tensor:
    """The patches of each square side by side, [num_tiles, tile_embeddings, scale_factor ** 2, hidden_size]."""
    scale, num_tiles = config.scale_factor, len(hidden)
    side = config.tile_patches // scale
    squares = hidden.view(num_tiles, side, scale, side, scale, -1).transpose(2, 3)
    # [num_tiles, row, column, row in the square, column in the square, hidden_size]
    return squares.reshape(num_tiles, side**2, scale**2, -1)


def _norm(
    config: Idefics3Vision, weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor
) -> torch.Tensor:
    return F.layer_norm(
        hidden, hidden.shape[-1:], weights[name], weights[f"{name}_bias"], config.layer_norm_eps
    )


def _linear(weights: Mapping[str, torch.Tensor], name: str, values: torch.Tensor) -> torch.Tensor:
    return F.linear(values, weights[name], weights[f"{name}_bias"])
