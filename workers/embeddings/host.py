"""The embeddings of one worker: what its engine is told of them, and how they come from others.

All of it lives in the loop; `EmbeddingStore` decides, this carries it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.digest import content_digest
from kvtransfer.errors import ReservationRefused
from kvtransfer.host import CachedKv
from kvtransfer.server import KvTransferServer
from workers.api import Event, FailureCode, ImagesWanted, ImageTile, RequestKey
from workers.embeddings.memory import EmbeddingMemory
from workers.embeddings.names import EmbeddingTransfer
from workers.embeddings.store import CannotFill, Effect, EmbeddingStore, Ready, Wanted
from workers.engine.messages import ImageReady, ImagesLost, ImagesNeeded, ImagesReleased, Message


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

    def ready(self, tile: int, block_ids: tuple[int, ...]) -> None:
        """These blocks hold the tile until `EmbeddingHost.forget`."""


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
        """Blocks to be filled, the fill's until `filled` or `fill_failed`. Raises CannotFill."""
        return self.store.begin_fill(fill_id, holder, tiles)

    def filled(self, fill_id: str) -> None:
        """The blocks hold what they should."""
        self._apply(self.store.filled(fill_id))

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
            block_ids = self.store.begin_fill(transfer_id, name.prefill, name.tiles)
        except CannotFill as refusal:
            raise ReservationRefused(transfer_id, str(refusal), retryable=False) from refusal
        size = self.pool.layout.block_size
        if num_tokens != len(block_ids) * size:
            self.fill_failed(transfer_id)
            reason = f"its tiles have {len(block_ids) * size} embeddings with padding, not {num_tokens}"
            raise ReservationRefused(transfer_id, reason, retryable=False)
        return block_ids

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """See KvHost: embeddings are not fetched, they are sent."""
        del block_hashes, min_tokens
        raise ReservationRefused(transfer_id, "embeddings cannot be fetched", retryable=False)

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """See KvHost."""
        del block_ids, token_ids
        if token_digest == transfer_digest(self.store.keys_of(transfer_id)):
            self.filled(transfer_id)
        else:
            # Of other pictures than were asked for: never used.
            self.fill_failed(transfer_id)

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

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            listener = self._listeners[effect.holder]
            match effect:
                case Wanted(_, tiles):
                    listener.wanted(tiles)
                case Ready(_, tile, block_ids):
                    listener.ready(tile, block_ids)


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
        self._publish([ImagesWanted(self._key, tiles)])

    def ready(self, tile: int, block_ids: tuple[int, ...]) -> None:
        self._post(ImageReady(self._key, tile, block_ids, self._asking))
