"""The vision encoder of Idefics3 and SmolVLM: its shape, and how pictures are cut into tiles for it. Pure.

A picture is resized to whole square tiles, each of which the encoder sees alone, and once more as a whole to one tile:
the global view. Each square of scale_factor x scale_factor patches of a tile becomes one embedding.
Sources: Idefics3 (Laurençon et al. 2024), section 3; SmolVLM (Marafioti et al. 2025), section 2.
"""

import math
from dataclasses import dataclass

from workers.model.vision.plan import ImagePlan, TilePlan

#: No side is larger after the first resizing, in pixels, as in the processor.
MAX_SIDE = 4096
#: Largest number of a filter of Pillow.
MAX_RESAMPLE = 5


@dataclass(frozen=True, slots=True)
class Idefics3Vision:
    """All but the weights that embeddings depend on, and what stands for a picture in a prompt."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    #: Pixels of a patch's side.
    patch_size: int
    #: Pixels of the side of the picture whose patches the table of positions is for.
    image_size: int
    #: Patches of the side of what one embedding is made of.
    scale_factor: int
    layer_norm_eps: float
    #: Size of an embedding.
    text_hidden_size: int
    image_token: str
    image_token_id: int
    #: Before each tile, and after the last one; may be empty.
    around_text: str
    #: Before the global view; may be empty.
    global_text: str
    #: A picture is cut into tiles; else its global view is all.
    is_tiled: bool
    #: Pixels that the longer side of a picture is resized to before it is cut.
    longest_edge: int
    #: Pixels of a tile's side.
    tile_size: int
    #: Of red, green and blue, after `rescale_factor`.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    #: Pillow's number of the filter.
    resample: int
    family: str = "idefics3"

    def validate(self) -> None:
        """Raise ValueError, saying what is wrong, when no encoder can have this shape."""
        for name in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "patch_size", "image_size", "scale_factor",
            "layer_norm_eps", "text_hidden_size", "longest_edge", "tile_size", "rescale_factor",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"the vision encoder's {name} is {getattr(self, name)}, not above 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"a vision encoder of {self.hidden_size} in {self.num_heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision patches of {self.patch_size} pixels in pictures of {self.image_size} pixels"
            )
        if self.tile_patches < 1 or self.tile_patches % self.scale_factor:
            raise ValueError(
                f"tiles of {self.tile_size} pixels, {self.tile_patches} patches a side: not a multiple of the "
                f"{self.scale_factor} that one embedding is made of"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"pictures with mean {self.mean} and std {self.std}, not three numbers each")
        if not 0 <= self.resample <= MAX_RESAMPLE:
            raise ValueError(
                f"pictures resized by filter {self.resample} of Pillow, which has 0 to {MAX_RESAMPLE}"
            )
        if not self.image_token:
            raise ValueError("no text of the image token")

    @property
    def placeholder(self) -> str:
        """What chat templates write for a picture."""
        return self.image_token

    @property
    def head_dim(self) -> int:
        """Of each head of the encoder."""
        return self.hidden_size // self.num_heads

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return self.image_size // self.patch_size

    @property
    def tile_patches(self) -> int:
        """Patches along a tile's side."""
        return self.tile_size // self.patch_size

    @property
    def max_tile_patches(self) -> int:
        """Patches of a tile: all have as many."""
        return self.tile_patches**2

    @property
    def tile_embeddings(self) -> int:
        """Embeddings of one tile."""
        return (self.tile_patches // self.scale_factor) ** 2

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels of the first resizing. Raises ValueError for a picture without pixels."""
        if width < 1 or height < 1:
            raise ValueError(f"a picture of {width} x {height} pixels; this model takes sides of at least 1")
        longest = self.longest_edge
        # The order of the operations is the processor's: another one rounds to other sizes.
        aspect_ratio = width / height
        if width >= height:
            new_width, new_height = longest, _even(int(longest / aspect_ratio))
        else:
            new_width, new_height = _even(int(longest * aspect_ratio)), longest
        new_width, new_height = max(new_width, 1), max(new_height, 1)
        aspect_ratio = new_width / new_height
        if new_width >= new_height and new_width > MAX_SIDE:
            new_width, new_height = MAX_SIDE, int(MAX_SIDE / aspect_ratio)
        elif new_height > new_width and new_height > MAX_SIDE:
            new_width, new_height = int(MAX_SIDE * aspect_ratio), MAX_SIDE
        return max(new_width, 1), max(new_height, 1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles that a picture is cut into; 1, 1 when its global view is all.

        Raises ValueError as `resized`.
        """
        new_width, new_height = self.resized(width, height)
        if not self.is_tiled:
            return 1, 1
        tile, aspect_ratio = self.tile_size, new_width / new_height
        if new_width >= new_height:
            cols = math.ceil(new_width / tile)
            rows = math.ceil(int(cols * tile / aspect_ratio) / tile)
        else:
            rows = math.ceil(new_height / tile)
            cols = math.ceil(int(rows * tile * aspect_ratio) / tile)
        return rows, cols

    def plan(self, width: int, height: int) -> ImagePlan:
        """How a picture of this many pixels stands in a prompt: tiles row by row, then the global view.

        Raises ValueError as `resized`.
        """
        rows, cols = self.grid(width, height)
        embeddings = self.image_token * self.tile_embeddings
        view = f"{self.around_text}{self.global_text}{embeddings}{self.around_text}"
        tile = TilePlan(self.tile_patches, self.tile_patches, self.tile_embeddings)
        if rows * cols == 1:
            return ImagePlan(width, height, (tile,), view)
        lines = [
            "".join(f"{self.around_text}<row_{i + 1}_col_{j + 1}>{embeddings}" for j in range(cols)) + "\n"
            for i in range(rows)
        ]
        return ImagePlan(width, height, (tile,) * (rows * cols + 1), f"{''.join(lines)}\n{view}")


def _even(length: int) -> int:
    return length + length % 2
