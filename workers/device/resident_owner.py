"""The process that owns weights and KV pool and computes nothing: as long as it lives, workers may come and go."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch

from workers.device.capability import PIPE_DIRECTORY
from workers.device.resident_memory import ResidentMemory
from workers.errors import ResidentMemoryGone

#: Makes the tensors; of a module, so that it can be named to another process.
Maker = Callable[[], Mapping[str, torch.Tensor]]
#: Loading a large model takes minutes.
START_S, END_S = 900.0, 30.0


class ResidentOwner:
    """A child of this process that holds what `make` gave. It ends with `stop`, and by itself when this process ends.

    It is no client of MPS, so that a fault of one does not take its memory. manifest: what `resident_memory.attach` takes.
    Raises ResidentMemoryGone when it does not come so far, with what stopped it.
    """

    def __init__(self, make: Maker) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=own, args=(make, theirs), name="resident-owner", daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        try:
            answer = self._pipe.recv() if self._pipe.poll(START_S) else f"nothing within {START_S:g} s"
        except EOFError:
            self._process.join(END_S)
            answer = f"it ended with status {self._process.exitcode}"
        if not isinstance(answer, bytes):
            self.stop()
            raise ResidentMemoryGone(self.pid, str(answer))
        self.manifest = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        """Whether others can still map its memory."""
        return self._process.is_alive()

    def stop(self) -> None:
        """Its memory is free once nobody maps it any more."""
        self._pipe.close()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()


def own(make: Maker, pipe: Connection) -> None:
    """What the process does: make them, tell of them, and keep them until the other end of the pipe is closed."""
    os.environ.pop(PIPE_DIRECTORY, None)
    try:
        memory = ResidentMemory(make())
    except Exception as error:
        pipe.send(repr(error))
        raise
    pipe.send(memory.manifest)
    try:
        pipe.recv()
    except EOFError:
        # Stopped, or the parent has ended.
        del memory
