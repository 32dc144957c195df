"""What one rank has in memory: its part of the weights and of the KV cache, and the forward pass over both.

The same in rank 0 and in the others. Blocks for seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool_tensor import pool_shape, torch_dtype
from phasewise_kernels import jit
from workers.api import Device, WorkerSpec
from workers.device.dtypes import kv_dtype, needed_capability
from workers.engine.forwarding import Forward, HostForward
from workers.errors import KvCacheTooSmall, OutOfMemory
from workers.model.config import ModelConfig
from workers.model.fp8 import weights_bytes
from workers.model.llama import Llama
from workers.model.prepare import WEIGHTS, PreparedModel
from workers.model.resources import check_memory
from workers.tensor_parallel.cutting import Rank, kv_heads, rank_config
from workers.tensor_parallel.ranks import Ranks
from workers.tensor_parallel.reading import part_shapes, read_part

#: Of KV and of weights before they are made smaller, on a CPU.
HOST_DTYPE = "float32"
LOADING = "loading the weights"

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class RankWeights:
    """The weights of a rank on its device. config: `rank_config`. layout: of its KV; full_layout: of the group's."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    device: torch.device
    layout: KvLayout
    full_layout: KvLayout


def load_rank(spec: WorkerSpec, prepared: PreparedModel, rank: Rank, progress: Progress) -> RankWeights:
    """Raises OutOfMemory, GpuUnavailable, NotOnGpu and UnsupportedModel."""
    engine, config = spec.engine, prepared.config
    path, shapes = prepared.folder / WEIGHTS, part_shapes(config, rank)
    own = rank_config(config, rank)

    def told(done: float) -> None:
        progress(LOADING, done)

    if spec.device is Device.CUDA:
        from workers.device.gpu import check_room, compute_dtype, open_gpu, placed
        from workers.device.placing import check_dtypes, check_spec

        check_spec(spec)
        check_dtypes(spec, own)
        kept = engine.weight_dtype
        device = open_gpu(rank.index, rank.degree, needed_capability(engine))
        num_bytes = weights_bytes(shapes, kept, compute_dtype(kept).itemsize)
        check_room(num_bytes, device, engine.gpu_memory_fraction)
        weights = read_part(path, config, rank, lambda name, one: placed(name, one, device, kept), told)
        dtype = kv_dtype(engine)
    else:
        device, dtype = torch.device("cpu"), HOST_DTYPE
        torch.set_num_threads(max(1, engine.num_threads // rank.degree))
        num_bytes = 4 * sum(map(prod, shapes.values()))
        check_memory("the model's weights", num_bytes, "use a smaller model or end other programs")
        weights = read_part(path, config, rank, lambda name, one: {name: one}, told)
    layout = config.kv_layout(
        block_size=engine.block_size,
        dtype=dtype,
        model_digest=prepared.digest,
        weight_dtype=engine.weight_dtype.value,
    )
    return RankWeights(own, weights, device, _of_rank(layout, rank), layout)


def max_blocks(spec: WorkerSpec, loaded: RankWeights) -> int | None:
    """KV blocks that this rank's GPU has room for; None on a CPU, whose memory all ranks share.

    Raises OutOfMemory when what the spec asks for does not fit, or nothing does.
    """
    engine, layout = spec.engine, loaded.layout
    if loaded.device.type != "cuda":
        return None
    from workers.device.gpu import gpu_memory
    from workers.device.memory import step_bytes

    needed = step_bytes(loaded.config, engine, loaded.weights["embedding"].dtype.itemsize)
    left_bytes = gpu_memory(loaded.device).left_of(engine.gpu_memory_fraction) - needed
    remedy = "lower engine.kvCacheMiB, raise engine.gpuMemoryFraction, or end other programs on the GPU"
    num_blocks = max(0, left_bytes) // layout.block_bytes
    if engine.kv_cache_bytes:
        wanted = engine.kv_cache_bytes // loaded.full_layout.block_bytes
        if wanted > num_blocks:
            need_bytes = wanted * layout.block_bytes
            raise OutOfMemory("the KV cache on the GPU", need_bytes, max(0, left_bytes), remedy)
        num_blocks = wanted
    elif num_blocks < 1:
        raise OutOfMemory("the KV cache on the GPU", layout.block_bytes, max(0, left_bytes), remedy)
    return num_blocks


def num_blocks_of(spec: WorkerSpec, full_layout: KvLayout, rooms: list[int | None]) -> int:
    """Blocks of the group: what the rank with the least room has, or on a CPU what the spec says.

    Raises KvCacheTooSmall and OutOfMemory.
    """
    limits = [one for one in rooms if one is not None]
    num_blocks = min(limits) if limits else spec.engine.kv_cache_bytes // full_layout.block_bytes
    if num_blocks < 1:
        raise KvCacheTooSmall(spec.engine.kv_cache_bytes, full_layout.block_bytes)
    if not limits:
        check_memory("the KV cache", num_blocks * full_layout.block_bytes, "lower engine.kvCacheMiB")
    return num_blocks


def make_forward(
    spec: WorkerSpec, loaded: RankWeights, ranks: Ranks, kv_cache: torch.Tensor, progress: Progress
) -> tuple[Llama, Forward]:
    """On a GPU with steps captured, by all ranks at the same time."""
    model = Llama(loaded.config, loaded.weights, spec.engine.weight_dtype, ranks)
    if loaded.device.type != "cuda":
        jit.warm_up(lambda what, done: progress(f"preparing the CPU kernels ({what})", done))
        return model, HostForward(model, kv_cache)
    from workers.device.buckets import decode_buckets, mixed_buckets
    from workers.device.forward import DeviceForward

    engine = spec.engine
    forward = DeviceForward(
        model,
        kv_cache,
        max_context_tokens=min(loaded.config.max_context_tokens, kv_cache.shape[2] * engine.block_size),
        buckets=decode_buckets(engine.max_running_sequences),
        mixed_buckets=mixed_buckets(engine.token_budget),
    )
    ranks.captured(forward.drop_graphs)
    forward.warm_up(engine.max_running_sequences, progress)
    forward.capture(progress)
    return model, forward


def take_kv_cache(loaded: RankWeights, num_blocks: int) -> torch.Tensor:
    """On the GPU of this rank."""
    shape = pool_shape(loaded.layout, num_blocks)
    return torch.zeros(shape, dtype=torch_dtype(loaded.layout.dtype), device=loaded.device)


def _of_rank(layout: KvLayout, rank: Rank) -> KvLayout:
    lo, hi = kv_heads(layout.num_kv_heads, rank)
    return replace(layout, head_lo=lo, head_hi=hi)
