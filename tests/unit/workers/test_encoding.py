"""Encoding: what is for this very worker, what is needed no more, whose fault it is, and what is held at a time."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvtransfer.config import KvTransferConfig
from tests.support.waiting import until
from workers.api import (
    Encode,
    Event,
    FailureCode,
    ImageReduction,
    ImagesEncoded,
    ImageTile,
    RequestFailed,
    RequestId,
    RequestKey,
    WorkerId,
)
from workers.embeddings import encoding
from workers.embeddings.encoding import SOURCE_PIXEL_BYTES, Encoding, VisionTools
from workers.embeddings.host import EmbeddingHost
from workers.embeddings.kept import KeptEmbeddings
from workers.embeddings.memory import BLOCK_SIZE, embedding_layout, host_memory
from workers.embeddings.names import embedding_key, image_digest
from workers.kv_channels import PeerChannels
from workers.model.vision.plan import ImagePlan, TilePlan

HIDDEN_SIZE, WIDTH, HEIGHT = 8, 100, 50
#: Two tiles, of two blocks each.
NUM_TILES, NUM_EMBEDDINGS = 2, BLOCK_SIZE + 3
PICTURE_BYTES = SOURCE_PIXEL_BYTES * WIDTH * HEIGHT
HERE = WorkerId("here")


def plan(width: int, height: int) -> ImagePlan:
    return ImagePlan(width, height, (TilePlan(2, 2, NUM_EMBEDDINGS),) * NUM_TILES, "")


class FakeEncoder:
    """All embeddings of tile i are 10 * the picture's first value + i. Nothing is encoded while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_prepared = 0

    def prepare(self, image: NDArray[np.uint8], _plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        self.num_prepared += 1
        return [torch.tensor([10.0 * float(image[0, 0, 0]) + tile]) for tile in tiles]

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.gate.wait()
        return [one.expand(NUM_EMBEDDINGS, HIDDEN_SIZE) for one in pixels]

    def encode_reduced(
        self, pixels: torch.Tensor, _reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        return pixels.expand(2, HIDDEN_SIZE), KeptEmbeddings((1, 4), (False, True))


class Pixels(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """An array that can be watched."""


class Reader:
    """A sequence of this worker that needs a picture's embeddings."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.blocks: dict[int, tuple[int, ...]] = {}

    def wanted(self, tiles: tuple[int, ...]) -> None:
        self.asked.append(tiles)

    def ready(self, tile: int, block_ids: tuple[int, ...], _kept: KeptEmbeddings | None) -> None:
        self.blocks[tile] = block_ids


def host(num_blocks: int) -> EmbeddingHost:
    layout = embedding_layout(HIDDEN_SIZE, model_digest="m", processor_digest="p")
    memory = host_memory(layout, num_blocks)
    return EmbeddingHost(memory, 1, lambda _: None, lambda _: None, KvTransferConfig())


class World:
    """The encode phase of a worker that prefills too."""

    def __init__(self, num_blocks: int, max_pixel_bytes: int) -> None:
        self.encoder = FakeEncoder()
        self.encode_host, self.prefill_host = host(num_blocks), host(16)
        self.channels = PeerChannels(1)
        self.events: list[Event] = []
        self.pictures: list[weakref.ref[Pixels]] = []
        tools = VisionTools(self.encoder, plan, "p", patch_bytes=0, patch_budget=64, max_waiting=64)
        self.encoding = Encoding(
            tools,
            self.encode_host,
            self.prefill_host,
            self._decode,
            self.channels,
            self.events.extend,
            KvTransferConfig(),
            HERE,
            max_pixel_bytes=max_pixel_bytes,
        )

    async def _decode(self, data: bytes, _media_type: str) -> NDArray[np.uint8]:
        pixels = np.full((HEIGHT, WIDTH, 3), data[0], np.uint8).view(Pixels)
        self.pictures.append(weakref.ref(pixels))
        return pixels

    def need(self, encode: Encode) -> Reader:
        """A sequence of this worker needs what this brings."""
        sequence = Reader()
        tiles = [(i, ImageTile(0, NUM_EMBEDDINGS, key)) for i, key in enumerate(encode.keys)]
        self.prefill_host.need(encode.prefill, tiles, "", sequence)
        return sequence

    async def answer(self, number: int = 1) -> Event:
        """The last of so many answers."""
        await until(lambda: len(self.events) >= number, f"{number} answers")
        return self.events[number - 1]


def encode(number: int) -> Encode:
    """A picture of its own, for a sequence of this worker."""
    image, request_id = bytes([number]), RequestId(f"r{number}")
    digest = image_digest(image)
    return Encode(
        RequestKey(request_id, 100 + number),
        image,
        "",
        WIDTH,
        HEIGHT,
        tile_lo=0,
        tile_hi=NUM_TILES,
        keys=tuple(embedding_key(digest, "p", tile) for tile in range(NUM_TILES)),
        prefill=RequestKey(request_id, number),
        first_tile=0,
        prefill_worker=HERE,
        prefill_address="nowhere",
        prefill_incarnation=1,
        timeout_s=30.0,
    )


@asynccontextmanager
async def world(num_blocks: int, max_pixel_bytes: int) -> AsyncIterator[World]:
    it = World(num_blocks, max_pixel_bytes)
    running = asyncio.create_task(it.encoding.run())
    try:
        yield it
        for one in (it.encode_host, it.prefill_host):
            one.check_invariants()
    finally:
        it.encoder.gate.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await it.encoding.close()
        await it.channels.close()


def run(
    scenario: Callable[[World], Awaitable[None]], num_blocks: int = 64, max_pixel_bytes: int = 2**20
) -> None:
    async def main() -> None:
        async with world(num_blocks, max_pixel_bytes) as it:
            await scenario(it)

    asyncio.run(main())


def test_what_is_for_this_very_worker_is_copied_to_where_its_sequence_reads_it() -> None:
    async def scenario(it: World) -> None:
        sequence = it.need(encode(3))
        it.encoding.submit(encode(3))
        answer = await it.answer()
        assert isinstance(answer, ImagesEncoded)
        assert (answer.num_tiles, answer.num_cached, answer.transport) == (2, 0, "")
        for tile in range(NUM_TILES):
            read = it.prefill_host.memory.read([(sequence.blocks[tile], 0, NUM_EMBEDDINGS)])
            assert torch.equal(read, torch.full((NUM_EMBEDDINGS, HIDDEN_SIZE), 30.0 + tile))
        # It holds nothing of what Encodes need, and these keep it for the next one.
        counts = it.encode_host.store.counts()
        assert counts.num_cached + counts.num_free == counts.num_blocks
        assert counts.num_cached == 4

    run(scenario)


def test_reduced_embeddings_are_copied_with_which_they_are() -> None:
    reduction = ImageReduction(merge_threshold=0.5)

    async def scenario(it: World) -> None:
        digest = image_digest(bytes([3]))
        keys = tuple(embedding_key(digest, "p", tile, reduction) for tile in range(NUM_TILES))
        reduced = replace(encode(3), reduction=reduction, keys=keys)
        sequence = it.need(reduced)
        it.encoding.submit(reduced)
        answer = await it.answer()
        assert isinstance(answer, ImagesEncoded)
        assert answer.num_embeddings == 4
        for tile in range(NUM_TILES):
            (block_id,) = sequence.blocks[tile]
            read = it.prefill_host.memory.read([((block_id,), 0, 2)])
            assert torch.equal(read, torch.full((2, HIDDEN_SIZE), 30.0 + tile))

    run(scenario)


def test_what_nobody_needs_any_more_is_no_failure() -> None:
    async def scenario(it: World) -> None:
        it.encoding.submit(encode(3))
        assert isinstance(await it.answer(), ImagesEncoded)

    run(scenario)


def test_encodes_do_not_wait_for_what_sequences_hold() -> None:
    async def scenario(it: World) -> None:
        # Sequences hold all there is, and wait for pictures that are encoded elsewhere.
        for number in range(4):
            it.need(encode(number))
        assert it.prefill_host.store.counts().num_free == 0
        it.encoding.submit(replace(encode(9), prefill_incarnation=2))
        await until(lambda: it.encoder.num_prepared == 1, "it is encoded")

    run(scenario, num_blocks=4)


def test_only_so_many_pictures_are_in_memory_at_a_time() -> None:
    async def scenario(it: World) -> None:
        it.encoder.gate.clear()
        for number in range(8):
            it.encoding.submit(encode(number))
        await until(lambda: it.encoder.num_prepared == 2, "two pictures are prepared")
        # What the encoder takes was made of them.
        await until(lambda: not any(one() is not None for one in it.pictures), "no pixels are held")
        assert len(it.pictures) == 2
        it.encoder.gate.set()
        await it.answer(8)
        assert len(it.pictures) == 8
        assert all(isinstance(event, ImagesEncoded) for event in it.events)

    run(scenario, max_pixel_bytes=2 * PICTURE_BYTES)


def test_what_this_worker_cannot_is_left_to_others() -> None:
    async def scenario(it: World) -> None:
        it.encoding.submit(replace(encode(1), keys=encode(2).keys))
        answer = await it.answer()
        assert isinstance(answer, RequestFailed)
        assert answer.code is FailureCode.INTERNAL
        assert "names its embeddings otherwise" in answer.reason

    run(scenario)


def test_a_picture_that_never_fits_is_told_to_its_sender() -> None:
    async def scenario(it: World) -> None:
        it.encoding.submit(encode(1))
        answer = await it.answer()
        assert isinstance(answer, RequestFailed)
        assert answer.code is FailureCode.INVALID
        assert "need 4 blocks" in answer.reason
        assert "send fewer or smaller pictures" in answer.reason

    run(scenario, num_blocks=3)


def test_only_so_many_bytes_of_files_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # The files here are of one byte.
    monkeypatch.setattr(encoding, "MAX_FILE_BYTES", 2)

    async def scenario(it: World) -> None:
        it.encoder.gate.clear()
        for number in range(3):
            it.encoding.submit(encode(number))
        refused = await it.answer()
        assert isinstance(refused, RequestFailed)
        assert (refused.key.request_id, refused.code) == ("r2", FailureCode.OVERLOADED)
        it.encoder.gate.set()
        await it.answer(3)
        # There is room again, and one file is taken however large it is.
        monkeypatch.setattr(encoding, "MAX_FILE_BYTES", 0)
        await until(lambda: it.encoding.num_running == 0, "all have ended")
        it.encoding.submit(encode(4))
        assert isinstance(await it.answer(4), ImagesEncoded)

    run(scenario)
