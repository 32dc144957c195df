"""Which embeddings the sequences of one engine ask for, and when they give them back. Pure.

A sequence asks for all that it lacks in one need, which is granted whole: two that each held a part and waited for more
could wait for each other for ever. When KV is gone that it knew of as it asked, it gives back all and asks anew.
"""

from workers.engine.batch import Batch
from workers.engine.messages import ImageReady, ImagesNeeded, ImagesReleased, Output
from workers.engine.sequence import Sequence, SequenceState


class ImageNeeds:
    """Tells whoever has the embeddings, by `outputs`."""

    def __init__(self, batch: Batch, outputs: list[Output]) -> None:
        self._batch = batch
        self._outputs = outputs

    def ask(self, sequence: Sequence, num_known: int | None = None) -> None:
        """A waiting sequence needs the embeddings of what is not known, if it has not asked for all of it already.

        num_known: tokens whose KV is here; None: what the prefix cache has.
        """
        images = sequence.images
        if images is None or sequence.state is not SequenceState.WAITING:
            return
        if num_known is None:
            num_known = (self._batch.num_known_blocks(sequence) or 0) * self._batch.pool.block_size
        if images.covers(num_known):
            return
        self.release(sequence)
        tiles = tuple((i, images.tiles[i]) for i in images.ask(num_known))
        self._outputs.append(ImagesNeeded(sequence.key, tiles, sequence.cache_salt, images.asking))

    def arrived(self, sequence: Sequence, ready: ImageReady) -> None:
        """One of the tiles that it asked for is here."""
        images = sequence.images
        assert images is not None
        was_all_ready = images.is_all_ready
        images.arrived(ready.tile, ready.block_ids, ready.asking, ready.kept)
        if sequence.reduction is not None and images.is_all_ready and not was_all_ready:
            sequence.merge()

    def release(self, sequence: Sequence) -> None:
        """It reads no embeddings any more, and waits for none."""
        if sequence.images is not None and sequence.images.release():
            self._outputs.append(ImagesReleased(sequence.key))
