"""How embeddings and their transfers are named. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from workers.api import ImageReduction, RequestId, RequestKey

#: How a refusal begins when a prefill worker has what it is offered, or wants it no more: nothing has failed.
NOT_NEEDED = "not needed"
_PREFIX = "image"


def embedding_key(
    image: bytes, processor_digest: str, tile: int, reduction: ImageReduction | None = None
) -> bytes:
    """What names the embeddings of one tile of a picture: the file's content, all that is done to it, and which tile.

    image: SHA-256 of the file.
    """
    parts = [image, processor_digest.encode(), str(tile).encode()]
    if reduction is not None and reduction.is_on:
        parts.append(reduction.encode_text.encode())
    text = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hashlib.sha256(text).digest()


def image_digest(image: bytes) -> bytes:
    """Of a file's content."""
    return hashlib.sha256(image).digest()


@dataclass(frozen=True, slots=True)
class EmbeddingTransfer:
    """The embeddings of tiles [first_tile, first_tile + num_tiles) of a prompt on their way to its prefill worker.

    attempt: that of the Encode.
    """

    prefill: RequestKey
    first_tile: int
    num_tiles: int
    attempt: int

    @property
    def transfer_id(self) -> str:
        """Its name in kvtransfer."""
        numbers = (self.prefill.attempt, self.first_tile, self.num_tiles, self.attempt)
        return "|".join((_PREFIX, *map(str, numbers), self.prefill.request_id))

    @property
    def tiles(self) -> Sequence[int]:
        """Indices in the prompt's images."""
        return range(self.first_tile, self.first_tile + self.num_tiles)

    @classmethod
    def parse(cls, transfer_id: str) -> "EmbeddingTransfer | None":
        """What `transfer_id` says; None when it is no name of such a transfer."""
        parts = transfer_id.split("|", 5)
        if (
            len(parts) != 6
            or parts[0] != _PREFIX
            or not all(part.isascii() and part.isdigit() for part in parts[1:5])
        ):
            return None
        prefill_attempt, first_tile, num_tiles, attempt = map(int, parts[1:5])
        return cls(RequestKey(RequestId(parts[5]), prefill_attempt), first_tile, num_tiles, attempt)
