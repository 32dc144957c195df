"""Pictures on one worker: its embeddings, and, where it encodes, the encode phase."""

from collections.abc import Callable
from dataclasses import replace

from workers.api import Abort, EmbeddingCounts, Encode, Phase, PhaseSet, WorkerSpec, WorkerStatus
from workers.embeddings.encoding import Encoding
from workers.embeddings.host import EmbeddingHost
from workers.engine.messages import Message
from workers.image_loading import LoadedImages
from workers.images.limits import ImageLimits
from workers.images.pool import DecodePool, DecodePoolConfig
from workers.kv_channels import MAX_IDLE_CHANNELS, PeerChannels
from workers.sessions import SessionTable


class ImageSide:
    """Made, used and closed in the loop. `run` must be running.

    post: hands a message to the engine, if there is one. host: of the embeddings that its sequences read; None on a
    worker that does not prefill.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        loaded: LoadedImages,
        sessions: SessionTable,
        post: Callable[[Message], None],
    ) -> None:
        self._spec = spec
        self._sessions = sessions
        self.host: EmbeddingHost | None = None
        if loaded.prefill is not None:
            self.host = EmbeddingHost(
                loaded.prefill, spec.incarnation, post, sessions.deliver, spec.kv_transfer
            )
        #: Of Encodes. Nothing is received by it, and no engine reads it.
        self._encode_host: EmbeddingHost | None = None
        self._channels = PeerChannels(MAX_IDLE_CHANNELS)
        self._encoding: Encoding | None = None
        if loaded.tools is not None:
            assert loaded.encode is not None
            self._encode_host = EmbeddingHost(
                loaded.encode, spec.incarnation, post, sessions.deliver, spec.kv_transfer
            )
            # As many may wait as there are Encodes: what was taken is not refused for being too much.
            decoding = DecodePoolConfig(
                num_threads=spec.engine.num_threads, max_waiting=loaded.tools.max_waiting
            )
            self._decoding = DecodePool(decoding, ImageLimits())
            self._encoding = Encoding(
                loaded.tools,
                self._encode_host,
                self.host,
                self._decoding.decode,
                self._channels,
                sessions.deliver,
                spec.kv_transfer,
                spec.worker_id,
            )

    def encode(self, encode: Encode) -> None:
        """What a gateway asks for, on a worker that serves encode."""
        assert self._encoding is not None
        self._encoding.submit(encode)

    def abort(self, abort: Abort) -> bool:
        """Nobody wants it any more; False when it is not about a picture."""
        if self._encoding is None or not self._encoding.has(abort.key):
            return False
        self._encoding.abort(abort.key)
        return True

    @property
    def _hosts(self) -> list[EmbeddingHost]:
        return [host for host in (self.host, self._encode_host) if host is not None]

    def check_invariants(self) -> None:
        """Those of all that there are."""
        for host in self._hosts:
            host.check_invariants()

    async def run(self) -> None:
        """Until cancelled."""
        if self._encoding is not None:
            await self._encoding.run()

    @property
    def num_encodes(self) -> int:
        """Encodes that have not ended."""
        return self._encoding.num_running if self._encoding is not None else 0

    def phases_changed(self, gained: PhaseSet) -> None:
        """The worker serves other phases now; these are new among them."""
        if self._encoding is not None:
            self._encoding.loop.phases_changed(has_gained=Phase.ENCODE in gained)

    def with_status(self, status: WorkerStatus) -> WorkerStatus:
        """With the part of it that is about pictures."""
        costs = self._encoding.loop.latency.costs() if self._encoding is not None else None
        counts = self._counts()
        num_tiles = self._encoding.num_tiles_left if self._encoding is not None else 0
        work = replace(status.work, num_encodes=self.num_encodes, encode_tiles=num_tiles)
        first_step_s = status.first_step_s
        if first_step_s is None and self._encoding is not None:
            first_step_s = self._encoding.loop.first_batch_s
        return replace(status, embeddings=counts, encode_costs=costs, work=work, first_step_s=first_step_s)

    def _counts(self) -> EmbeddingCounts:
        """As of now, of both stores together."""
        stores, encoding = [host.store.counts() for host in self._hosts], self._encoding
        return EmbeddingCounts(
            num_blocks=sum(store.num_blocks for store in stores),
            num_free=sum(store.num_free for store in stores),
            num_cached=sum(store.num_cached for store in stores),
            num_waiting=sum(store.num_waiting for store in stores),
            num_hits=sum(store.num_hits for store in stores),
            num_misses=sum(store.num_misses for store in stores),
            num_evictions=sum(store.num_evictions for store in stores),
            num_encodes_running=encoding.num_running if encoding is not None else 0,
            num_tiles_encoded=encoding.num_encoded_tiles if encoding is not None else 0,
            num_tiles_cached=encoding.num_cached_tiles if encoding is not None else 0,
            num_batches=encoding.loop.num_batches if encoding is not None else 0,
            num_patches=encoding.loop.num_patches if encoding is not None else 0,
        )

    async def close(self, reason: str) -> None:
        """Give up all, and leave no thread behind."""
        if self._encoding is not None:
            await self._encoding.close()
            await self._decoding.close()
        for host in self._hosts:
            await host.close(reason)
        await self._channels.close()
