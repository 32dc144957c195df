"""A worker's text model on several ranks, from what the spec says to what an engine runs. Blocks for seconds."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from kvtransfer.config import TransportChoice
from kvtransfer.errors import PoolUnreachable, TransportUnavailable
from kvtransfer.pool import KvSpan
from kvtransfer.pool_tensor import pool_shape, torch_dtype
from kvtransfer.shared_memory import SharedMemory
from workers.api import Phase, WorkerSpec
from workers.device.placed import PlacedText
from workers.engine.forwarding import Forward
from workers.errors import UnsupportedModel
from workers.limits import CARRYING_TRANSPORTS
from workers.loaded_shapes import cpu_shape
from workers.model.config import ModelConfig
from workers.model.forward_batch import ForwardBatch
from workers.model.prepare import PreparedModel
from workers.step_shape import DeviceShape
from workers.tensor_parallel.cutting import Rank, degrees, kv_heads, problem
from workers.tensor_parallel.followers import STEP_TIMEOUT_S, Followers
from workers.tensor_parallel.kv_pool import GroupPool
from workers.tensor_parallel.messages import Join, Loaded, Ready, Room, TakeKv
from workers.tensor_parallel.placing import (
    Progress,
    RankWeights,
    load_rank,
    make_forward,
    max_blocks,
    num_blocks_of,
    take_kv_cache,
)

if TYPE_CHECKING:
    from workers.device.sampler import DeviceSampler


class GroupForward:
    """The forward pass of all ranks. Implements forwarding.Forward; logits are those of rank 0."""

    def __init__(self, followers: Followers, forward: Forward, num_slots: int) -> None:
        self._followers = followers
        self._forward = forward
        self._num_slots = num_slots

    def __call__(
        self,
        batch: ForwardBatch,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Forward. Raises RankLost, and ValueError before any rank has begun."""
        if int(batch.slots.max()) >= self._num_slots or int(batch.slots.min()) < 0:
            raise ValueError(f"slots {batch.slots.tolist()} are not all in the KV cache")
        with self._followers.step(batch, is_shared=sources is not None, layer_group_size=layer_group_size):
            return self._forward(
                batch,
                layer_group_size=layer_group_size,
                on_layers=on_layers,
                sources=sources,
                previous=previous,
            )


def place_on_ranks(
    spec: WorkerSpec,
    prepared: PreparedModel,
    progress: Progress,
    *,
    timeout_s: float = STEP_TIMEOUT_S,
) -> PlacedText:
    """What rank 0 has, with the others ready to follow it.

    timeout_s: see Followers. Raises UnsupportedModel and TransportUnavailable before anything is started, then what the
    ranks raise, and RankLost.
    """
    check_group(spec, prepared.config)
    degree = spec.engine.tensor_parallel
    ranks = [Rank(i, degree) for i in range(degree)]
    heads = [kv_heads(prepared.config.num_kv_heads, rank) for rank in ranks]
    followers = Followers(spec, prepared, timeout_s=timeout_s)
    try:
        own = load_rank(spec, prepared, ranks[0], progress)
        followers.gather(Loaded, progress)
        followers.tell([Join() for _ in ranks[1:]])
        group = followers.join(own.device)
        rooms = [max_blocks(spec, own), *(one.max_blocks for one in followers.gather(Room, progress))]
        num_blocks = num_blocks_of(spec, own.full_layout, rooms)
        progress(f"taking the KV cache ({num_blocks * own.full_layout.block_bytes / 2**20:.0f} MiB)", 0.0)
        memories = _host_memories(spec, own, heads, num_blocks)
        takes = [TakeKv(num_blocks, one.descriptor() if one is not None else None) for one in memories]
        followers.tell([*takes[1:]])
        kv_cache = _tensor(own, memories[0], num_blocks, heads[0])
        if kv_cache is None:
            kv_cache = take_kv_cache(own, num_blocks)
        try:
            model, forward = make_forward(spec, own, group, kv_cache, progress)
        except RuntimeError as error:
            # That of a collective, too: the rank that is missing knows better why.
            raise followers.lose(f"rank 0 could not prepare its steps: {error}") from error
        readies = followers.gather(Ready, progress)
        caches = [partial(_same, kv_cache)]
        for i, ready in enumerate(readies, 1):
            caches.append(partial(_reached, own, ready, memories[i], num_blocks, heads[i], i))
        pool = GroupPool(caches, heads, own.full_layout, num_blocks, followers.check)
        return PlacedText(
            model,
            pool,
            kv_cache,
            own.full_layout,
            GroupForward(followers, forward, num_blocks * spec.engine.block_size),
            _sampler(own.device),
            _shape(spec, own.device),
            followers,
        )
    except BaseException:
        followers.close()
        raise


def check_group(spec: WorkerSpec, config: ModelConfig) -> None:
    """Raises UnsupportedModel and TransportUnavailable for what a group of ranks does not do."""
    degree, engine = spec.engine.tensor_parallel, spec.engine
    found = problem(config, degree)
    if found is not None:
        feature = f"{found}, which engine.tensorParallel {degree} does not divide"
        fitting = ", ".join(map(str, degrees(config)))
        raise UnsupportedModel(spec.model_source, feature, f"tensorParallel of {fitting}")
    if config.vision is not None or Phase.ENCODE in spec.phases:
        feature = f"pictures, with engine.tensorParallel {degree}"
        raise UnsupportedModel(spec.model_source, feature, "tensorParallel 1, or a model of text alone")
    for key, is_set in (
        ("spanReuse", engine.span_reuse is not None),
        ("hostCacheMiB", engine.host_cache_bytes > 0),
    ):
        if is_set:
            feature = f"engine.{key} with engine.tensorParallel {degree}"
            raise UnsupportedModel(
                spec.model_source, feature, f"a manifest without {key}, or tensorParallel 1"
            )
    if spec.kv_transfer.transport not in CARRYING_TRANSPORTS:
        reason = (
            f"the KV cache of this worker is spread over {degree} ranks and cannot be read in place; "
            "set kvTransfer.transport to auto or grpc"
        )
        raise TransportUnavailable(TransportChoice(spec.kv_transfer.transport), reason)


def _host_memories(
    spec: WorkerSpec, own: RankWeights, heads: Iterable[tuple[int, int]], num_blocks: int
) -> list[SharedMemory | None]:
    """On a CPU the memory of all ranks is of rank 0. Raises SharedMemoryUnavailable."""
    layouts = [replace(own.full_layout, head_lo=lo, head_hi=hi) for lo, hi in heads]
    if own.device.type == "cuda":
        return [None] * len(layouts)
    return [SharedMemory.create(num_blocks * one.block_bytes, spec.worker_id) for one in layouts]


def _tensor(
    own: RankWeights, memory: SharedMemory | None, num_blocks: int, heads: tuple[int, int]
) -> torch.Tensor | None:
    if memory is None:
        return None
    layout = replace(own.full_layout, head_lo=heads[0], head_hi=heads[1])
    dtype = torch_dtype(layout.dtype)
    return memory.tensor(pool_shape(layout, num_blocks), dtype)


def _reached(
    own: RankWeights,
    ready: Ready,
    memory: SharedMemory | None,
    num_blocks: int,
    heads: tuple[int, int],
    rank: int,
) -> torch.Tensor:
    """The KV cache of another rank. Raises PoolUnreachable."""
    tensor = _tensor(own, memory, num_blocks, heads)
    if tensor is not None:
        return tensor
    from kvtransfer.transports.cuda_ipc import TRANSPORT, open_pool

    if ready.kv_descriptor is None:
        raise PoolUnreachable(TRANSPORT, "a rank's GPU memory cannot be shared; its log says why")
    with torch.cuda.device(rank):
        pool = open_pool(ready.kv_descriptor)
    # Of no token: it is the memory that is asked for.
    return pool.rows(KvSpan((), 0, 0, 0, 0, *heads)).kv_cache


def _same(kv_cache: torch.Tensor) -> torch.Tensor:
    return kv_cache


def _sampler(device: torch.device) -> "DeviceSampler | None":
    if device.type != "cuda":
        return None
    from workers.device.sampler import DeviceSampler

    return DeviceSampler(device)


def _shape(spec: WorkerSpec, device: torch.device) -> DeviceShape:
    """Of all ranks together, before it was measured: what they say to each other costs nothing."""
    if device.type != "cuda":
        return cpu_shape(spec.engine.num_threads, psutil.virtual_memory().total)
    from workers.device.gpu import gpu_memory
    from workers.loaded_shapes import gpu_shape

    degree = spec.engine.tensor_parallel
    name, memory_bytes = torch.cuda.get_device_name(device), degree * gpu_memory(device).total_bytes
    one = gpu_shape(name, memory_bytes, spec.engine.weight_dtype)
    return replace(
        one,
        name=f"{degree} x {one.name}",
        flops_per_s=degree * one.flops_per_s,
        attention_flops_per_s=degree * one.attention_flops_per_s,
        bytes_per_s=degree * one.bytes_per_s,
    )
