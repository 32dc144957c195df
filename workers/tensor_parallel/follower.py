"""A rank of a group beside rank 0: python -m workers.tensor_parallel.follower FD

A child of the worker's process, which is at the other end of the socket FD, and whose end it does not outlive.
"""

import logging
import mmap
import os
import pickle
import select
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool_tensor import pool_shape, torch_dtype
from kvtransfer.shared_memory import HEADER_BYTES, SharedMemoryDescriptor
from workers.engine.forwarding import Forward
from workers.engine.runner import NO_SOURCE
from workers.errors import PhasewiseWorkerError
from workers.tensor_parallel.kv_moves import copy_blocks, move_slots
from workers.tensor_parallel.messages import (
    CopyBlocks,
    Failed,
    FromFollower,
    Join,
    Loaded,
    Moved,
    MoveSlots,
    Progress,
    Ready,
    Room,
    Start,
    Step,
    TakeKv,
    ToFollower,
    unpack,
)
from workers.tensor_parallel.placing import load_rank, make_forward, max_blocks, take_kv_cache
from workers.tensor_parallel.ranks import join

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class Follower:
    """One rank. Its thread is the only one that uses the socket."""

    def __init__(self, connection: "Connection[FromFollower, bytes]") -> None:
        self._connection = connection

    def run(self) -> None:
        """Until the other end is closed; raises EOFError then, and what loading and computing raise."""
        start = self._receive()
        assert isinstance(start, Start)
        kv_cache, forward = self._load(start)
        with torch.inference_mode():
            while True:
                self._act(self._receive(), kv_cache, forward)

    def _load(self, start: Start) -> tuple[torch.Tensor, Forward]:
        def progress(what: str, fraction: float) -> None:
            self._connection.send(Progress(what, fraction))

        spec, rank = start.spec, start.rank
        loaded = load_rank(spec, start.prepared, rank, progress)
        self._connection.send(Loaded())
        assert isinstance(self._receive(), Join)
        ranks = join(rank, start.port, loaded.device, start.timeout_s)
        # After NCCL has taken what it needs.
        self._connection.send(Room(max_blocks(spec, loaded)))
        take = self._receive()
        assert isinstance(take, TakeKv)
        if take.memory is not None:
            kv_cache = _mapped(take.memory, loaded.layout, take.num_blocks)
        else:
            kv_cache = take_kv_cache(loaded, take.num_blocks)
        _, forward = make_forward(spec, loaded, ranks, kv_cache, progress)
        self._connection.send(Ready(_descriptor(kv_cache, loaded.layout)))
        return kv_cache, forward

    def _act(self, message: ToFollower, kv_cache: torch.Tensor, forward: Forward) -> None:
        match message:
            case Step():
                batch = unpack(message.batch)
                sources = np.full(len(batch.token_ids), NO_SOURCE) if message.is_shared else None
                forward(batch, sources=sources, layer_group_size=message.layer_group_size)
            case CopyBlocks():
                copy_blocks(kv_cache, message.blocks)
            case MoveSlots():
                move_slots(kv_cache, *map(torch.tensor, (message.targets, message.sources)))
                if kv_cache.is_cuda:
                    torch.cuda.synchronize(kv_cache.device)
                self._connection.send(Moved())
            case _:
                raise AssertionError(f"{type(message).__name__} while steps run")

    def _receive(self) -> ToFollower:
        message: ToFollower = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - of our own parent
        return message


def main(argv: Sequence[str]) -> int:
    """argv: the number of the socket."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    fd = int(argv[0])
    threading.Thread(target=_end_with_parent, args=(fd,), name="parent", daemon=True).start()
    connection: Connection[FromFollower, bytes] = Connection(fd)
    try:
        Follower(connection).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except PhasewiseWorkerError as error:
        connection.send(Failed(error))
    except Exception as error:
        logger.exception("rank_failed pid=%d", os.getpid())
        connection.send(Failed(f"{type(error).__name__}: {error}"))
    return 1


def _end_with_parent(fd: int) -> None:
    """The kernel closes the other end when the parent ends, however that comes; this one may be in a collective then."""
    hang_up = select.poll()
    hang_up.register(fd, select.POLLRDHUP)
    hang_up.poll()
    os._exit(0)


def _mapped(memory: SharedMemoryDescriptor, layout: KvLayout, num_blocks: int) -> torch.Tensor:
    """Memory of the parent, to be written too."""
    fd = os.open(memory.link, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(fd, HEADER_BYTES + memory.num_bytes)
    finally:
        os.close(fd)
    flat = np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES, count=memory.num_bytes)
    dtype = torch_dtype(layout.dtype)
    num_bytes = num_blocks * layout.block_bytes
    return torch.from_numpy(flat)[:num_bytes].view(dtype).view(pool_shape(layout, num_blocks))


def _descriptor(kv_cache: torch.Tensor, layout: KvLayout) -> bytes | None:
    """How the parent reaches it on a GPU."""
    if not kv_cache.is_cuda:
        return None
    from kvtransfer.transports.cuda_ipc import CudaPool

    return next((offer.descriptor for offer in CudaPool(kv_cache, layout).offers), None)


if __name__ == "__main__":
    # What libraries left behind, threads of NCCL above all, is not waited for.
    os._exit(main(sys.argv[1:]))
