"""How one picture is cut into tiles and stands in a prompt, from its size alone. Pure.

The gateway plans with what a worker says of its model, so prompts are counted before a pixel is decoded.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TilePlan:
    """What one run of the encoder turns into embeddings, whatever its neighbours."""

    #: Patches.
    rows: int
    cols: int
    num_embeddings: int

    @property
    def num_patches(self) -> int:
        """What the encoder's time goes with."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """One picture: its tiles in the order of their embeddings in the prompt."""

    #: Pixels of the picture as it came, upright.
    width: int
    height: int
    tiles: tuple[TilePlan, ...]
    #: What stands for the picture in the prompt, with the image token once for each embedding.
    text: str
    #: Embeddings as frames, rows and columns, where positions follow them (M-RoPE); None where they do not.
    grid: tuple[int, int, int] | None = None

    @property
    def num_embeddings(self) -> int:
        """Of all tiles."""
        return sum(tile.num_embeddings for tile in self.tiles)

    @property
    def num_patches(self) -> int:
        """Of all tiles."""
        return sum(tile.num_patches for tile in self.tiles)
