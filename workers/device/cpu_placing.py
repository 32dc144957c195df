"""A model and its KV cache in memory of the host."""

import logging
from collections.abc import Callable

import psutil
import torch

from kvtransfer.config import TransportChoice
from kvtransfer.errors import SharedMemoryUnavailable
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory
from phasewise_kernels import jit
from workers.api import KvDtype, WorkerSpec
from workers.device.placed import PlacedText
from workers.errors import KvCacheTooSmall, NotOnCpu, UnsupportedModel
from workers.limits import CPU_DTYPES, is_computed_in
from workers.loaded_shapes import cpu_shape
from workers.model.llama import Llama
from workers.model.prepare import Part, PreparedModel, load_weights
from workers.model.resources import check_memory

logger = logging.getLogger(__name__)

KV_DTYPE = "float32"


def place_on_cpu(
    spec: WorkerSpec, prepared: PreparedModel, progress: Callable[[str, float], None]
) -> PlacedText:
    """Raises CorruptModel, UnsupportedModel, KvCacheTooSmall, OutOfMemory and, when the spec insists on it, SharedMemoryUnavailable."""
    progress("loading the weights", 0.0)
    config = prepared.config
    model = Llama(config, load_weights(prepared, {Part.TEXT}), spec.engine.weight_dtype)
    layout = config.kv_layout(
        block_size=spec.engine.block_size,
        dtype=KV_DTYPE,
        model_digest=prepared.digest,
        weight_dtype=spec.engine.weight_dtype.value,
    )
    if spec.engine.span_reuse is not None and not model.can_move_keys:
        feature = "dynamic RoPE scaling or M-RoPE, with which keys cannot be moved as engine.spanReuse has to"
        raise UnsupportedModel(spec.model_source, feature, "a manifest without spanReuse")
    pool, kv_cache = _take_pool(layout, spec, progress)
    jit.warm_up(lambda what, done: progress(f"preparing the CPU kernels ({what})", done))
    shape = cpu_shape(spec.engine.num_threads, psutil.virtual_memory().total)
    return PlacedText(model, pool, kv_cache, layout, None, None, shape)


def check_dtypes(spec: WorkerSpec) -> None:
    """Raises NotOnCpu. The manifest and the command line have the same rule."""
    engine = spec.engine
    if not is_computed_in(engine.weight_dtype, is_on_gpu=False):
        raise NotOnCpu(f"engine.weightDtype {engine.weight_dtype}", f"use {' or '.join(CPU_DTYPES)}")
    if engine.kv_dtype is not KvDtype.AUTO:
        raise NotOnCpu(f"engine.kvDtype {engine.kv_dtype}", f"use {KvDtype.AUTO}")


def _take_pool(
    layout: KvLayout, spec: WorkerSpec, progress: Callable[[str, float], None]
) -> tuple[HostPool, torch.Tensor]:
    """The block pool's memory, every page of it touched: a first use in a step would be slow.

    In shared memory, where other workers of this host can read it, if there is any; through NIXL when that is asked for.
    """
    num_blocks = spec.engine.kv_cache_bytes // layout.block_bytes
    if num_blocks < 1:
        raise KvCacheTooSmall(spec.engine.kv_cache_bytes, layout.block_bytes)
    num_bytes = num_blocks * layout.block_bytes
    check_memory("the KV cache", num_bytes, "lower engine.kvCacheMiB")
    shape = pool_shape(layout, num_blocks)
    memory = take_shared_memory(num_bytes, spec)
    kv_cache = (
        memory.tensor(shape, torch.float32) if memory is not None else torch.empty(shape, dtype=torch.float32)
    )
    for i, layer in enumerate(kv_cache):
        progress(f"taking the KV cache ({kv_cache.nbytes / 2**20:.0f} MiB)", i / len(kv_cache))
        layer.zero_()
    is_in_nixl = spec.kv_transfer.transport is TransportChoice.NIXL
    return HostPool(kv_cache, layout, memory, is_in_nixl=is_in_nixl), kv_cache


def take_shared_memory(num_bytes: int, spec: WorkerSpec) -> SharedMemory | None:
    """That others of this host can read, if the spec lets them and there is any. Raises SharedMemoryUnavailable when it insists on it."""
    choice = spec.kv_transfer.transport
    if choice not in (TransportChoice.AUTO, TransportChoice.SHM):
        return None
    try:
        return SharedMemory.create(num_bytes, spec.worker_id)
    except SharedMemoryUnavailable as error:
        if choice is TransportChoice.SHM:
            raise
        logger.warning("shared_memory_unavailable worker_id=%s reason=%s", spec.worker_id, error)
        return None
