"""MAIN LOOP of encoding: batches of tiles, over pictures and requests, through the vision model, one after the other."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from workers.embeddings.batching import next_batch
from workers.model.vision.encoder import VisionEncoder


@dataclass(frozen=True, slots=True)
class Encoded:
    """Of one call: embeddings of each tile, and how long its batches took, in seconds."""

    embeddings: list[torch.Tensor]
    encode_s: float


@dataclass(eq=False, slots=True)
class _Job:
    pixels: torch.Tensor
    num_patches: int
    #: The embeddings, and the number and the seconds of the batch that they came from.
    done: "asyncio.Future[tuple[torch.Tensor, int, float]]"


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

    @property
    def num_waiting(self) -> int:
        """Tiles that wait for a batch."""
        return len(self._jobs)

    async def encode(self, pixels: Sequence[torch.Tensor], num_patches: Sequence[int]) -> Encoded:
        """Embeddings of these tiles, [num_embeddings, hidden_size] fp32 each; `run` must be running.

        Cancelled it takes back what waits; what is in a batch is computed for nobody.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(one, num, loop.create_future()) for one, num in zip(pixels, num_patches, strict=True)]
        self._jobs.extend(jobs)
        self._has_jobs.set()
        try:
            results = await asyncio.gather(*(job.done for job in jobs))
        finally:
            for job in jobs:
                job.done.cancel()
        batches = {number: batch_s for _, number, batch_s in results}
        return Encoded([found for found, _, _ in results], sum(batches.values()))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._has_jobs.wait()
            batch = self._take_batch()
            if batch:
                await self._run_batch(batch)
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
            found = await loop.run_in_executor(
                self._thread, self._encoder.encode, [job.pixels for job in batch]
            )
        except Exception as error:  # noqa: BLE001 - handed to whoever asked; the loop goes on
            if len(batch) > 1:
                # One of them is at fault, and the others are not to suffer for it.
                for job in batch:
                    await self._run_batch([job])
            elif not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        batch_s = time.perf_counter() - began_s
        self.num_batches += 1
        self.num_patches += sum(job.num_patches for job in batch)
        for job, embeddings in zip(batch, found, strict=True):
            if not job.done.done():
                job.done.set_result((embeddings, self.num_batches, batch_s))
