"""The encode phase on a GPU: a vision model on a stream of its own, so that it computes beside the steps of the engine.

Tiles of one size are computed by CUDA graphs, one for each number of tiles: launched kernel by kernel, one tile takes a host
longer than the GPU. On a CPU the same code runs without streams and graphs, for tests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from workers.api import ImageReduction
from workers.device.forward import no_collection
from workers.device.step_graph import captured
from workers.embeddings.kept import KeptEmbeddings
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.idefics3 import Idefics3Encoder
from workers.model.vision.plan import ImagePlan


class DeviceEncoder:
    """See VisionEncoder.

    encoder: with its weights on the device. max_tiles: that one graph computes, where tiles have one size. `encode` and
    `encode_reduced` are called by one thread, which waits for what they return; nobody else does, and what is done with it
    is to be put on the default stream.
    """

    def __init__(
        self, encoder: VisionEncoder, device: torch.device, dtype: torch.dtype, *, max_tiles: int
    ) -> None:
        self._encoder = encoder
        self._device = device
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        # The thread that waits is to leave its core to others.
        self._ended = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]
        self._tiles: TileGraphs | None = None
        if isinstance(encoder, Idefics3Encoder):
            self._tiles = TileGraphs(encoder, device, dtype, max_tiles)

    def prepare(self, image: NDArray[np.uint8], plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        """See VisionEncoder; on the CPU."""
        return self._encoder.prepare(image, plan, tiles)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See VisionEncoder."""
        if not pixels:
            return []
        with self._on_stream():
            if self._tiles is not None:
                found = self._tiles.encode(pixels)
            else:
                found = self._encoder.encode([self._upload(one) for one in pixels])
            self._wait(found)
        return found

    @torch.inference_mode()
    def encode_reduced(
        self, pixels: torch.Tensor, reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        """See VisionEncoder."""
        with self._on_stream():
            embeddings, kept = self._encoder.encode_reduced(self._upload(pixels), reduction)
            self._wait([embeddings])
        return embeddings, kept

    @torch.inference_mode()
    def warm_up(self, largest: Sequence[torch.Tensor], progress: Callable[[str, float], None]) -> None:
        """Capture, and compute a batch of one and the largest there is: what that takes of memory is then taken.

        largest: pixels of the tiles of such a batch.
        """
        with self._on_stream():
            if self._tiles is not None:
                self._tiles.capture(lambda done: progress("capturing batches of tiles", done))
        progress("encoding a first picture", 0.0)
        for batch in (largest[:1], largest):
            self.encode(batch)
        if self._tiles is not None:
            self.encode_reduced(largest[0], ImageReduction(merge_threshold=1.0))

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def _upload(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return pixels
        return pixels.pin_memory().to(self._device, non_blocking=True)

    def _wait(self, found: Sequence[torch.Tensor]) -> None:
        """Until they are there."""
        if self._stream is None or self._ended is None:
            return
        for one in found:
            # Its memory is not to be used again before what reads it there has ended.
            one.record_stream(torch.cuda.default_stream(self._device))
        self._ended.record(self._stream)
        self._ended.synchronize()


class TileGraphs:
    """Batches of 1 to max_tiles tiles, each captured; larger ones are computed by several, one after the other.

    All on the stream that is current. They share the memory that they read, write and compute in.
    """

    def __init__(
        self, encoder: Idefics3Encoder, device: torch.device, dtype: torch.dtype, max_tiles: int
    ) -> None:
        config = encoder.config
        self._encoder = encoder
        self._max_tiles = max_tiles
        tile = 3, config.tile_size, config.tile_size
        self._pixels = torch.zeros(max_tiles, *tile, device=device)
        self._embeddings = torch.zeros(
            max_tiles, config.tile_embeddings, config.text_hidden_size, dtype=dtype, device=device
        )
        #: By the number of tiles; none on a CPU.
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of each tile, [tile_embeddings, text_hidden_size], put on the stream."""
        found: list[torch.Tensor] = []
        for first in range(0, len(pixels), self._max_tiles):
            some = list(pixels[first : first + self._max_tiles])
            # Its memory is kept until the copy has ended, and then used again.
            host = torch.empty(len(some), *self._pixels.shape[1:], pin_memory=self._pixels.is_cuda)
            torch.stack(some, out=host)
            self._pixels[: len(some)].copy_(host, non_blocking=True)
            if len(some) in self._graphs:
                self._graphs[len(some)].replay()
            else:
                self._run(len(some))
            found.extend(self._embeddings[: len(some)].clone())
        return found

    def capture(self, progress: Callable[[float], None]) -> None:
        """All sizes, the largest first: the others fit into the memory that it took."""
        if not self._pixels.is_cuda:
            return
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream(self._pixels.device)
        with no_collection():
            for num_tiles in range(self._max_tiles, 0, -1):
                progress(1 - num_tiles / self._max_tiles)
                (graph,) = captured(partial(self._run, num_tiles), pool, stream)
                self._graphs[num_tiles] = graph

    def _run(self, num_tiles: int, _cut: Callable[[], None] | None = None) -> None:
        """See captured; it is one piece."""
        self._embeddings[:num_tiles].copy_(self._encoder.embed(self._pixels[:num_tiles]))
