"""MAIN LOOP of encoding: batches of tiles, over pictures and requests, through the vision model, one after the other."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from workers.api import ImageReduction
from workers.embeddings.batching import next_batch
from workers.embeddings.kept import KeptEmbeddings
from workers.latency_model import EncodeModel
from workers.model.vision.encoder import VisionEncoder


@dataclass(frozen=True, slots=True)
class Encoded:
    """Of one call: embeddings of each tile, which they are, and how long they took, in seconds.

    kept: None of a tile that has all its embeddings. encode_s: of each batch its tiles' share, by patches.
    """

    embeddings: list[torch.Tensor]
    kept: list[KeptEmbeddings | None]
    encode_s: float


#: Embeddings of a tile, which they are, and its share of the batch's seconds.
_Done = tuple[torch.Tensor, KeptEmbeddings | None, float]


@dataclass(eq=False, slots=True)
class _Job:
    pixels: torch.Tensor
    num_patches: int
    reduction: ImageReduction | None
    done: "asyncio.Future[_Done]"


class EncoderLoop:
    """A vision model and the thread that it runs in. Made and used in the loop.

    patch_budget: of one batch. What waits is bounded by its callers.
    """

    def __init__(self, encoder: VisionEncoder, patch_budget: int) -> None:
        self._encoder = encoder
        self._patch_budget = patch_budget
        self._jobs: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._has_jobs = asyncio.Event()
        #: Batches and their patches so far.
        self.num_batches = 0
        self.num_patches = 0
        #: Learns from each batch.
        self.latency = EncodeModel()
        #: From when the worker took encode up to its first batch since then, in seconds; None until that.
        self.first_batch_s: float | None = None
        self._gained_at_s: float | None = None

    def phases_changed(self, *, has_gained: bool) -> None:
        """The worker serves other phases now. has_gained: and encode is new among them."""
        self.first_batch_s = None
        self._gained_at_s = time.perf_counter() if has_gained else None

    @property
    def num_waiting(self) -> int:
        """Tiles that wait for a batch."""
        return len(self._jobs)

    async def encode(
        self,
        pixels: Sequence[torch.Tensor],
        num_patches: Sequence[int],
        reduction: ImageReduction | None = None,
    ) -> Encoded:
        """Embeddings of these tiles, [num_embeddings, hidden_size] fp32 each; `run` must be running.

        Cancelled it takes back what waits; what is in a batch is computed for nobody.
        """
        loop = asyncio.get_running_loop()
        jobs = [
            _Job(one, num, reduction, loop.create_future())
            for one, num in zip(pixels, num_patches, strict=True)
        ]
        self._jobs.extend(jobs)
        self._has_jobs.set()
        try:
            results = await asyncio.gather(*(job.done for job in jobs))
        finally:
            for job in jobs:
                job.done.cancel()
        return Encoded(
            [one[0] for one in results], [one[1] for one in results], sum(one[2] for one in results)
        )

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._has_jobs.wait()
            batch = self._take_batch()
            if batch:
                await self._run_batch(batch)
            # While it waits for the next one it must keep no pixels alive.
            del batch
            if not self._jobs:
                self._has_jobs.clear()

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take_batch(self) -> list[_Job]:
        while self._jobs and self._jobs[0].done.done():
            self._jobs.popleft()
        live = [job for job in self._jobs if not job.done.done()]
        num = next_batch([job.num_patches for job in live], self._patch_budget) if live else 0
        batch = live[:num]
        self._jobs = deque(live[num:])
        return batch

    async def _run_batch(self, batch: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        began_s = time.perf_counter()
        try:
            found = await loop.run_in_executor(self._thread, self._encode, batch)
        except Exception as error:  # noqa: BLE001 - handed to whoever asked; the loop goes on
            if len(batch) > 1:
                # One of them is at fault, and the others are not to suffer for it.
                for job in batch:
                    await self._run_batch([job])
            elif not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        ended_s = time.perf_counter()
        batch_s = ended_s - began_s
        self.num_batches += 1
        if self._gained_at_s is not None:
            self.first_batch_s, self._gained_at_s = ended_s - self._gained_at_s, None
        num_patches = sum(job.num_patches for job in batch)
        self.num_patches += num_patches
        if not any(job.reduction for job in batch):
            # Those that are reduced take another way, one by one.
            self.latency.observe(num_patches, batch_s)
        for job, (embeddings, kept) in zip(batch, found, strict=True):
            if not job.done.done():
                job.done.set_result((embeddings, kept, batch_s * job.num_patches / num_patches))

    def _encode(self, batch: list[_Job]) -> list[tuple[torch.Tensor, KeptEmbeddings | None]]:
        """In the thread. Tiles that are reduced go through the encoder one by one."""
        whole = iter(self._encoder.encode([job.pixels for job in batch if job.reduction is None]))
        return [
            (next(whole), None)
            if job.reduction is None
            else self._encoder.encode_reduced(job.pixels, job.reduction)
            for job in batch
        ]
