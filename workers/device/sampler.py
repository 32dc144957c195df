"""Tokens are chosen where the logits are; the host hears of them when they are there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phasewise_kernels.sample.op import sample
from workers.api import SamplingParams
from workers.device.staging import Staging
from workers.engine.sampling.rows import SampleRow
from workers.engine.sequence import NO_TOKEN


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """One token for each row, NO_TOKEN where none could be chosen. on_device: [num_rows] int64."""

    on_device: torch.Tensor
    _on_host: torch.Tensor
    _event: torch.cuda.Event | None

    def seconds_since(self, before: "DeviceTokens") -> float | None:
        """Between the two, of which both are there; None on a CPU."""
        if self._event is None or before._event is None:
            return None
        return float(before._event.elapsed_time(self._event)) / 1e3

    @property
    def is_there(self) -> bool:
        """`wait` will not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[int]:
        """Until the device has chosen them."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._on_host.tolist()
        return tokens


class DeviceSampler:
    """Samples rows by temperature, top_k, top_p and min_p; other options are not looked at. Used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)

    def begin(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> DeviceTokens:
        """Choose the next tokens; nothing is waited for. logits: [len(rows), vocab_size], contiguous, on the device."""
        if all(row.sampling.temperature == 0 for row in rows):
            tokens = _largest(logits)
        else:
            tokens = self._drawn(logits, rows)
        if self._device.type != "cuda":
            return DeviceTokens(tokens, tokens, None)
        on_host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return DeviceTokens(tokens, on_host, event)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compile what chooses from logits like these, [1, vocab_size], greedily and by a draw."""
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(max_new_tokens=1, temperature=temperature)
            self.begin(logits, [SampleRow(sampling, position=0)]).wait()

    def _drawn(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        temperature, top_k, top_p, min_p, seeds, positions, streams = self._staging.upload(_options(rows))
        return sample(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            streams=streams,
        )


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit, the first among equals; NO_TOKEN for a row with a NaN, with +inf or nothing but -inf."""
    values, tokens = logits.max(dim=-1)
    return torch.where(values.isfinite(), tokens, NO_TOKEN)


def _options(rows: Sequence[SampleRow]) -> list[np.ndarray[tuple[int], np.dtype[np.generic]]]:
    """In the order of `sample`."""
    samplings = [row.sampling for row in rows]
    return [
        np.array([one.temperature for one in samplings], np.float64),
        np.array([one.top_k for one in samplings], np.int64),
        np.array([one.top_p for one in samplings], np.float64),
        np.array([one.min_p for one in samplings], np.float64),
        np.array([one.seed for one in samplings], np.uint64).view(np.int64),
        np.array([row.position for row in rows], np.int64),
        np.array([row.stream for row in rows], np.int64),
    ]
