"""The encode phase: pictures in, embeddings out, to whichever worker prefills.

One task for each Encode. Tiles that are cached, or that another Encode is computing, are not computed again. They lie in a
store of Encodes alone, so that an Encode waits for nothing but Encodes, and never for what prefills: workers that do both
would wait for each other. From there they are sent as KV is, or, when this very worker prefills, copied to where its
engine reads them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import DeadlineExceeded, PhasewiseTransferError, StreamLost, TransferRefused
from kvtransfer.grpc_stream import EMBEDDINGS, GrpcChannel
from kvtransfer.layout import blocks_needed
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
from workers.embeddings.byte_budget import ByteBudget
from workers.embeddings.encode_work import EncodeWork
from workers.embeddings.encoder_loop import EncoderLoop
from workers.embeddings.host import EmbeddingHost, transfer_config, transfer_digest
from workers.embeddings.kept import KeptEmbeddings, to_numbers
from workers.embeddings.memory import BLOCK_SIZE
from workers.embeddings.names import NOT_NEEDED, embedding_key, image_digest
from workers.embeddings.store import CannotFill, NotNeeded
from workers.errors import DecodePoolBusy, ImageRejected
from workers.kv_channels import PeerChannels
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.plan import ImagePlan

logger = logging.getLogger(__name__)

#: Of pictures that are decoded and not yet encoded, as pixels and as what the encoder takes.
MAX_PIXEL_BYTES = 2**30
#: Of a picture that is being prepared: decoded, and as Pillow has it.
SOURCE_PIXEL_BYTES = 3 + 4
#: Files of Encodes that have no end yet, in bytes; one more is refused as overloaded.
MAX_FILE_BYTES = 2**29


class Decode(Protocol):
    """Reads a file into pixels, [height, width, 3] uint8 RGB, upright. Raises ImageRejected, DecodePoolBusy."""

    def __call__(self, data: bytes, media_type: str) -> Awaitable[NDArray[np.uint8]]:
        """See above."""


@dataclass(frozen=True, slots=True)
class VisionTools:
    """What there is to encode with.

    plan: of a picture of this width and height; raises ImageRejected. patch_bytes: what `encoder.prepare` makes of one
    patch. max_waiting: Encodes at a time.
    """

    encoder: VisionEncoder
    plan: Callable[[int, int], ImagePlan]
    processor_digest: str
    patch_bytes: int
    patch_budget: int
    max_waiting: int


class _CannotEncode(Exception):  # noqa: N818 - an answer, not a fault
    """This worker cannot, and another one may; the text says why."""


class Encoding:
    """All Encodes of one worker. Made and used in the loop; `run` must be running.

    host: of the embeddings of Encodes. prefill_host: of what this worker prefills; None when it does not. publish: tells
    gateways. Every `submit` ends in ImagesEncoded or RequestFailed, unless it is aborted.
    """

    def __init__(
        self,
        tools: VisionTools,
        host: EmbeddingHost,
        prefill_host: EmbeddingHost | None,
        decode: Decode,
        channels: PeerChannels,
        publish: Callable[[list[Event]], None],
        config: KvTransferConfig,
        worker_id: WorkerId,
        *,
        max_pixel_bytes: int = MAX_PIXEL_BYTES,
    ) -> None:
        self._tools = tools
        self._worker_id = worker_id
        self._host = host
        self._prefill_host = prefill_host
        self._decode = decode
        self._channels = channels
        self._publish = publish
        self._config = transfer_config(config)
        self.loop = EncoderLoop(tools.encoder, tools.patch_budget)
        self._pixel_bytes = ByteBudget(max_pixel_bytes)
        self._tasks: dict[RequestKey, asyncio.Task[None]] = {}
        #: Tiles of those whose embeddings are not all here.
        self._num_tiles: dict[RequestKey, int] = {}
        self._num_file_bytes = 0
        self._clock = asyncio.get_running_loop().time
        self.num_encoded_tiles = 0
        self.num_cached_tiles = 0

    @property
    def num_running(self) -> int:
        """Encodes that are not done."""
        return len(self._tasks)

    @property
    def num_tiles_left(self) -> int:
        """Tiles of Encodes whose embeddings are not all here yet."""
        return sum(self._num_tiles.values())

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
        self._num_tiles[encode.key] = encode.tile_hi - encode.tile_lo
        self._num_file_bytes += len(encode.image)
        task.add_done_callback(lambda _: self._ended(encode))

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

    def _ended(self, encode: Encode) -> None:
        del self._tasks[encode.key]
        self._num_tiles.pop(encode.key, None)
        self._num_file_bytes -= len(encode.image)

    def _refusal(self, encode: Encode) -> tuple[FailureCode, str] | None:
        if encode.key in self._tasks:
            return FailureCode.INVALID, "attempt: this attempt is running here already"
        if len(self._tasks) >= self._tools.max_waiting:
            return FailureCode.OVERLOADED, f"{len(self._tasks)} pictures are being encoded already"
        if self._num_file_bytes and self._num_file_bytes + len(encode.image) > MAX_FILE_BYTES:
            return (
                FailureCode.OVERLOADED,
                f"{self._num_file_bytes} bytes of pictures are being encoded already",
            )
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
        except _CannotEncode as error:
            event = _failed(encode, FailureCode.INTERNAL, str(error))
        except Exception as error:
            logger.exception("encode_failed request_id=%s", encode.key.request_id)
            event = _failed(encode, FailureCode.INTERNAL, f"encoding failed: {error!r}; see the worker's log")
        self._publish([event])

    async def _do(self, encode: Encode, arrived_s: float) -> ImagesEncoded:
        work = EncodeWork(encode, await self._plan(encode), arrived_s)
        self._host.need(encode.key, list(enumerate(work.tiles)), encode.cache_salt, work)
        try:
            await self._fill_all(work)
            self._num_tiles.pop(encode.key, None)
            here = self._worker_id, self._host.incarnation
            if self._prefill_host is not None and (encode.prefill_worker, encode.prefill_incarnation) == here:
                self._copy(work, self._prefill_host)
                return self._report(work, 0.0, None)
            began_s = self._clock()
            report = await self._send(work)
            return self._report(work, self._clock() - began_s, report)
        finally:
            self._host.forget(encode.key)

    async def _plan(self, encode: Encode) -> ImagePlan:
        """How the picture is cut, checked against what the gateway says of it and what there is room for.

        Raises ImageRejected, _CannotEncode.
        """
        plan = self._tools.plan(encode.width, encode.height)
        if not 0 <= encode.tile_lo < encode.tile_hi <= len(plan.tiles):
            raise ImageRejected(
                f"tiles {encode.tile_lo} to {encode.tile_hi} of a picture of {len(plan.tiles)} were asked for"
            )
        digest = await asyncio.to_thread(image_digest, encode.image)
        keys = tuple(
            embedding_key(digest, self._tools.processor_digest, tile, encode.reduction)
            for tile in range(encode.tile_lo, encode.tile_hi)
        )
        if keys != encode.keys:
            raise _CannotEncode(
                "the gateway names its embeddings otherwise than this worker: another file, or another model"
            )
        tiles = plan.tiles[encode.tile_lo : encode.tile_hi]
        problem = self._host.store.problem(
            [ImageTile(0, tile.num_embeddings, key) for tile, key in zip(tiles, keys, strict=True)]
        )
        if problem is not None:
            # Encode workers are taken to have as much room, each.
            raise ImageRejected(problem)
        return plan

    async def _fill_all(self, work: EncodeWork) -> None:
        """Until all of its tiles are in this worker's pool, whoever computed them."""
        encode = work.encode
        num_fills = 0
        while not work.is_whole:
            if not work.to_compute:
                work.news.clear()
                await work.news.wait()
                continue
            tiles, work.to_compute = sorted(work.to_compute), []
            num_fills += 1
            fill_id = f"encode-{encode.key.request_id}-{encode.key.attempt}-{num_fills}"
            block_ids = self._host.begin_fill(fill_id, encode.key, tiles)
            try:
                kept = await self._compute(work, tiles, block_ids)
            except BaseException:
                self._host.fill_failed(fill_id)
                raise
            self._host.filled(fill_id, kept)

    async def _compute(
        self, work: EncodeWork, tiles: list[int], block_ids: tuple[int, ...]
    ) -> list[KeptEmbeddings] | None:
        """Encode these tiles, indices from tile_lo, and put the embeddings into the first of these blocks.

        Returns which embeddings there are; None: all.
        """
        encode, plan = work.encode, work.plan
        numbers = [encode.tile_lo + tile for tile in tiles]
        num_patches = [plan.tiles[number].num_patches for number in numbers]
        num_bytes = SOURCE_PIXEL_BYTES * plan.width * plan.height + sum(num_patches) * self._tools.patch_bytes
        async with self._pixel_bytes.take(num_bytes):
            if work.began_s is None:
                work.began_s = self._clock()
            prepared = await self._prepared(work, numbers)
            found = await self.loop.encode(prepared, num_patches, work.reduction)
        num_blocks = sum(blocks_needed(len(embeddings), BLOCK_SIZE) for embeddings in found.embeddings)
        self._host.memory.write(block_ids[:num_blocks], found.embeddings)
        work.num_computed += len(tiles)
        work.encode_s += found.encode_s
        if work.reduction is None:
            return None
        kept = [one for one in found.kept if one is not None]
        work.kept.update(zip(tiles, kept, strict=True))
        return kept

    async def _prepared(self, work: EncodeWork, numbers: list[int]) -> list[torch.Tensor]:
        """These tiles as the encoder takes them. The pixels are gone when this returns."""
        encode, plan = work.encode, work.plan
        began_s = time.perf_counter()
        pixels = await self._decode(encode.image, encode.media_type)
        work.decode_s += time.perf_counter() - began_s
        if pixels.shape[:2] != (plan.height, plan.width):
            height, width = pixels.shape[:2]
            raise ImageRejected(
                f"its header says {plan.width}x{plan.height} pixels, and it has {width}x{height}"
            )
        return await asyncio.to_thread(self._prepare, pixels, plan, numbers)

    def _prepare(self, pixels: NDArray[np.uint8], plan: ImagePlan, numbers: list[int]) -> list[torch.Tensor]:
        lo, hi = min(numbers), max(numbers) + 1
        prepared = self._tools.encoder.prepare(pixels, plan, range(lo, hi))
        return [prepared[number - lo] for number in numbers]

    def _copy(self, work: EncodeWork, prefill_host: EmbeddingHost) -> None:
        """All its tiles to where a sequence of this worker needs them. In one go, so that nobody else comes between."""
        name = work.transfer
        try:
            block_ids = prefill_host.begin_arrival(name)
        except NotNeeded as refusal:
            logger.info("embeddings_not_needed transfer_id=%s reason=%s", name.transfer_id, refusal)
            return
        source = work.block_ids
        prefill_host.memory.copy(block_ids[: len(source)], self._host.memory, source)
        prefill_host.filled(name.transfer_id, work.kept_in_order or None)

    async def _send(self, work: EncodeWork) -> TransferReport | None:
        """All its tiles to the prefill worker, from the blocks that are held here. None when it needs them no more."""
        encode = work.encode
        block_ids = work.block_ids
        num_tokens = len(block_ids) * BLOCK_SIZE
        peer = self._channels.take(encode.prefill_address)
        is_lost = False
        try:
            sender = KvSender(
                self._host,
                GrpcChannel(peer.channel, EMBEDDINGS),
                transfer_id=work.transfer.transfer_id,
                block_ids=block_ids,
                num_tokens=num_tokens,
                max_tokens=num_tokens,
                token_digest=transfer_digest(encode.keys),
                peer_incarnation=encode.prefill_incarnation,
                timeout_s=encode.timeout_s - (self._clock() - work.arrived_s),
                config=self._config,
            )
            sender.kv_ready(0, 1, 0, num_tokens)
            sender.prefill_finished(to_numbers(work.kept_in_order))
            return await sender.run()
        except StreamLost:
            is_lost = True
            raise
        except TransferRefused as refusal:
            if not refusal.reason.startswith(NOT_NEEDED):
                raise
            logger.info("embeddings_not_needed reason=%s", refusal)
            return None
        finally:
            await self._channels.give_back(peer, is_lost=is_lost)

    def _report(self, work: EncodeWork, transfer_s: float, report: TransferReport | None) -> ImagesEncoded:
        encode = work.encode
        num_tiles, num_embeddings = encode.tile_hi - encode.tile_lo, work.num_embeddings
        self.num_encoded_tiles += work.num_computed
        self.num_cached_tiles += num_tiles - work.num_computed
        began_s = work.began_s if work.began_s is not None else self._clock()
        return ImagesEncoded(
            encode.key,
            num_tiles=num_tiles,
            num_cached=num_tiles - work.num_computed,
            num_embeddings=num_embeddings,
            num_bytes=num_embeddings * self._host.pool.layout.token_bytes,
            queue_s=began_s - work.arrived_s,
            decode_s=work.decode_s,
            encode_s=work.encode_s,
            transfer_s=transfer_s,
            transport=report.transport if report is not None else "",
        )


def _failed(encode: Encode, code: FailureCode, reason: str) -> RequestFailed:
    return RequestFailed(encode.key, code, reason)
