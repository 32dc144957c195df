"""What the ranks of a group say to each other while they compute: NCCL between GPUs, gloo between CPUs."""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import distributed
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
    ProcessGroupGloo,
    TCPStore,
    Work,
)

from workers.tensor_parallel.cutting import Rank, vocab_part

logger = logging.getLogger(__name__)

#: All ranks are on one host.
HOST = "127.0.0.1"

Rows = Callable[[torch.Tensor], torch.Tensor]


class Ranks:
    """One rank's end of the collectives. All ranks call the same ones, in the same order, with tensors of equal shapes.

    They raise RuntimeError once the group is aborted.
    """

    def __init__(self, rank: Rank, backend: Any, device: torch.device) -> None:
        """backend: ProcessGroupNCCL or ProcessGroupGloo; torch's types do not know what both can do."""
        self.rank = rank
        self.device = device
        self._backend = backend
        self._reduce = AllreduceOptions()
        self._broadcast, self._gather = BroadcastOptions(), AllgatherOptions()
        # On the stream of the caller: a step's kernels follow each other, captured or not.
        self._reduce.asyncOp = self._broadcast.asyncOp = self._gather.asyncOp = False
        self._flag = torch.zeros(1, device=device)
        self._drop_graphs: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._aborting: threading.Thread | None = None

    def summed(self, project: Rows) -> Rows:
        """`project` of this rank's columns, with what it gives added up over the ranks."""

        def project_and_add(rows: torch.Tensor) -> torch.Tensor:
            summand = project(rows)
            self._check()
            _wait(self._backend.allreduce([summand], self._reduce))
            return summand

        return project_and_add

    def gathered(self, project: Rows, vocab_size: int) -> Rows:
        """`project` of this rank's part of the vocabulary, [num_rows, part]; returns [num_rows, vocab_size] on all ranks."""
        part, degree = vocab_part(vocab_size, self.rank.degree), self.rank.degree

        def project_and_gather(rows: torch.Tensor) -> torch.Tensor:
            own = project(rows)
            own = own if own.shape[1] == part else F.pad(own, (0, part - own.shape[1]))
            parts = own.new_empty(degree * len(own), part)
            self._check()
            # Torch has no other name for it here.
            _wait(self._backend._allgather_base(parts, own, self._gather))
            rows_first = parts.view(degree, len(own), part).transpose(0, 1)
            return rows_first.reshape(len(own), degree * part)[:, :vocab_size].contiguous()

        return project_and_gather

    def meet(self) -> None:
        """Nothing that any rank has launched before is unfinished on this one's stream after it."""
        self._check()
        _wait(self._backend.allreduce([self._flag], self._reduce))

    def share(self, values: torch.Tensor) -> None:
        """Make `values` what they are at rank 0."""
        self._check()
        _wait(self._backend.broadcast([values], self._broadcast))

    def captured(self, drop: Callable[[], None]) -> None:
        """There are CUDA graphs with these collectives; `drop`, which any thread may call, gives them up."""
        self._drop_graphs = drop

    def abort(self) -> None:
        """Whoever waits for another rank waits no more; what it computes is worth nothing. Of gloo's, the end of the others is enough.

        Does not wait: NCCL lets go of what waits at once, and ends when the last graph with its collectives is gone. Until then who
        called for another collective would wait for NCCL, and not be there to give its graphs up.
        """
        with self._lock:
            if self.device.type != "cuda" or self._aborting is not None:
                return
            self._aborting = threading.Thread(target=self._abort, name="abort ranks", daemon=True)
            self._aborting.start()
        if self._drop_graphs is not None:
            self._drop_graphs()

    def close(self, timeout_s: float) -> None:
        """Abort, and wait as long for NCCL to end. No step is computed any more."""
        self.abort()
        # Again: one may have been captured meanwhile. Whoever drops them has the model, and the model has this.
        drop, self._drop_graphs = self._drop_graphs, None
        if drop is not None:
            drop()
        if self._aborting is not None:
            self._aborting.join(timeout_s)
            if self._aborting.is_alive():
                logger.warning("ranks_not_ended after_s=%g", timeout_s)

    def _check(self) -> None:
        if self._aborting is not None:
            raise RuntimeError("the ranks have parted")

    def _abort(self) -> None:
        try:
            self._backend.abort()
        except RuntimeError:
            logger.exception("ranks_abort_failed")


def open_store(degree: int) -> TCPStore:
    """Where the ranks find each other; held by rank 0. Its `port` is what the others need."""
    return TCPStore(HOST, 0, degree, is_master=True, wait_for_workers=False)


def join(rank: Rank, store: TCPStore | int, device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other ranks, of which all call this. store: at rank 0 the store, at the others its port.

    timeout_s: how long a collective may take, and how long the others are waited for.
    Raises RuntimeError when they do not come.
    """
    timeout = timedelta(seconds=timeout_s)
    if isinstance(store, int):
        store = TCPStore(HOST, store, rank.degree, is_master=False, timeout=timeout)
    if device.type == "cuda":
        nccl: Any = distributed.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        backend = nccl(store, rank.index, rank.degree, options)
        backend.eager_connect_single_device(device)
    else:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout, options._threads = timeout, 1
        # Named, or it would look for the address of this machine's name.
        options._devices = [gloo.create_device(hostname=HOST)]
        backend = gloo(store, rank.index, rank.degree, options)
    ranks = Ranks(rank, backend, device)
    ranks.meet()
    return ranks


def _wait(work: Work | None) -> None:
    """None is what NCCL returns for work on the caller's stream."""
    if work is not None:
        work.wait()
