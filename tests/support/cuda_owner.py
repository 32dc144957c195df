"""A second process that owns pools of a GPU, and does what it is told over a pipe."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan
from kvtransfer.transports.cuda_ipc import CudaPool
from tests.support.cuda_layouts import pool_tensor

#: Far above what any answer takes: the first one loads CUDA and compiles.
BOUND_S = 120.0


def serve(commands: Connection) -> None:
    """Answer (name of a method of `_Owner`, *arguments) until None comes."""
    owner = _Owner()
    while (command := commands.recv()) is not None:
        name, *arguments = command
        commands.send(getattr(owner, name)(*arguments))


class _Owner:
    def __init__(self) -> None:
        self._caches: list[torch.Tensor] = []
        self._pools: list[CudaPool] = []

    def make(self, layout: KvLayout, seed: int) -> tuple[int, bytes]:
        """Its number, and its descriptor."""
        kv_cache = pool_tensor(layout, seed).cuda()
        pool = CudaPool(kv_cache, layout)
        assert pool.ipc_problem is None, pool.ipc_problem
        self._caches.append(kv_cache)
        self._pools.append(pool)
        [offer] = pool.offers
        return len(self._pools) - 1, offer.descriptor

    def checksum(self, number: int, span: KvSpan) -> int:
        return self._pools[number].checksum(span, "cuda_ipc")

    def flip(self, number: int, byte: int) -> None:
        """One bit of this byte of the pool."""
        self._caches[number].view(-1).view(torch.uint8)[byte] ^= 1
        torch.cuda.synchronize()

    def reopen(self, number: int) -> str:
        """Why it cannot open its own pool."""
        # Only what fails is of interest here.
        from kvtransfer.errors import PoolUnreachable
        from kvtransfer.transports.cuda_ipc import open_pool

        try:
            open_pool(self._pools[number].offers[0].descriptor)
        except PoolUnreachable as error:
            return error.reason
        return "it can"


class Owner:
    """The other end of the pipe."""

    def __init__(self, process: BaseProcess, commands: Connection) -> None:
        self.process = process
        self._commands = commands

    def ask(self, *command: Any) -> Any:
        """The answer, in bounded time."""
        self._commands.send(command)
        assert self._commands.poll(BOUND_S), f"no answer to {command[0]} within {BOUND_S:g} s"
        return self._commands.recv()

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self.process.kill()
        self.process.join(BOUND_S)
        assert self.process.exitcode is not None, "a killed process is still there"


@contextmanager
def an_owner() -> Iterator[Owner]:
    """A process of its own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Owner(process, ours)
    finally:
        process.kill()
        process.join(BOUND_S)
        process.close()
        ours.close()
