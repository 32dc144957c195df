"""What rank 0 tells the other ranks, and they it, over a socket between parent and child. Pickled.

- start: Start to the rank, Progress and Loaded from it, Join to it, Room from it, TakeKv to it, Progress and Ready from it;
- then Step, CopyBlocks and MoveSlots to it; Moved from it for each MoveSlots;
- at any time Failed from it, after which it ends.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.shared_memory import SharedMemoryDescriptor
from workers.api import WorkerSpec
from workers.errors import PhasewiseWorkerError
from workers.model.forward_batch import ForwardBatch, Mixes
from workers.model.prepare import PreparedModel
from workers.tensor_parallel.cutting import Rank


@dataclass(frozen=True, slots=True)
class Start:
    """The worker, and which part of it this rank is. port: of the store where the ranks find each other."""

    spec: WorkerSpec
    prepared: PreparedModel
    rank: Rank
    port: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Of loading; fraction: 0 to 1."""

    what: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are there."""


@dataclass(frozen=True, slots=True)
class Join:
    """All have loaded: meet the others now."""


@dataclass(frozen=True, slots=True)
class Room:
    """So many KV blocks have room; None: on a CPU, as many as there are to be."""

    max_blocks: int | None


@dataclass(frozen=True, slots=True)
class TakeKv:
    """Take the KV cache. memory: where, on a CPU."""

    num_blocks: int
    memory: SharedMemoryDescriptor | None


@dataclass(frozen=True, slots=True)
class Ready:
    """Steps can come. kv_descriptor: how rank 0 reaches the KV cache by CUDA IPC; None on a CPU, and where that does not work."""

    kv_descriptor: bytes | None


@dataclass(frozen=True, slots=True)
class Step:
    """Compute these tokens. batch: see `pack`. is_shared: tokens come from rank 0's device; those in `batch` are not read.

    layer_group_size: see Forward; all ranks compute a step in the same way.
    """

    batch: bytes
    is_shared: bool
    layer_group_size: int | None = None


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    """Copy KV blocks before the next step. blocks: target -> source."""

    blocks: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class MoveSlots:
    """Move the KV of tokens that were guessed and accepted; all are read before any is written."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """It is done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why this rank ends."""

    error: PhasewiseWorkerError | str


ToFollower = Start | Join | TakeKv | Step | CopyBlocks | MoveSlots
FromFollower = Progress | Loaded | Room | Ready | Moved | Failed


def pack(batch: ForwardBatch) -> bytes:
    """All arrays of a batch in one buffer. It has no embeddings of pictures."""
    assert batch.embeds is None
    mixes = batch.mixes
    arrays = (
        *(_array(one) for one in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows)),
        *(batch.block_tables, batch.query_lens, batch.context_lens),
        _array(batch.rope_lens),
        _array(batch.rope_positions),
        dict(batch.tree_masks),
        None if mixes is None else tuple(map(_array, (mixes.rows, mixes.token_ids, mixes.weights))),
    )
    return pickle.dumps(arrays, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> ForwardBatch:
    """What `pack` was given."""
    (
        token_ids, positions, slots, logit_rows, block_tables, query_lens, context_lens,
        rope_lens, rope_positions, tree_masks, mixes,
    ) = pickle.loads(packed)  # fmt: skip  # noqa: S301 - of our own parent
    return ForwardBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        block_tables=block_tables,
        query_lens=query_lens,
        context_lens=context_lens,
        logit_rows=torch.from_numpy(logit_rows),
        rope_lens=_tensor(rope_lens),
        tree_masks=tree_masks,
        mixes=None if mixes is None else Mixes(*map(torch.from_numpy, mixes)),
        rope_positions=_tensor(rope_positions),
    )


def _array(values: torch.Tensor | None) -> NDArray[np.generic] | None:
    found: NDArray[np.generic] | None = None if values is None else values.numpy()
    return found


def _tensor(values: NDArray[np.generic] | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)
