"""One process that computes one phase on its part of the SMs, over memory that a resident owner has.

It starts as a spare: the interpreter is up and torch is imported, which takes seconds, but the GPU was not touched yet, so that its
share can still be chosen. `Begin` fixes the share; the rest of the switch is then a context, a mapping and a warm-up.

What it computes is the caller's: `Work`, made in the process. The parent sees only when a step has ended and what is handed over.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from workers.device.resident_memory import AttachedMemory, attach, device_of
from workers.device.shared_blocks import SharedBlocks

END_S = 30.0


@dataclass(frozen=True, slots=True)
class Opened:
    """The GPU and its memory as this process has them. Seconds: of its first use of the GPU, and of mapping. num_sms: that CUDA tells of."""

    memory: AttachedMemory
    context_s: float
    map_s: float
    num_sms: int


class Work(Protocol):
    """What one phase does, in its own process. Methods are called by one thread, one at a time."""

    def warm_up(self) -> None:
        """What would make the first step slow: libraries, kernels, graphs. Nothing that others see."""

    def adopt(self, state: Any) -> None:
        """Go on with what `hand_over` of another process gave; None: nothing is left of it."""

    def step(self) -> bool:
        """One iteration, until its results are in memory; False when there is nothing to do now."""

    def hand_over(self) -> Any:
        """All that the next process needs, between two steps; picklable, without tensors. `adopt` of it may come, or the end."""


#: Both of a module, so that they can be named to another process. int: the owner of the blocks that it takes; bytes: a manifest.
WorkMaker = Callable[[AttachedMemory, SharedBlocks, int], Work]
Opener = Callable[[bytes], Opened]


@dataclass(frozen=True, slots=True)
class Begin:
    """environment: before the GPU is used (mps.MpsDaemon.environment)."""

    number: int
    environment: Mapping[str, str]
    manifest: bytes
    blocks_path: Path


@dataclass(frozen=True, slots=True)
class Adopt:
    """Go on with this."""

    state: Any


@dataclass(frozen=True, slots=True)
class HandOver:
    """After the step that runs."""


@dataclass(frozen=True, slots=True)
class Ready:
    """It can compute; see Opened. warm_up_s: of the work."""

    context_s: float
    map_s: float
    warm_up_s: float
    num_sms: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """Its first step since it adopted has ended, at this time of the machine's monotonic clock."""

    at_s: float


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What it had."""

    state: Any


@dataclass(frozen=True, slots=True)
class Spare:
    """It waits for `Begin`."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Its end of the pipe is closed. Made by the reader, not sent."""

    reason: str


class ShareProcess:
    """The parent's side. A child that ends when this process does."""

    def __init__(self, make: WorkMaker, opener: Opener) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=run, args=(make, opener, theirs), name="share-process", daemon=True
        )
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        #: Ready when it has ended.
        self.sentinel = self._process.sentinel

    def send(self, message: Begin | Adopt | HandOver) -> None:
        """Where it has ended nothing happens: that is told by `receive`."""
        with suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> Spare | Ready | Stepped | HandedOver | Ended:
        """The next message; waits for it."""
        try:
            message: Spare | Ready | Stepped | HandedOver = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(END_S)
            return Ended(f"status {self._process.exitcode}")
        return message

    def release(self) -> None:
        """Close the pipe, upon which it ends between two steps."""
        self.pipe.close()

    def end(self) -> None:
        """The same, and wait for it; kill it when it does not end."""
        self.release()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()

    def kill(self) -> None:
        """SIGKILL. `receive` tells when it is gone."""
        self._process.kill()


def run(make: WorkMaker, opener: Opener, pipe: Connection) -> None:
    """What the process does, until the other end of the pipe is closed."""
    try:
        pipe.send(Spare())
        _serve(make, opener, pipe, pipe.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # Not needed any more, or the parent has ended.
        return


def open_gpu(manifest: bytes) -> Opened:
    """The first use of the GPU, and what the owner shares. Raises ResidentMemoryGone."""
    began_s = time.monotonic()
    torch.cuda.set_device(device_of(manifest))
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    context_s, began_s = _since(began_s)
    memory = attach(manifest)
    map_s, _ = _since(began_s)
    return Opened(
        memory,
        context_s,
        map_s,
        torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
    )


def _serve(make: WorkMaker, opener: Opener, pipe: Connection, begin: Begin) -> None:
    os.environ.update(begin.environment)
    opened = opener(begin.manifest)
    began_s = time.monotonic()
    work = make(opened.memory, SharedBlocks(begin.blocks_path), begin.number)
    work.warm_up()
    warm_up_s, _ = _since(began_s)
    pipe.send(Ready(opened.context_s, opened.map_s, warm_up_s, opened.num_sms))
    _loop(work, pipe)


def _loop(work: Work, pipe: Connection) -> None:
    is_computing = is_told = False
    is_idle = True
    while True:
        if not is_computing or is_idle or pipe.poll():
            message = pipe.recv() if not is_computing or pipe.poll(0.001) else None
            if isinstance(message, Adopt):
                work.adopt(message.state)
                is_computing, is_told = True, False
            elif isinstance(message, HandOver) and is_computing:
                pipe.send(HandedOver(work.hand_over()))
                is_computing = False
        if is_computing:
            is_idle = not work.step()
            if not is_told and not is_idle:
                is_told = True
                pipe.send(Stepped(time.monotonic()))


def _since(began_s: float) -> tuple[float, float]:
    now_s = time.monotonic()
    return now_s - began_s, now_s
