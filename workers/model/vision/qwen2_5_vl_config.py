"""Qwen2.5-VL's vision encoder: its shape, and how pictures are resized for it. Pure.

A picture of any size is one tile: it is resized to whole squares of merge_size x merge_size patches, with its aspect
ratio kept as well as that allows, and each square becomes one embedding. Source: Qwen2.5-VL (Bai et al. 2025), section 2.1.
"""

import math
from dataclasses import dataclass

from workers.errors import ImageRejected
from workers.model.vision.plan import ImagePlan, TilePlan

#: What the processor says of sides that differ more.
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class Qwen25Vision:
    """All but the weights that embeddings depend on, and what stands for a picture in a prompt."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    #: Pixels of a patch's side, and frames of a patch.
    patch_size: int
    temporal_patch_size: int
    #: Patches of the side of what one embedding is made of.
    merge_size: int
    #: Pixels of the side of the windows within which most layers attend.
    window_size: int
    #: The layers whose patches see the whole picture.
    full_attention_layers: tuple[int, ...]
    #: Size of an embedding.
    text_hidden_size: int
    image_token: str
    image_token_id: int
    start_token: str
    end_token: str
    #: Of a picture after resizing.
    min_pixels: int
    max_pixels: int
    #: Of red, green and blue, after `rescale_factor`.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    #: Pillow's number of the filter.
    resample: int
    rope_theta: float = 10000.0
    family: str = "qwen2_5_vl"

    def validate(self) -> None:
        """Raise ValueError, saying what is wrong, when no encoder can have this shape."""
        for name in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "patch_size", "temporal_patch_size",
            "merge_size", "text_hidden_size", "min_pixels", "max_pixels", "rescale_factor", "rope_theta",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"the vision encoder's {name} is {getattr(self, name)}, not above 0")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"a vision encoder of {self.hidden_size} in {self.num_heads} heads; each needs a multiple of 4"
            )
        if self.window_embeddings < 1:
            raise ValueError(
                f"vision windows of {self.window_size} pixels and squares of {self.square_size} pixels"
            )
        if not set(self.full_attention_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"vision layers {self.full_attention_layers} with full attention of {self.num_layers} layers"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"pictures with mean {self.mean} and std {self.std}, not three numbers each")
        if self.resample not in range(6):
            raise ValueError(f"a resampling filter {self.resample}, which Pillow has not")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"pictures of at least {self.min_pixels} and at most {self.max_pixels} pixels")

    @property
    def placeholder(self) -> str:
        """What chat templates write for a picture."""
        return f"{self.start_token}{self.image_token}{self.end_token}"

    @property
    def head_dim(self) -> int:
        """Of each head of the encoder."""
        return self.hidden_size // self.num_heads

    @property
    def square_size(self) -> int:
        """Pixels of the side of what one embedding is made of."""
        return self.patch_size * self.merge_size

    @property
    def max_tile_patches(self) -> int:
        """Patches of the largest picture."""
        return self.max_pixels // self.patch_size**2

    @property
    def window_embeddings(self) -> int:
        """Embeddings along the side of a window."""
        return self.window_size // self.merge_size // self.patch_size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels that a picture is resized to. Raises ImageRejected when none suits it."""
        longest, shortest = max(width, height), min(width, height)
        if shortest < 1 or longest / shortest > MAX_ASPECT_RATIO:
            raise ImageRejected(
                f"it has {width} x {height} pixels; this model takes sides of at least 1 pixel, one up to "
                f"{MAX_ASPECT_RATIO} times as long as the other. Crop it"
            )
        square = self.square_size
        new_width, new_height = round(width / square) * square, round(height / square) * square
        if new_width * new_height > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_width = max(square, math.floor(width / shrink / square) * square)
            new_height = max(square, math.floor(height / shrink / square) * square)
        elif new_width * new_height < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            new_width = math.ceil(width * stretch / square) * square
            new_height = math.ceil(height * stretch / square) * square
        return new_width, new_height

    def plan(self, width: int, height: int) -> ImagePlan:
        """How a picture of this many pixels stands in a prompt. Raises ImageRejected as `resized`."""
        new_width, new_height = self.resized(width, height)
        rows, cols = new_height // self.patch_size, new_width // self.patch_size
        grid = (1, rows // self.merge_size, cols // self.merge_size)
        num_embeddings = grid[1] * grid[2]
        text = f"{self.start_token}{self.image_token * num_embeddings}{self.end_token}"
        return ImagePlan(width, height, (TilePlan(rows, cols, num_embeddings),), text, grid)
