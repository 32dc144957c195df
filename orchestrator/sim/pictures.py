"""Pictures of simulated requests: what they are cut into, and what one process has and does of them. Pure.

The store of embeddings, and all that the gateway and the engine do about pictures, are those that serve. What is simulated: files, the
encoder, and the way of embeddings, which arrive at once and whole.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.control.prompt_images import ImageFile, PlacedTile, PromptImages
from orchestrator.sim.coarse_costs import ENCODING_H100, SIGLIP, SIGLIP_TILE, CoarseCosts
from orchestrator.sim.coarse_loads import IMAGE_TILES, TILE_TOKENS
from orchestrator.sim.network import SimNetwork
from orchestrator.sim.timers import SimTimers
from workers.api import (
    EmbeddingCounts,
    Encode,
    Event,
    FailureCode,
    ImagesEncoded,
    ImagesWanted,
    ImageTile,
    Phase,
    RequestFailed,
    RequestKey,
    WorkerSpec,
    WorkerStatus,
)
from workers.embeddings.batching import next_batch
from workers.embeddings.store import CannotFill, Effect, EmbeddingStore, NotNeeded, Wanted
from workers.engine.messages import (
    ImageReady,
    ImagesGranted,
    ImagesLost,
    ImagesNeeded,
    ImagesReleased,
    Message,
)
from workers.latency_model import LatencyModel
from workers.step_shape import EncodeCosts

#: Embeddings of a block of the embedding pool, as in workers.embeddings.memory.
BLOCK_SIZE = 16
#: That all has arrived, in bytes.
ACK_BYTES = 64


@dataclass(frozen=True, slots=True)
class Pictures:
    """Of all requests of a simulation; they are alike.

    tiles: of one picture. patches, embeddings: of one tile. embedding_bytes: of one. batch_s, patch_s: of a batch of the encoder, and of each
    patch in it. file_bytes: that the gateway sends.
    """

    tiles: int
    patches: int
    embeddings: int
    embedding_bytes: int
    batch_s: float
    patch_s: float
    file_bytes: int = 500_000

    @classmethod
    def of(cls, latency: LatencyModel, tiles: int = IMAGE_TILES) -> "Pictures":
        """As the coarse mode has them: encoded by SigLIP on an H100, with the embeddings of MiniCPM-V 2.6."""
        patches = SIGLIP_TILE.num_tokens
        tile_s = SIGLIP.seconds(ENCODING_H100, (SIGLIP_TILE,))
        overhead_s = CoarseCosts.of(latency).encode_overhead_s
        return cls(tiles, patches, TILE_TOKENS, 2 * latency.model.hidden_size, overhead_s, tile_s / patches)

    @property
    def num_tokens(self) -> int:
        """Of a prompt, that stand for one picture."""
        return self.tiles * self.embeddings

    def placed(self, request: str, prompt_tokens: int, num_images: int) -> PromptImages | None:
        """Of a prompt whose last tokens but one stand for its pictures, which nobody else has; None without any."""
        if not num_images:
            return None
        start = prompt_tokens - 1 - num_images * self.num_tokens
        assert start >= 0, (request, prompt_tokens, num_images)
        tiles = tuple(
            PlacedTile(
                file,
                number,
                self.patches,
                ImageTile(
                    start + (file * self.tiles + number) * self.embeddings,
                    self.embeddings,
                    f"{request}/{file}/{number}".encode(),
                ),
            )
            for file in range(num_images)
            for number in range(self.tiles)
        )
        return PromptImages(tuple(ImageFile(b"", "simulated", 1, 1) for _ in range(num_images)), tiles)


@dataclass(eq=False, slots=True)
class _Job:
    """An Encode. left: tiles that are not encoded."""

    encode: Encode
    arrived_at_s: float
    left: int
    num_cached: int = 0
    began_at_s: float | None = None
    encode_s: float = 0.0
    sent_at_s: float = 0.0
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles that are encoded together: of whom, and under which name."""

    tiles: tuple[tuple[_Job, tuple[str, bytes]], ...]
    num_patches: int


@dataclass(slots=True)
class SimImages:
    """Of one process. post: hands a message to its engine. publish: tells the gateway. peer: those of the process at an address, while it lives."""

    spec: WorkerSpec
    address: str
    pictures: Pictures
    timers: SimTimers
    network: SimNetwork
    post: Callable[[Message], None]
    publish: Callable[[list[Event]], None]
    peer: Callable[[str], "SimImages | None"]
    #: Of what it prefills.
    store: EmbeddingStore = field(init=False)
    num_tiles_encoded: int = 0
    num_tiles_cached: int = 0
    num_batches: int = 0
    num_patches: int = 0
    _asking: dict[RequestKey, int] = field(default_factory=dict)
    #: Encodes that have no end, in order, and tiles that wait for a batch.
    _jobs: dict[RequestKey, _Job] = field(default_factory=dict)
    _waiting: deque[tuple[_Job, tuple[str, bytes]]] = field(default_factory=deque)
    #: Tiles that it has encoded, the one used longest ago first.
    _cached: "OrderedDict[tuple[str, bytes], None]" = field(default_factory=OrderedDict)
    _max_cached: int = 0

    def __post_init__(self) -> None:
        phases, pictures = self.spec.phases, self.pictures
        num_bytes = self.spec.engine.image_cache_bytes // (
            2 if phases >= {Phase.ENCODE, Phase.PREFILL} else 1
        )
        self.store = EmbeddingStore(num_bytes // (BLOCK_SIZE * pictures.embedding_bytes), BLOCK_SIZE)
        self._max_cached = num_bytes // (pictures.embeddings * pictures.embedding_bytes)

    # What it prefills.

    def handle(self, output: ImagesNeeded | ImagesReleased) -> None:
        """What the engine says of one of its sequences."""
        if isinstance(output, ImagesReleased):
            self._apply(self.store.release(output.key))
            self._asking.pop(output.key, None)
            return
        problem = self.store.problem([tile for _, tile in output.tiles])
        if problem is not None:
            self.post(ImagesLost(output.key, FailureCode.INVALID, problem))
            return
        self._asking[output.key] = output.asking
        self._apply(self.store.need(output.key, output.tiles, output.cache_salt))

    def _arrive(self, encode: Encode) -> str:
        """Embeddings have come; why they cannot be taken, empty when they were or are not needed any more."""
        tiles = range(encode.first_tile, encode.first_tile + encode.tile_hi - encode.tile_lo)
        fill_id = f"{encode.key.request_id}/{encode.key.attempt}"
        try:
            self.store.begin_fill(fill_id, encode.prefill, tiles)
        except NotNeeded:
            self._apply(self.store.want_again(encode.prefill, tiles))
            return ""
        except CannotFill as error:
            return str(error)
        self._apply(self.store.filled(fill_id))
        return ""

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            asking = self._asking[effect.holder]
            if isinstance(effect, Wanted):
                self.post(ImagesGranted(effect.holder, asking))
                self.publish([ImagesWanted(effect.holder, effect.tiles)])
            else:
                self.post(ImageReady(effect.holder, effect.tile, effect.block_ids, asking, effect.kept))

    # What it encodes.

    @property
    def num_encodes(self) -> int:
        """That have no end."""
        return len(self._jobs)

    def submit(self, encode: Encode) -> None:
        """Do it, or say at once that there is no room."""
        if len(self._jobs) >= self.spec.engine.max_waiting_requests:
            reason = f"{len(self._jobs)} pictures are being encoded already"
            self.publish([RequestFailed(encode.key, FailureCode.OVERLOADED, reason)])
            return
        job = self._jobs[encode.key] = _Job(encode, self.timers.time(), 0)
        for key in encode.keys:
            name = encode.cache_salt, key
            if name in self._cached:
                self._cached.move_to_end(name)
                job.num_cached += 1
            else:
                job.left += 1
                self._waiting.append((job, name))
        self.num_tiles_cached += job.num_cached
        if not job.left:
            self._send(job)

    def abort(self, key: RequestKey) -> bool:
        """Nobody wants it any more; False when it is not about a picture of here."""
        job = self._jobs.pop(key, None)
        if job is None:
            return False
        job.is_dropped = True
        self._waiting = deque(one for one in self._waiting if one[0] is not job)
        return True

    def take_batch(self) -> Batch | None:
        """What the encoder computes next; None when nothing waits."""
        if not self._waiting:
            return None
        num = next_batch([self.pictures.patches] * len(self._waiting), self.spec.engine.encode_patch_budget)
        tiles = tuple(self._waiting.popleft() for _ in range(num))
        for job, _ in tiles:
            job.began_at_s = self.timers.time() if job.began_at_s is None else job.began_at_s
        return Batch(tiles, num * self.pictures.patches)

    def batch_s(self, batch: Batch) -> float:
        """Seconds that it takes."""
        return self.pictures.batch_s + self.pictures.patch_s * batch.num_patches

    def encoded(self, batch: Batch, batch_s: float) -> None:
        """It is done."""
        self.num_batches += 1
        self.num_patches += batch.num_patches
        self.num_tiles_encoded += len(batch.tiles)
        for job, name in batch.tiles:
            self._cached[name] = None
            while len(self._cached) > max(1, self._max_cached):
                self._cached.popitem(last=False)
            job.left -= 1
            job.encode_s += batch_s / len(batch.tiles)
            if not job.left and not job.is_dropped:
                self._send(job)

    def _send(self, job: _Job) -> None:
        job.sent_at_s = self.timers.time()
        target = job.encode.prefill_address
        if target == self.address:
            self._end(job, self._arrive(job.encode))
            return
        num_tiles = job.encode.tile_hi - job.encode.tile_lo
        num_bytes = num_tiles * self.pictures.embeddings * self.pictures.embedding_bytes
        if self.network.loses(self.address, target):
            self._lose(job)
        else:
            self.network.send(self.address, target, num_bytes, self._brought, job)

    def _brought(self, job: _Job) -> None:
        target = job.encode.prefill_address
        there = self.peer(target)
        problem = there._arrive(job.encode) if there is not None else f"nobody listens at {target}"
        if self.network.loses(target, self.address):
            # They are there all the same.
            self._lose(job)
        else:
            self.network.send(target, self.address, ACK_BYTES, self._end, job, problem)

    def _lose(self, job: _Job) -> None:
        self.timers.call_later(self.network.break_heard_s(), self._end, job, "the stream broke")

    def _end(self, job: _Job, problem: str) -> None:
        if self._jobs.pop(job.encode.key, None) is None:
            return
        if problem:
            self.publish([RequestFailed(job.encode.key, FailureCode.TRANSFER, problem)])
            return
        num_tiles, pictures = job.encode.tile_hi - job.encode.tile_lo, self.pictures
        began_at_s = job.sent_at_s if job.began_at_s is None else job.began_at_s
        is_here = job.encode.prefill_address == self.address
        done = ImagesEncoded(
            job.encode.key,
            num_tiles,
            job.num_cached,
            num_tiles * pictures.embeddings,
            num_tiles * pictures.embeddings * pictures.embedding_bytes,
            queue_s=began_at_s - job.arrived_at_s,
            decode_s=0.0,
            encode_s=job.encode_s,
            transfer_s=0.0 if is_here else self.timers.time() - job.sent_at_s,
            transport="" if is_here else "simulated",
        )
        self.publish([done])

    def with_status(self, status: WorkerStatus) -> WorkerStatus:
        """With the part of it that is about pictures."""
        counts = EmbeddingCounts(
            num_tiles_encoded=self.num_tiles_encoded,
            num_tiles_cached=self.num_tiles_cached,
            num_batches=self.num_batches,
            num_patches=self.num_patches,
        )
        work = replace(status.work, num_encodes=self.num_encodes, encode_tiles=len(self._waiting))
        costs = EncodeCosts(self.pictures.batch_s, self.pictures.patch_s, self.num_batches, 0.0, 1.0)
        is_encoding = Phase.ENCODE in self.spec.phases
        return replace(
            status,
            embeddings=counts,
            work=work,
            encode_costs=costs if is_encoding else None,
            takes_pictures=True,
        )

    def check_invariants(self) -> None:
        """Of the store, and of what is encoded."""
        self.store.check_invariants()
        left = sum(job.left for job in self._jobs.values())
        assert len(self._waiting) <= left
        assert all(not job.is_dropped for job in self._jobs.values())
