"""The pictures of one prompt, as the gateway knows them. Pure."""

from dataclasses import dataclass

from workers.api import ImageReduction, ImageTile


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One picture as it came. width, height: pixels, upright, as its header says."""

    data: bytes
    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PlacedTile:
    """One tile of a picture in a prompt. file: index of the picture; number: of the tile in it."""

    file: int
    number: int
    num_patches: int
    tile: ImageTile


@dataclass(frozen=True, slots=True)
class PromptImages:
    """All pictures of a prompt, and all their tiles in its order."""

    files: tuple[ImageFile, ...]
    tiles: tuple[PlacedTile, ...]
    reduction: ImageReduction | None = None

    @property
    def num_embeddings(self) -> int:
        """Of all tiles: as many tokens of the prompt."""
        return sum(placed.tile.num_embeddings for placed in self.tiles)

    @property
    def api_tiles(self) -> tuple[ImageTile, ...]:
        """What workers are told of them."""
        return tuple(placed.tile for placed in self.tiles)
