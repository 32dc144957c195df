"""The embeddings of one worker: what its engine is told of them, and how they come from others.

All of it lives in the loop; `EmbeddingStore` decides, this carries it out.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.digest import content_digest
from kvtransfer.errors import ReservationRefused
from kvtransfer.host import CachedKv
from kvtransfer.layout import blocks_needed
from kvtransfer.server import KvTransferServer
from workers.api import Event, FailureCode, ImagesWanted, ImageTile, RequestKey
from workers.embeddings.kept import KeptEmbeddings, from_numbers
from workers.embeddings.memory import EmbeddingMemory
from workers.embeddings.names import NOT_NEEDED, EmbeddingTransfer
from workers.embeddings.store import CannotFill, Effect, EmbeddingStore, NotNeeded, Ready, Wanted
from workers.engine.messages import (
    ImageReady,
    ImagesGranted,
    ImagesLost,
    ImagesNeeded,
    ImagesReleased,
    Message,
)

logger = logging.getLogger(__name__)


def transfer_config(config: KvTransferConfig) -> KvTransferConfig:
    """For embeddings: nothing may be lost of them."""
    return replace(config, codec=CodecId.NONE)


def transfer_digest(keys: Sequence[bytes]) -> bytes:
    """What binds a transfer to the tiles that it is of."""
    return content_digest(b"", keys)


class Listener(Protocol):
    """Whoever needs embeddings."""

    def wanted(self, tiles: tuple[int, ...]) -> None:
        """There is room for these tiles of the need, and it is on the listener to have them filled."""

    def ready(self, tile: int, block_ids: tuple[int, ...], kept: KeptEmbeddings | None) -> None:
        """These blocks hold the tile until `EmbeddingHost.forget`. kept: see `Ready`."""


class EmbeddingHost:
    """KvHost over the embeddings of one worker. Made and used in the loop.

    post: hands a message to the engine. publish: tells gateways.
    """

    def __init__(
        self,
        memory: EmbeddingMemory,
        incarnation: int,
        post: Callable[[Message], None],
        publish: Callable[[list[Event]], None],
        config: KvTransferConfig,
    ) -> None:
        self.memory = memory
        self.pool = memory.pool
        self.incarnation = incarnation
        self.store = EmbeddingStore(memory.num_blocks, memory.pool.layout.block_size)
        self._post = post
        self._publish = publish
        #: Bounded by the requests of the engine, and by the encodes.
        self._listeners: dict[RequestKey, Listener] = {}
        self.receiving = KvTransferServer(self, transfer_config(config))

    # The engine.

    def handle(self, output: ImagesNeeded | ImagesReleased) -> None:
        """What the engine says of one of its sequences."""
        if isinstance(output, ImagesReleased):
            self.forget(output.key)
            return
        problem = self.store.problem([tile for _, tile in output.tiles])
        if problem is not None:
            self._post(ImagesLost(output.key, FailureCode.INVALID, problem))
            return
        listener = _EngineListener(output, self._post, self._publish)
        self.need(output.key, output.tiles, output.cache_salt, listener)

    # Whoever needs embeddings here.

    def need(
        self, holder: RequestKey, tiles: Sequence[tuple[int, ImageTile]], salt: str, listener: Listener
    ) -> None:
        """See EmbeddingStore. The listener may be told before this returns."""
        self._listeners[holder] = listener
        self._apply(self.store.need(holder, tiles, salt))

    def forget(self, holder: RequestKey) -> None:
        """It needs nothing any more. What is on its way to it still comes, and is cached."""
        self._listeners.pop(holder, None)
        self._apply(self.store.release(holder))

    def begin_fill(self, fill_id: str, holder: RequestKey, tiles: Sequence[int]) -> tuple[int, ...]:
        """Blocks to be filled, the fill's until `filled` or `fill_failed`.

        Raises CannotFill, and NotNeeded; then what of it is still missing is wanted anew.
        """
        try:
            return self.store.begin_fill(fill_id, holder, tiles)
        except NotNeeded:
            self._apply(self.store.want_again(holder, tiles))
            raise

    def begin_arrival(self, name: EmbeddingTransfer) -> tuple[int, ...]:
        """`begin_fill` for an Encode. One of an earlier attempt that is still open is given up: its encoder is lost."""
        for fill_id in self.store.fills_of(name.prefill, name.tiles):
            other = EmbeddingTransfer.parse(fill_id)
            if other is not None and other.prefill == name.prefill and other.attempt < name.attempt:
                self.receiving.abort(fill_id, "a later attempt brings them")
                # It may have no lease yet, and then it ends a little later; it writes no more in any case.
                self.fill_failed(fill_id)
        return self.begin_fill(name.transfer_id, name.prefill, name.tiles)

    def filled(self, fill_id: str, kept: Sequence[KeptEmbeddings] | None = None) -> None:
        """The blocks hold what they should. kept: see EmbeddingStore."""
        self._apply(self.store.filled(fill_id, kept))

    def fill_failed(self, fill_id: str) -> None:
        """The blocks are written to no more; does nothing when the fill has ended."""
        self._apply(self.store.fill_failed(fill_id))

    # KvHost.

    async def reserve(
        self, transfer_id: str, *, num_tokens: int, max_tokens: int, timeout_s: float
    ) -> Sequence[int]:
        """See KvHost. Their blocks were reserved when they were wanted, so that nobody waits here."""
        del max_tokens, timeout_s
        name = EmbeddingTransfer.parse(transfer_id)
        if name is None:
            raise ReservationRefused(transfer_id, "this is no transfer of embeddings", retryable=False)
        try:
            block_ids = self.begin_arrival(name)
        except NotNeeded as refusal:
            raise ReservationRefused(transfer_id, f"{NOT_NEEDED}: {refusal}", retryable=False) from refusal
        except CannotFill as refusal:
            raise ReservationRefused(transfer_id, str(refusal), retryable=False) from refusal
        size = self.pool.layout.block_size
        # Fewer when embeddings were merged: how many, each tile says when it has come.
        if num_tokens % size or not 0 < num_tokens <= len(block_ids) * size:
            self.fill_failed(transfer_id)
            reason = f"its tiles have {len(block_ids) * size} embeddings with padding, not {num_tokens}"
            raise ReservationRefused(transfer_id, reason, retryable=False)
        return block_ids[: num_tokens // size]

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """See KvHost: embeddings are not fetched, they are sent."""
        del block_hashes, min_tokens
        raise ReservationRefused(transfer_id, "embeddings cannot be fetched", retryable=False)

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """See KvHost. token_ids: `kept.to_numbers` of the tiles; none when all embeddings have come."""
        sizes, size = self.store.sizes_of(transfer_id), self.pool.layout.block_size
        kept = None
        try:
            if token_ids:
                kept = from_numbers(token_ids, sizes)
                sizes = [len(tile) for tile in kept]
        except ValueError:
            self._spoiled(transfer_id, "what says which embeddings there are cannot be read")
            return
        is_whole = len(block_ids) == sum(blocks_needed(num, size) for num in sizes)
        if is_whole and token_digest == transfer_digest(self.store.keys_of(transfer_id)):
            self.filled(transfer_id, kept)
        else:
            self._spoiled(transfer_id, "they are of other pictures than were asked for")

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """See KvHost. Of what was sent from here nothing is to be done: whoever sends holds the entries."""
        del block_ids, reason
        self.fill_failed(transfer_id)

    async def close(self, reason: str) -> None:
        """Give up what is on its way, and what comes from now on."""
        await self.receiving.close(reason)

    def check_invariants(self) -> None:
        """Those of the store and of the transfers."""
        self.store.check_invariants()
        self.receiving.check_invariants()

    def _spoiled(self, transfer_id: str, reason: str) -> None:
        """What has come is never used. Its sender believes that all is well, so whoever needs the tiles is told anew."""
        logger.warning("embeddings_spoiled transfer_id=%s reason=%s", transfer_id, reason)
        self._apply(self.store.fill_failed(transfer_id, is_known=False))

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            listener = self._listeners[effect.holder]
            match effect:
                case Wanted(_, tiles):
                    listener.wanted(tiles)
                case Ready(_, tile, block_ids, kept):
                    listener.ready(tile, block_ids, kept)


class _EngineListener:
    """A sequence of the engine: its gateway has what it wants encoded, and the engine reads what is ready."""

    def __init__(
        self, needed: ImagesNeeded, post: Callable[[Message], None], publish: Callable[[list[Event]], None]
    ) -> None:
        self._key = needed.key
        self._asking = needed.asking
        self._post = post
        self._publish = publish

    def wanted(self, tiles: tuple[int, ...]) -> None:
        # Needs are granted whole.
        self._post(ImagesGranted(self._key, self._asking))
        self._publish([ImagesWanted(self._key, tiles)])

    def ready(self, tile: int, block_ids: tuple[int, ...], kept: KeptEmbeddings | None) -> None:
        self._post(ImageReady(self._key, tile, block_ids, self._asking, kept))
