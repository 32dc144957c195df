"""One Encode that is being done: what it is about, and how far it has come."""

import asyncio
from dataclasses import dataclass, field

from workers.api import Encode, ImageReduction, ImageTile
from workers.embeddings.kept import KeptEmbeddings
from workers.embeddings.names import EmbeddingTransfer
from workers.model.vision.plan import ImagePlan


@dataclass(eq=False, slots=True)
class EncodeWork:
    """Listens to the store of its embeddings, where its tiles have indices from `encode.tile_lo`."""

    encode: Encode
    plan: ImagePlan
    arrived_s: float
    #: Tiles that are to be computed here, as they are known.
    to_compute: list[int] = field(default_factory=list)
    blocks: dict[int, tuple[int, ...]] = field(default_factory=dict)
    #: Of tiles whose embeddings were reduced: those that there are.
    kept: dict[int, KeptEmbeddings] = field(default_factory=dict)
    #: Something came to one of these.
    news: asyncio.Event = field(default_factory=asyncio.Event)
    began_s: float | None = None
    num_computed: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0

    # Listener.

    def wanted(self, tiles: tuple[int, ...]) -> None:
        """See Listener."""
        self.to_compute += tiles
        self.news.set()

    def ready(self, tile: int, block_ids: tuple[int, ...], kept: KeptEmbeddings | None) -> None:
        """See Listener."""
        self.blocks[tile] = block_ids
        if kept is not None:
            self.kept[tile] = kept
        self.news.set()

    # What it is about.

    @property
    def reduction(self) -> ImageReduction | None:
        """None when the pictures are to have all their embeddings."""
        reduction = self.encode.reduction
        return reduction if reduction is not None and reduction.is_on else None

    @property
    def transfer(self) -> EmbeddingTransfer:
        """Its way to the prefill worker."""
        encode = self.encode
        num_tiles = encode.tile_hi - encode.tile_lo
        return EmbeddingTransfer(encode.prefill, encode.first_tile, num_tiles, encode.key.attempt)

    @property
    def tiles(self) -> list[ImageTile]:
        """All of it."""
        encode = self.encode
        planned = self.plan.tiles[encode.tile_lo : encode.tile_hi]
        return [
            ImageTile(0, tile.num_embeddings, key) for tile, key in zip(planned, encode.keys, strict=True)
        ]

    # What there is of it.

    @property
    def is_whole(self) -> bool:
        """All its tiles are in this worker's pool."""
        return len(self.blocks) == self.encode.tile_hi - self.encode.tile_lo

    @property
    def block_ids(self) -> list[int]:
        """Where its tiles are, in order."""
        return [block_id for _, block_ids in sorted(self.blocks.items()) for block_id in block_ids]

    @property
    def kept_in_order(self) -> list[KeptEmbeddings]:
        """Of its tiles; empty when these have all their embeddings."""
        return [kept for _, kept in sorted(self.kept.items())]

    @property
    def num_embeddings(self) -> int:
        """Of all its tiles."""
        return sum(
            len(self.kept[i]) if i in self.kept else tile.num_embeddings for i, tile in enumerate(self.tiles)
        )
