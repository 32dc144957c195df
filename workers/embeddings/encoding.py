"""The encode phase: pictures in, embeddings out, to whichever worker prefills.

One task for each Encode. Tiles that are cached, or that another Encode is computing, are not computed again. What is for
this very worker is written where its engine reads it; all else is sent as KV is.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import DeadlineExceeded, PhasewiseTransferError, StreamLost
from kvtransfer.grpc_stream import EMBEDDINGS, GrpcChannel
from kvtransfer.session import TransferReport
from workers.api import (
    Encode,
    Event,
    FailureCode,
    ImagesEncoded,
    ImageTile,
    RequestFailed,
    RequestKey,
    WorkerId,
)
from workers.embeddings.encoder_loop import EncoderLoop
from workers.embeddings.host import EmbeddingHost, transfer_config, transfer_digest
from workers.embeddings.memory import BLOCK_SIZE
from workers.embeddings.names import EmbeddingTransfer, embedding_key, image_digest
from workers.embeddings.store import CannotFill
from workers.errors import DecodePoolBusy, ImageRejected
from workers.kv_channels import PeerChannels
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.plan import ImagePlan

logger = logging.getLogger(__name__)


class Decode(Protocol):
    """Reads a file into pixels, [height, width, 3] uint8 RGB, upright. Raises ImageRejected, DecodePoolBusy."""

    def __call__(self, data: bytes, media_type: str) -> Awaitable[NDArray[np.uint8]]:
        """See above."""


@dataclass(frozen=True, slots=True)
class VisionTools:
    """What there is to encode with. plan: of a picture of this width and height; raises ImageRejected."""

    encoder: VisionEncoder
    plan: Callable[[int, int], ImagePlan]
    processor_digest: str
    patch_budget: int
    max_waiting: int


@dataclass(eq=False, slots=True)
class _Work:
    """One Encode that is being done."""

    encode: Encode
    plan: ImagePlan
    arrived_s: float
    #: Tiles that are to be computed here, as they are known.
    wanted: list[int] = field(default_factory=list)
    ready: dict[int, tuple[int, ...]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pixels: NDArray[np.uint8] | None = None
    began_s: float | None = None
    num_computed: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0


class _Listener:
    def __init__(self, work: _Work) -> None:
        self._work = work

    def wanted(self, tiles: tuple[int, ...]) -> None:
        self._work.wanted += tiles
        self._work.news.set()

    def ready(self, tile: int, block_ids: tuple[int, ...]) -> None:
        self._work.ready[tile] = block_ids
        self._work.news.set()


class Encoding:
    """All Encodes of one worker. Made and used in the loop; `run` must be running.

    publish: tells gateways. Every `submit` ends in ImagesEncoded or
    RequestFailed, unless it is aborted.
    """

    def __init__(
        self,
        tools: VisionTools,
        host: EmbeddingHost,
        decode: Decode,
        channels: PeerChannels,
        publish: Callable[[list[Event]], None],
        config: KvTransferConfig,
        worker_id: WorkerId,
    ) -> None:
        self._tools = tools
        self._worker_id = worker_id
        self._host = host
        self._decode = decode
        self._channels = channels
        self._publish = publish
        self._config = transfer_config(config)
        self.loop = EncoderLoop(tools.encoder, tools.patch_budget)
        self._tasks: dict[RequestKey, asyncio.Task[None]] = {}
        self._clock = asyncio.get_running_loop().time
        self.num_encoded_tiles = 0
        self.num_cached_tiles = 0

    @property
    def num_running(self) -> int:
        """Encodes that are not done."""
        return len(self._tasks)

    def has(self, key: RequestKey) -> bool:
        """It is being done."""
        return key in self._tasks

    def submit(self, encode: Encode) -> None:
        """Do it, or say at once why not."""
        refusal = self._refusal(encode)
        if refusal is not None:
            self._publish([RequestFailed(encode.key, *refusal)])
            return
        task = asyncio.create_task(self._run(encode, self._clock()))
        self._tasks[encode.key] = task
        task.add_done_callback(lambda _: self._tasks.pop(encode.key, None))

    def abort(self, key: RequestKey) -> None:
        """Nobody wants it any more."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel("aborted")

    async def run(self) -> None:
        """Until cancelled."""
        await self.loop.run()

    async def close(self) -> None:
        """Give up all."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel("the worker is stopping")
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.loop.close)

    def _refusal(self, encode: Encode) -> tuple[FailureCode, str] | None:
        if encode.key in self._tasks:
            return FailureCode.INVALID, "attempt: this attempt is running here already"
        if len(self._tasks) >= self._tools.max_waiting:
            return FailureCode.OVERLOADED, f"{len(self._tasks)} pictures are being encoded already"
        return None

    async def _run(self, encode: Encode, arrived_s: float) -> None:
        event: Event
        try:
            async with asyncio.timeout(encode.timeout_s):
                event = await self._do(encode, arrived_s)
        except TimeoutError:
            event = _failed(encode, FailureCode.DEADLINE, "the request's deadline passed")
        except ImageRejected as error:
            event = _failed(encode, FailureCode.INVALID, str(error))
        except DecodePoolBusy as error:
            event = _failed(encode, FailureCode.OVERLOADED, str(error))
        except (CannotFill, PhasewiseTransferError) as error:
            code = FailureCode.DEADLINE if isinstance(error, DeadlineExceeded) else FailureCode.TRANSFER
            event = _failed(encode, code, str(error))
        except Exception as error:
            logger.exception("encode_failed request_id=%s", encode.key.request_id)
            event = _failed(encode, FailureCode.INTERNAL, f"encoding failed: {error!r}; see the worker's log")
        self._publish([event])

    async def _do(self, encode: Encode, arrived_s: float) -> ImagesEncoded:
        work = _Work(encode, await self._plan(encode), arrived_s)
        if (encode.prefill_worker, encode.prefill_incarnation) == (self._worker_id, self._host.incarnation):
            await self._fill_here(work)
            return self._report(work, 0.0, None)
        self._host.need(encode.key, list(enumerate(_tiles(work))), encode.cache_salt, _Listener(work))
        try:
            await self._fill_all(work)
            began_s = self._clock()
            report = await self._send(work)
            return self._report(work, self._clock() - began_s, report)
        finally:
            self._host.forget(encode.key)

    async def _plan(self, encode: Encode) -> ImagePlan:
        """How the picture is cut, checked against what the gateway says of it. Raises ImageRejected."""
        plan = self._tools.plan(encode.width, encode.height)
        if not 0 <= encode.tile_lo < encode.tile_hi <= len(plan.tiles):
            raise ImageRejected(
                f"tiles {encode.tile_lo} to {encode.tile_hi} of a picture of {len(plan.tiles)} were asked for"
            )
        digest = await asyncio.to_thread(image_digest, encode.image)
        keys = tuple(
            embedding_key(digest, self._tools.processor_digest, tile)
            for tile in range(encode.tile_lo, encode.tile_hi)
        )
        if keys != encode.keys:
            raise ImageRejected(
                "the gateway names its embeddings otherwise than this worker: another file, or another model"
            )
        tiles = plan.tiles[encode.tile_lo : encode.tile_hi]
        problem = self._host.store.problem(
            [ImageTile(0, tile.num_embeddings, key) for tile, key in zip(tiles, keys, strict=True)]
        )
        if problem is not None:
            raise ImageRejected(problem)
        return plan

    async def _fill_here(self, work: _Work) -> None:
        """Into the entries that a sequence of this worker needs."""
        encode = work.encode
        name = _transfer(encode)
        block_ids = self._host.begin_fill(name.transfer_id, encode.prefill, name.tiles)
        try:
            await self._compute(work, list(range(encode.tile_hi - encode.tile_lo)), block_ids)
        except BaseException:
            self._host.fill_failed(name.transfer_id)
            raise
        self._host.filled(name.transfer_id)

    async def _fill_all(self, work: _Work) -> None:
        """Until all of its tiles are in this worker's pool, whoever computed them."""
        encode = work.encode
        num_tiles = encode.tile_hi - encode.tile_lo
        num_fills = 0
        while len(work.ready) < num_tiles:
            if not work.wanted:
                work.news.clear()
                await work.news.wait()
                continue
            tiles, work.wanted = sorted(work.wanted), []
            num_fills += 1
            fill_id = f"encode-{encode.key.request_id}-{encode.key.attempt}-{num_fills}"
            block_ids = self._host.begin_fill(fill_id, encode.key, tiles)
            try:
                await self._compute(work, tiles, block_ids)
            except BaseException:
                self._host.fill_failed(fill_id)
                raise
            self._host.filled(fill_id)

    async def _compute(self, work: _Work, tiles: list[int], block_ids: tuple[int, ...]) -> None:
        """Encode these tiles, indices from tile_lo, and put the embeddings into their blocks."""
        encode, plan = work.encode, work.plan
        if work.began_s is None:
            work.began_s = self._clock()
        if work.pixels is None:
            began_s = time.perf_counter()
            work.pixels = await self._decode(encode.image, encode.media_type)
            work.decode_s = time.perf_counter() - began_s
            if work.pixels.shape[:2] != (plan.height, plan.width):
                height, width = work.pixels.shape[:2]
                raise ImageRejected(
                    f"its header says {plan.width}x{plan.height} pixels, and it has {width}x{height}"
                )
        numbers = [encode.tile_lo + tile for tile in tiles]
        prepared = await asyncio.to_thread(self._prepare, work.pixels, plan, numbers)
        found = await self.loop.encode(prepared, [plan.tiles[number].num_patches for number in numbers])
        at = 0
        for embeddings in found.embeddings:
            num_blocks = -(-len(embeddings) // BLOCK_SIZE)
            self._host.memory.write(block_ids[at : at + num_blocks], embeddings)
            at += num_blocks
        work.num_computed += len(tiles)
        work.encode_s += found.encode_s

    def _prepare(self, pixels: NDArray[np.uint8], plan: ImagePlan, numbers: list[int]) -> list[torch.Tensor]:
        lo, hi = min(numbers), max(numbers) + 1
        prepared = self._tools.encoder.prepare(pixels, plan, range(lo, hi))
        return [prepared[number - lo] for number in numbers]

    async def _send(self, work: _Work) -> TransferReport:
        """All its tiles to the prefill worker, from the blocks that are held here."""
        encode = work.encode
        block_ids = [block for i in sorted(work.ready) for block in work.ready[i]]
        num_tokens = len(block_ids) * BLOCK_SIZE
        peer = self._channels.take(encode.prefill_address)
        is_lost = False
        try:
            sender = KvSender(
                self._host,
                GrpcChannel(peer.channel, EMBEDDINGS),
                transfer_id=_transfer(encode).transfer_id,
                block_ids=block_ids,
                num_tokens=num_tokens,
                max_tokens=num_tokens,
                token_digest=transfer_digest(encode.keys),
                peer_incarnation=encode.prefill_incarnation,
                timeout_s=encode.timeout_s - (self._clock() - work.arrived_s),
                config=self._config,
            )
            sender.kv_ready(0, 1, 0, num_tokens)
            sender.prefill_finished(())
            return await sender.run()
        except StreamLost:
            is_lost = True
            raise
        finally:
            await self._channels.give_back(peer, is_lost=is_lost)

    def _report(self, work: _Work, transfer_s: float, report: TransferReport | None) -> ImagesEncoded:
        encode = work.encode
        tiles = work.plan.tiles[encode.tile_lo : encode.tile_hi]
        num_embeddings = sum(tile.num_embeddings for tile in tiles)
        self.num_encoded_tiles += work.num_computed
        self.num_cached_tiles += len(tiles) - work.num_computed
        began_s = work.began_s if work.began_s is not None else self._clock()
        return ImagesEncoded(
            encode.key,
            num_tiles=len(tiles),
            num_cached=len(tiles) - work.num_computed,
            num_embeddings=num_embeddings,
            num_bytes=num_embeddings * self._host.pool.layout.token_bytes,
            queue_s=began_s - work.arrived_s,
            decode_s=work.decode_s,
            encode_s=work.encode_s,
            transfer_s=transfer_s,
            transport=report.transport if report is not None else "",
        )


def _transfer(encode: Encode) -> EmbeddingTransfer:
    num_tiles = encode.tile_hi - encode.tile_lo
    return EmbeddingTransfer(encode.prefill, encode.first_tile, num_tiles, encode.key.attempt)


def _tiles(work: _Work) -> list[ImageTile]:
    encode = work.encode
    tiles = work.plan.tiles[encode.tile_lo : encode.tile_hi]
    return [ImageTile(0, tile.num_embeddings, key) for tile, key in zip(tiles, encode.keys, strict=True)]


def _failed(encode: Encode, code: FailureCode, reason: str) -> RequestFailed:
    return RequestFailed(encode.key, code, reason)
