"""What the phases of a worker need for pictures: memory for embeddings, and an encoder."""

from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.config import TransportChoice
from kvtransfer.layout import KvLayout
from workers.api import Device, Phase, WorkerSpec
from workers.device.cpu_placing import take_shared_memory
from workers.embeddings.encoding import VisionTools
from workers.embeddings.memory import EmbeddingMemory, embedding_layout, host_memory
from workers.errors import ImageCacheTooSmall
from workers.model.prepare import Part, PreparedModel, load_weights
from workers.model.resources import check_memory
from workers.model.vision.config import processor_digest
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.make import make_encoder


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """What pictures need.

    prefill: embeddings that sequences read; None on a worker that does not prefill. encode: those of Encodes; None,
    with `tools`, on one that does not encode.
    """

    prefill: EmbeddingMemory | None
    encode: EmbeddingMemory | None
    tools: VisionTools | None


def load_images(
    spec: WorkerSpec, prepared: PreparedModel, progress: Callable[[str, float], None]
) -> LoadedImages | None:
    """None on a worker that only decodes."""
    vision = prepared.config.vision
    if vision is None or not spec.phases & {Phase.ENCODE, Phase.PREFILL}:
        return None
    digest = processor_digest(vision)
    layout = embedding_layout(vision.text_hidden_size, model_digest=prepared.digest, processor_digest=digest)
    users = [phase for phase in (Phase.PREFILL, Phase.ENCODE) if phase in spec.phases]
    # Each has its own, or those who prefill could wait for those who encode, at another worker, and these for those.
    num_blocks = spec.engine.image_cache_bytes // len(users) // layout.block_bytes
    if num_blocks < 1:
        raise ImageCacheTooSmall(spec.engine.image_cache_bytes, len(users) * layout.block_bytes)
    total_mib = len(users) * num_blocks * layout.block_bytes / 2**20
    progress(f"taking the image cache ({total_mib:.0f} MiB)", 0.0)
    taken = (_take_embeddings_on_gpu if spec.device is Device.CUDA else _take_embeddings)(
        spec, layout, num_blocks, len(users)
    )
    memory = dict(zip(users, taken, strict=True))
    if Phase.ENCODE not in spec.phases:
        return LoadedImages(memory[Phase.PREFILL], None, None)
    progress("loading the vision weights", 0.0)
    encoder: VisionEncoder
    if spec.device is Device.CUDA:
        from workers.device.pictures import place_encoder

        encoder = place_encoder(spec, prepared, vision, progress)
    else:
        encoder = make_encoder(vision, load_weights(prepared, {Part.VISION}))
    tools = VisionTools(
        encoder=encoder,
        plan=vision.plan,
        processor_digest=digest,
        # Values in float64 while they are scaled, and in float32 three times, as Qwen2.5-VL's are made.
        patch_bytes=3 * (8 + 3 * 4) * vision.patch_size**2,
        patch_budget=spec.engine.encode_patch_budget,
        max_waiting=spec.engine.max_waiting_requests,
    )
    return LoadedImages(memory.get(Phase.PREFILL), memory[Phase.ENCODE], tools)


def _take_embeddings(
    spec: WorkerSpec, layout: KvLayout, num_blocks: int, number: int
) -> list[EmbeddingMemory]:
    num_bytes = num_blocks * layout.block_bytes
    check_memory("the embeddings of pictures", number * num_bytes, "lower engine.imageCacheMiB")
    is_in_nixl = spec.kv_transfer.transport is TransportChoice.NIXL
    return [
        host_memory(layout, num_blocks, take_shared_memory(num_bytes, spec), is_in_nixl=is_in_nixl)
        for _ in range(number)
    ]


def _take_embeddings_on_gpu(
    spec: WorkerSpec, layout: KvLayout, num_blocks: int, number: int
) -> list[EmbeddingMemory]:
    # Brings Triton, which is not there where torch has no CUDA.
    from workers.device.pictures import take_embeddings

    return take_embeddings(spec, layout, num_blocks, number)
