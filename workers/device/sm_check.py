"""Whether a part of a GPU computes as the whole does: small green contexts made cuBLAS fail, once only from a second thread."""

import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

logger = logging.getLogger(__name__)

#: Rows of the left side: a decode batch, and a chunk of a prompt.
NUM_ROWS = (64, 1024)
SIZE = 4096
#: Of ||out - reference|| / ||reference||, bfloat16 against float32: rounding gives 0.002.
TOLERANCE = 0.01


class PartCheck:
    """Products of random matrices, computed on all parts at once, from this thread and then from another, and compared.

    To be closed: it holds about 100 MB, and the library's workspaces of every stream that it used, 32 MiB each on Hopper.
    """

    def __init__(self, device_index: int) -> None:
        self._device = torch.device("cuda", device_index)
        generator = torch.Generator(self._device).manual_seed(torch.seed() % 2**63)
        make = {"device": self._device, "dtype": torch.bfloat16, "generator": generator}
        self._right = torch.randn((SIZE, SIZE), **make)  # type: ignore[call-overload]
        self._left = [torch.randn((rows, SIZE), **make) for rows in NUM_ROWS]  # type: ignore[call-overload]
        self._expected = [left.float() @ self._right.float() for left in self._left]
        torch.cuda.synchronize(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._left.clear()
        self._expected.clear()
        del self._right
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def problem(self, streams: Sequence[torch.cuda.Stream]) -> str:
        """What is wrong with the parts of these streams; empty when nothing is."""
        found = self._compute(streams)
        if found:
            return found
        said: list[str] = []

        def run() -> None:
            torch.cuda.set_device(self._device)
            said.append(self._compute(streams))

        thread = threading.Thread(target=run, name="sm-check")
        thread.start()
        thread.join()
        return f"from a second thread: {said[0]}" if said[0] else ""

    def _compute(self, streams: Sequence[torch.cuda.Stream]) -> str:
        try:
            results = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append([self._product(left) for left in self._left])
            for stream in streams:
                stream.synchronize()
            for index, outputs in enumerate(results):
                worst = max(
                    _error(out, expected) for out, expected in zip(outputs, self._expected, strict=True)
                )
                # Not "above": NaN is neither.
                if not worst < TOLERANCE:
                    return f"part {index} computed a product with an error of {worst:.3g}"
        except RuntimeError as error:
            return f"a product failed: {str(error).splitlines()[0]}"
        return ""

    def _product(self, left: torch.Tensor) -> torch.Tensor:
        out = torch.full((left.shape[0], SIZE), float("nan"), device=left.device, dtype=left.dtype)
        return torch.mm(left, self._right, out=out)


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())
