"""The text model of a worker and its KV on a GPU, with steps captured. Blocks for seconds."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool_tensor import pool_shape, torch_dtype
from kvtransfer.transports.cuda_ipc import CudaPool
from phasewise_kernels.fp8_linear.op import SIZE_STEP
from phasewise_kernels.kv_int4.rows import MIN_HEAD_DIM, is_supported
from workers.api import KvDtype, PhaseSharing, WeightDtype, WorkerSpec
from workers.device.buckets import decode_buckets, mixed_buckets
from workers.device.dtypes import kv_dtype, needed_capability
from workers.device.forward import DeviceForward
from workers.device.gpu import gpu_memory, load_to_gpu, open_gpu
from workers.device.memory import CONTEXT_BYTES, kv_cache_bytes, layout_bytes, step_bytes
from workers.device.placed import PlacedText
from workers.device.sampler import DeviceSampler
from workers.device.sm_share import SmShares, close_shares, open_sm_shares
from workers.device.split_runner import PHASES, STEP_GROUPS, SplitRunner, open_split
from workers.engine.runner import ModelRunner
from workers.errors import KvCacheTooSmall, NotOnGpu, OutOfMemory, SharingUnsupported, UnsupportedModel
from workers.limits import GPU_DTYPES, SPLIT_PHASES, is_computed_in
from workers.loaded_shapes import gpu_shape
from workers.model import fp8
from workers.model.config import ModelConfig
from workers.model.llama import Llama
from workers.model.prepare import WEIGHTS, PreparedModel

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


def place_on_gpu(spec: WorkerSpec, prepared: PreparedModel, progress: Progress) -> PlacedText:
    """Raises GpuUnavailable, NotOnGpu, SharingUnsupported, UnsupportedModel, OutOfMemory and KvCacheTooSmall."""
    check_spec(spec)
    check_dtypes(spec, prepared.config)
    device = open_gpu(needed_capability=needed_capability(spec.engine))
    # Before KV: it gets what their captured steps leave.
    shares = _open_shares(spec)
    try:
        return replace(_place(spec, prepared, device, shares, progress), shares=shares)
    except BaseException:
        if shares is not None:
            close_shares(shares)
        raise


def _place(
    spec: WorkerSpec,
    prepared: PreparedModel,
    device: torch.device,
    shares: SmShares | None,
    progress: Progress,
) -> PlacedText:
    engine, config = spec.engine, prepared.config
    progress("loading the weights onto the GPU", 0.0)
    weights = load_to_gpu(
        prepared.folder / WEIGHTS,
        device,
        engine.weight_dtype,
        engine.gpu_memory_fraction,
        lambda done: progress("loading the weights onto the GPU", done),
    )
    model = Llama(config, weights)
    layout = config.kv_layout(
        block_size=engine.block_size,
        dtype=kv_dtype(engine),
        model_digest=prepared.digest,
        weight_dtype=engine.weight_dtype.value,
    )
    needed_bytes = step_bytes(config, engine, model.dtype.itemsize)
    if shares is not None:
        needed_bytes += len(shares.layouts) * layout_bytes(config, engine, model.dtype.itemsize)
    kv_cache = _take_kv_cache(spec, layout, needed_bytes, device, progress)
    pool = CudaPool(kv_cache, layout)
    progress("preparing the transfer kernels", 0.0)
    pool.warm_up()
    forward = DeviceForward(
        model,
        kv_cache,
        max_context_tokens=_max_context_tokens(config, kv_cache),
        buckets=decode_buckets(engine.max_running_sequences),
        mixed_buckets=mixed_buckets(engine.token_budget),
    )
    forward.warm_up(engine.max_running_sequences, progress)
    forward.capture(progress)
    name = torch.cuda.get_device_name(device)
    return PlacedText(
        model,
        pool,
        kv_cache,
        layout,
        forward,
        DeviceSampler(device),
        gpu_shape(name, gpu_memory(device).total_bytes, engine.weight_dtype),
    )


def _open_shares(spec: WorkerSpec) -> SmShares | None:
    """None for a worker that does not split its steps. Raises SharingUnsupported."""
    if spec.engine.phase_sharing is not PhaseSharing.PREDICTED:
        return None
    if spec.phases != SPLIT_PHASES:
        logger.info("steps_not_split phases=%s", "+".join(sorted(spec.phases)))
        return None
    try:
        return open_sm_shares(0, PHASES, step_groups=STEP_GROUPS)
    except SharingUnsupported as error:
        what, remedy = f"{error.mechanism}: {error.problem}", f"{error.remedy}, or set it to mixed"
        raise SharingUnsupported("engine.phaseSharing predicted", what, remedy) from error


def capture_layouts(
    spec: WorkerSpec, placed: PlacedText, shares: SmShares, whole: ModelRunner, progress: Progress
) -> SplitRunner:
    """Steps of each phase on each of these layouts. whole: computes the others."""
    return open_split(
        *(whole, placed.model, placed.kv_cache, shares),
        max_context_tokens=_max_context_tokens(placed.model.config, placed.kv_cache),
        decode_buckets=decode_buckets(spec.engine.max_running_sequences),
        prefill_buckets=mixed_buckets(spec.engine.token_budget),
        progress=progress,
    )


def _max_context_tokens(config: ModelConfig, kv_cache: torch.Tensor) -> int:
    _, _, num_blocks, block_size, *_ = kv_cache.shape
    return min(config.max_context_tokens, num_blocks * block_size)


def check_spec(spec: WorkerSpec) -> None:
    """Raises NotOnGpu for what a GPU does not do. The manifest and the command line have the same rules."""
    dtype = spec.engine.weight_dtype.value
    if not is_computed_in(dtype, is_on_gpu=True):
        raise NotOnGpu(f"engine.weightDtype {dtype}", f"use {' or '.join(GPU_DTYPES)}")
    if spec.engine.span_reuse is not None:
        raise NotOnGpu("engine.spanReuse", "leave it out, or use device cpu")


def check_dtypes(spec: WorkerSpec, config: ModelConfig) -> None:
    """config: of the model, or of a rank's part of it. Raises UnsupportedModel for what cannot be multiplied in fp8, or kept in four bits.

    Logs what KV in fp8 may do to this model.
    """
    if spec.engine.kv_dtype is KvDtype.FP8 and config.has_qkv_bias:
        # Known of Qwen2 and Qwen2.5: docs/gpu-engine.md.
        logger.warning(
            "kv_in_fp8_may_saturate worker_id=%s reason=keys of models with biases in qkv may be beyond 448; see whether its answers "
            "make sense, or set engine.kvDtype to auto",
            spec.worker_id,
        )
    if spec.engine.kv_dtype is KvDtype.INT4 and not is_supported(config.head_dim):
        feature = f"heads of {config.head_dim} channels, with engine.kvDtype int4"
        raise UnsupportedModel(
            spec.model_source, feature, f"a power of two from {MIN_HEAD_DIM} on, or kvDtype fp8 or auto"
        )
    found = fp8.problem(config) if spec.engine.weight_dtype is WeightDtype.FP8 else None
    if found is not None:
        feature = f"{found}, with engine.weightDtype fp8"
        raise UnsupportedModel(
            spec.model_source,
            feature,
            f"multiples of {SIZE_STEP} on each device, or weightDtype bfloat16",
        )


def _take_kv_cache(
    spec: WorkerSpec, layout: KvLayout, needed_bytes: int, device: torch.device, progress: Progress
) -> torch.Tensor:
    memory = gpu_memory(device)
    num_bytes = kv_cache_bytes(memory, spec.engine, needed_bytes)
    left_bytes = memory.left_of(spec.engine.gpu_memory_fraction) - needed_bytes
    remedy = "lower engine.kvCacheMiB, raise engine.gpuMemoryFraction, or end other programs on the GPU"
    if num_bytes > left_bytes:
        raise OutOfMemory("the KV cache on the GPU", num_bytes, max(0, left_bytes), remedy)
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 1:
        if spec.engine.kv_cache_bytes:
            raise KvCacheTooSmall(spec.engine.kv_cache_bytes, layout.block_bytes)
        raise OutOfMemory("the KV cache on the GPU", layout.block_bytes, max(0, num_bytes), remedy)
    held_bytes = memory.held_of(spec.engine.gpu_memory_fraction)
    # Libraries of this process hold some, too.
    if not spec.engine.kv_cache_bytes and held_bytes > CONTEXT_BYTES:
        logger.warning(
            "kv_cache_smaller_than_share worker_id=%s reason=others hold %d MiB of what engine.gpuMemoryFraction %g gives; "
            "end them and start the worker again, or lower it",
            spec.worker_id,
            held_bytes // 2**20,
            spec.engine.gpu_memory_fraction,
        )
    shape = pool_shape(layout, num_blocks)
    progress(f"taking the KV cache ({num_blocks * layout.block_bytes / 2**20:.0f} MiB)", 0.0)
    return torch.zeros(shape, dtype=torch_dtype(layout.dtype), device=device)
