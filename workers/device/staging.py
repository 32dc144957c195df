"""Arrays of a step, brought to a device by one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

#: Offsets of arrays in the buffer are multiples of this many bytes.
ALIGNMENT = 16
#: Steps whose arrays may be on their way at the same time.
NUM_SLOTS = 3


def layout(arrays: Sequence[NDArray[np.generic]]) -> tuple[list[int], int]:
    """Where each array begins in one buffer, in bytes, and how long the buffer is. Pure."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


@dataclass(slots=True)
class _Slot:
    host: torch.Tensor
    #: Recorded behind the last copy out of it; None before, and on a CPU.
    event: torch.cuda.Event | None = None


class Staging:
    """Page-locked memory in which arrays are put side by side, and copied from asynchronously.

    Used by one thread, with one stream. It grows to what the largest step needs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = [_Slot(torch.empty(0, dtype=torch.uint8)) for _ in range(NUM_SLOTS)]
        self._next = 0

    def upload(
        self, arrays: Sequence[NDArray[np.generic]], buffer: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The same arrays on the device, each contiguous, as views of one new buffer, or of the beginning of `buffer`.

        buffer: [at least what `layout` says] uint8 on the device.
        """
        offsets, num_bytes = layout(arrays)
        slot = self._slot(num_bytes)
        host = slot.host.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if buffer is None:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        buffer[:num_bytes].copy_(slot.host[:num_bytes], non_blocking=True)
        if self._device.type == "cuda":
            slot.event = slot.event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.event.record()
        return views(buffer, arrays)

    def _slot(self, num_bytes: int) -> _Slot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % NUM_SLOTS
        if slot.event is not None:
            # That copy was of some steps ago: it has ended, but for a device that lags far behind.
            slot.event.synchronize()
        if len(slot.host) < num_bytes:
            is_pinned = self._device.type == "cuda"
            slot.host = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        return slot


def views(buffer: torch.Tensor, arrays: Sequence[NDArray[np.generic]]) -> list[torch.Tensor]:
    """Where `upload` puts arrays of these shapes and dtypes in a buffer."""
    offsets, _ = layout(arrays)
    return [
        buffer[offset : offset + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]
