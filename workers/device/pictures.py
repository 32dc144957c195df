"""The vision model of a worker, and the embeddings of its pictures, on a GPU. Before its text model: KV gets what is left."""

from collections.abc import Callable
from math import isqrt

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.transports.cuda_ipc import CudaPool
from workers.api import WeightDtype, WorkerSpec
from workers.device.buckets import graph_tiles
from workers.device.dtypes import computed_in
from workers.device.encoder import DeviceEncoder
from workers.device.gpu import compute_dtype, load_to_gpu, open_gpu, require
from workers.device.memory import encoder_step_bytes
from workers.device.placing import check_spec
from workers.embeddings.memory import EmbeddingMemory
from workers.model.prepare import VISION_WEIGHTS, PreparedModel
from workers.model.vision.config import VisionConfig
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.make import make_encoder

Progress = Callable[[str, float], None]

_LARGER = "raise engine.gpuMemoryFraction, or end other programs on the GPU"


def take_embeddings(
    spec: WorkerSpec, layout: KvLayout, num_blocks: int, number: int
) -> list[EmbeddingMemory]:
    """`number` pools of so many blocks each, fp32 as on any worker. Raises GpuUnavailable, NotOnGpu and OutOfMemory."""
    check_spec(spec)
    device = open_gpu()
    num_bytes = number * num_blocks * layout.block_bytes
    remedy = f"lower engine.imageCacheMiB, {_LARGER}"
    fraction = spec.engine.gpu_memory_fraction
    require("the embeddings of pictures on the GPU", num_bytes, device, fraction, remedy)
    found = []
    for _ in range(number):
        memory = torch.zeros(pool_shape(layout, num_blocks), dtype=torch.float32, device=device)
        pool = CudaPool(memory, layout)
        pool.warm_up()
        found.append(EmbeddingMemory(memory, pool))
    return found


def place_encoder(
    spec: WorkerSpec, prepared: PreparedModel, vision: VisionConfig, progress: Progress
) -> DeviceEncoder:
    """With its batches captured. Raises GpuUnavailable, NotOnGpu and OutOfMemory."""
    engine = spec.engine
    check_spec(spec)
    device = open_gpu()
    # What the language model computes in: fp8 is for its weights alone.
    dtype = compute_dtype(engine.weight_dtype)
    weights = load_to_gpu(
        prepared.folder / VISION_WEIGHTS,
        device,
        WeightDtype(computed_in(engine.weight_dtype)),
        engine.gpu_memory_fraction,
        lambda done: progress("loading the vision weights onto the GPU", done),
    )
    need_bytes = encoder_step_bytes(vision, engine.encode_patch_budget, dtype.itemsize)
    remedy = (
        f"lower engine.encodePatchBudget, or max_pixels of a model that takes pictures of any size; {_LARGER}"
    )
    require("encoding pictures on the GPU", need_bytes, device, engine.gpu_memory_fraction, remedy)
    max_tiles = graph_tiles(vision.max_tile_patches, engine.encode_patch_budget)
    encoder = DeviceEncoder(make_encoder(vision, weights), device, dtype, max_tiles=max_tiles)
    encoder.warm_up(largest_batch(vision, engine.encode_patch_budget, max_tiles), progress)
    return encoder


def largest_batch(vision: VisionConfig, patch_budget: int, max_tiles: int) -> list[torch.Tensor]:
    """Pixels of the most that is computed at once, all 0."""
    if isinstance(vision, Idefics3Vision):
        return [torch.zeros(3, vision.tile_size, vision.tile_size)] * max_tiles
    side = isqrt(max(patch_budget, vision.max_tile_patches)) // vision.merge_size * vision.square_size
    return [torch.zeros(3, side, side)]
