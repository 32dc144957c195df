"""Everything between a WorkerSpec and an engine that can run: model, KV cache, layout. Blocks for seconds."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from tokenizers import Tokenizer

from kvtransfer.config import TransportChoice
from kvtransfer.errors import SharedMemoryUnavailable, TransportUnavailable
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout, head_bytes
from kvtransfer.pool import KvPool
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory
from phasewise_kernels import jit
from workers.api import Device, KvDtype, ModelInfo, Phase, PhaseSharing, Submit, WorkerSpec
from workers.block_hash import root_hash
from workers.device.buckets import MAX_MIXED_TOKENS
from workers.device.gpu import gpu_uuid
from workers.device.placed import PlacedText
from workers.embeddings.encoding import VisionTools
from workers.embeddings.memory import EmbeddingMemory, embedding_layout, host_memory
from workers.engine.decoding.cautious import punctuation_token_ids
from workers.engine.grammar import GrammarCompiler
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.grammar_states import GrammarStates
from workers.engine.kv_packer import KvPacker, codec_of
from workers.engine.pacing import GPU_LAYER_LAUNCH_S, LayerPacing
from workers.engine.runner import GrammarTools, ModelRunner
from workers.errors import (
    HostCacheTooSmall,
    ImageCacheTooSmall,
    KvCacheTooSmall,
    NotOnCpu,
    SharingUnsupported,
    UnsupportedModel,
)
from workers.latency_model import LatencyModel
from workers.limits import CPU_DTYPES, SPLIT_PHASES, is_computed_in, why_mixed
from workers.loaded_shapes import cpu_shape, first_latency, model_shape
from workers.model.config import ModelConfig, RopeScaling
from workers.model.llama import Llama
from workers.model.prepare import Part, PreparedModel, load_weights, prepare
from workers.model.resources import check_memory
from workers.model.vision.config import processor_digest, vision_json
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.make import make_encoder

if TYPE_CHECKING:
    from workers.device.split_runner import SplitRunner
    from workers.tensor_parallel.followers import Followers

logger = logging.getLogger(__name__)

KV_DTYPE = "float32"
#: Ways by which only memory of a host is read.
_OF_HOSTS = (TransportChoice.SHM, TransportChoice.IN_PROCESS, TransportChoice.NIXL)
TEXT_PHASES = frozenset({Phase.PREFILL, Phase.DECODE})


@dataclass(frozen=True, slots=True)
class LoadedText:
    """What an engine needs to run."""

    config: ModelConfig
    runner: ModelRunner
    #: Computes split steps too; None where each step is of both phases.
    split: "SplitRunner | None"
    #: The memory of its KV blocks.
    pool: KvPool
    pacing: LayerPacing
    latency: LatencyModel
    num_blocks: int
    compiler: GrammarCompiler
    model_digest: str
    #: SHA-256 of tokenizer.json, hexadecimal.
    tokenizer_digest: str
    #: Tokens that are nothing but punctuation.
    punctuation: frozenset[int]
    #: None when no evicted block is kept.
    packer: KvPacker | None
    #: The other ranks of a tensor-parallel group.
    followers: "Followers | None"

    def root_of(self, submit: Submit) -> bytes:
        """What the first block of a request's KV is chained to in the prefix cache."""
        salt = submit.cache_salt
        # What an earlier attempt generated was no part of the prompt then either.
        rope, num_tokens = self.config.rope, len(submit.token_ids) - submit.num_delivered
        if rope.scaling is RopeScaling.DYNAMIC and num_tokens > rope.original_context_tokens:
            # All of its K depend on how long the prompt is.
            salt = f"{num_tokens} tokens:{salt}"
        return root_hash(self.model_digest, self.tokenizer_digest, salt)


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """What pictures need.

    prefill: embeddings that sequences read; None on a worker that does not prefill. encode: those of Encodes; None,
    with `tools`, on one that does not encode.
    """

    prefill: EmbeddingMemory | None
    encode: EmbeddingMemory | None
    tools: VisionTools | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the phases of a worker need of its model. text: of prefill and decode; images: of encode and prefill.

    gpu_uuid: of the GPU that it computes on, as NVML names it; None on a CPU.
    """

    info: ModelInfo
    text: LoadedText | None
    images: LoadedImages | None
    gpu_uuid: str | None = None


def load(spec: WorkerSpec, progress: Callable[[str, float], None]) -> LoadedModel:
    """Load what the spec names, and of it what its phases need.

    progress: told what is done and how much of it, 0 to 1; may raise to stop it.

    Raises ModelUnavailable, UnsupportedModel, CorruptModel, KvCacheTooSmall, HostCacheTooSmall, ImageCacheTooSmall,
    OutOfMemory, OutOfDisk, GpuUnavailable, NotOnGpu, NotOnCpu, ProfileError and SharingUnsupported, and SharedMemoryUnavailable or TransportUnavailable when the spec insists on what cannot
    be had.
    """
    _check_transport(spec)
    check_sharing(spec)
    if spec.device is Device.CPU:
        check_dtypes(spec)
    torch.set_num_threads(spec.engine.num_threads)
    prepared = prepare(spec.model_source, progress)
    if Phase.ENCODE in spec.phases and prepared.config.vision is None:
        feature = "no pictures, which phase encode is about"
        raise UnsupportedModel(
            spec.model_source, feature, "a manifest without encode workers, or another model"
        )
    images = _load_images(spec, prepared, progress)
    embeddings = images.prefill if images is not None else None
    text = _load_text(spec, prepared, embeddings, progress) if spec.phases & TEXT_PHASES else None
    info = _model_info(
        prepared,
        max_sequence_tokens=text.num_blocks * spec.engine.block_size if text is not None else 0,
        max_image_embeddings=embeddings.num_embeddings if embeddings is not None else 0,
        block_size=spec.engine.block_size if text is not None and spec.engine.is_prefix_cache_on else 0,
    )
    # Of a tensor-parallel group: that of rank 0, which is this process.
    uuid = gpu_uuid() if spec.device is Device.CUDA else None
    return LoadedModel(info, text, images, uuid)


def _load_text(
    spec: WorkerSpec,
    prepared: PreparedModel,
    embeddings: EmbeddingMemory | None,
    progress: Callable[[str, float], None],
) -> LoadedText:
    if spec.engine.tensor_parallel > 1:
        # Brings torch.distributed, which takes a while.
        from workers.tensor_parallel.group import place_on_ranks

        placed = place_on_ranks(spec, prepared, progress)
    elif spec.device is Device.CUDA:
        # Brings Triton, which is not there where torch has no CUDA.
        from workers.device.placing import place_on_gpu

        placed = place_on_gpu(spec, prepared, progress)
    else:
        placed = _place_on_cpu(spec, prepared, progress)
    try:
        return _loaded_text(spec, prepared, placed, embeddings, progress)
    except BaseException:
        placed.close()
        raise


def _loaded_text(
    spec: WorkerSpec,
    prepared: PreparedModel,
    placed: PlacedText,
    embeddings: EmbeddingMemory | None,
    progress: Callable[[str, float], None],
) -> LoadedText:
    config = prepared.config
    kv_cache, layout = placed.kv_cache, placed.layout
    latency, problem = first_latency(
        spec.profile,
        model_shape(
            config,
            spec.model_source,
            spec.engine.weight_dtype,
            kv_head_bytes=head_bytes(layout.dtype, config.head_dim),
        ),
        placed.shape,
    )
    if problem is not None:
        logger.warning("profile_unused reason=%r", problem)
    compiler = GrammarCompiler(prepared.tokenizer_json, config.vocab_size, config.eos_token_ids)
    grammars = GrammarTools(GrammarStates(compiler), GrammarMasks(config.vocab_size))
    packer = _packer(kv_cache, spec)
    runner = ModelRunner(
        placed.model,
        kv_cache,
        spec.engine.block_size,
        grammars,
        packer,
        embeddings,
        placed.forward,
        placed.sampler,
        placed.followers,
    )
    progress("computing a first token", 0.0)
    runner.warm_up()
    split: SplitRunner | None = None
    if placed.shares is not None:
        from workers.device.placing import capture_layouts

        split = capture_layouts(spec, placed, placed.shares, runner, progress)
    if spec.device is Device.CUDA:
        from workers.device.late_kernels import watch_late_kernels

        watch_late_kernels(spec.worker_id)
    return LoadedText(
        config=config,
        runner=runner,
        split=split,
        pool=placed.pool,
        pacing=LayerPacing(
            num_layers=layout.num_layers,
            token_bytes=layout.token_bytes,
            max_chunk_bytes=spec.kv_transfer.max_chunk_bytes,
            layer_launch_s=GPU_LAYER_LAUNCH_S if spec.device is Device.CUDA else 0.0,
            max_graph_tokens=MAX_MIXED_TOKENS,
            fixed=spec.kv_transfer.layer_group_size,
        ),
        latency=latency,
        num_blocks=kv_cache.shape[2],
        compiler=compiler,
        model_digest=prepared.digest,
        tokenizer_digest=hashlib.sha256(prepared.tokenizer_json).hexdigest(),
        punctuation=_punctuation(prepared.tokenizer_json),
        packer=packer,
        followers=placed.followers,
    )


def _place_on_cpu(
    spec: WorkerSpec, prepared: PreparedModel, progress: Callable[[str, float], None]
) -> PlacedText:
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


def check_sharing(spec: WorkerSpec) -> None:
    """Raises SharingUnsupported. The manifest and the command line have the same rule, and another one for phases: a worker that dies after a role switch begins
    with those that it had then, and is a mixed one with them.
    """
    engine = spec.engine
    why = why_mixed(
        is_on_gpu=spec.device is Device.CUDA,
        tensor_parallel=engine.tensor_parallel,
        phases=SPLIT_PHASES,
        step_budget=engine.step_budget,
    )
    if engine.phase_sharing is not PhaseSharing.MIXED and why is not None:
        setting = f"engine.phaseSharing {engine.phase_sharing}"
        raise SharingUnsupported(setting, f"cannot be had {why}", f"use {PhaseSharing.MIXED}")


def check_dtypes(spec: WorkerSpec) -> None:
    """Raises NotOnCpu. The manifest and the command line have the same rule."""
    engine = spec.engine
    if not is_computed_in(engine.weight_dtype, is_on_gpu=False):
        raise NotOnCpu(f"engine.weightDtype {engine.weight_dtype}", f"use {' or '.join(CPU_DTYPES)}")
    if engine.kv_dtype is not KvDtype.AUTO:
        raise NotOnCpu(f"engine.kvDtype {engine.kv_dtype}", f"use {KvDtype.AUTO}")


def _load_images(
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
        host_memory(layout, num_blocks, _shared_memory(num_bytes, spec), is_in_nixl=is_in_nixl)
        for _ in range(number)
    ]


def _take_embeddings_on_gpu(
    spec: WorkerSpec, layout: KvLayout, num_blocks: int, number: int
) -> list[EmbeddingMemory]:
    # Brings Triton, which is not there where torch has no CUDA.
    from workers.device.pictures import take_embeddings

    return take_embeddings(spec, layout, num_blocks, number)


def _punctuation(tokenizer_json: bytes) -> frozenset[int]:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    return punctuation_token_ids(tokenizer.decode_batch([[i] for i in ids]))


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
    memory = _shared_memory(num_bytes, spec)
    kv_cache = (
        memory.tensor(shape, torch.float32) if memory is not None else torch.empty(shape, dtype=torch.float32)
    )
    for i, layer in enumerate(kv_cache):
        progress(f"taking the KV cache ({kv_cache.nbytes / 2**20:.0f} MiB)", i / len(kv_cache))
        layer.zero_()
    is_in_nixl = spec.kv_transfer.transport is TransportChoice.NIXL
    return HostPool(kv_cache, layout, memory, is_in_nixl=is_in_nixl), kv_cache


def _check_transport(spec: WorkerSpec) -> None:
    """Raises TransportUnavailable: with it each transfer would be refused."""
    if spec.device is Device.CPU and spec.kv_transfer.transport is TransportChoice.CUDA_IPC:
        reason = (
            "the KV cache of this worker is in memory of the host, not of a GPU; "
            "set kvTransfer.transport to auto, shm or grpc"
        )
        raise TransportUnavailable(TransportChoice.CUDA_IPC, reason)
    if spec.device is Device.CUDA and spec.kv_transfer.transport in _OF_HOSTS:
        reason = (
            "the KV cache of this worker is in memory of a GPU, not of the host; "
            "set kvTransfer.transport to auto, cuda_ipc or grpc"
        )
        raise TransportUnavailable(spec.kv_transfer.transport, reason)


def _shared_memory(num_bytes: int, spec: WorkerSpec) -> SharedMemory | None:
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


def _packer(kv_cache: torch.Tensor, spec: WorkerSpec) -> KvPacker | None:
    config = spec.engine
    if config.host_cache_bytes == 0 or not config.is_prefix_cache_on:
        return None
    try:
        packer = KvPacker(kv_cache, codec_of(config.host_cache_codec))
    except ValueError as error:
        feature = f"KV that engine.hostCacheCodec {config.host_cache_codec} cannot pack ({error})"
        raise UnsupportedModel(spec.model_source, feature, "hostCacheCodec none") from error
    if config.host_cache_bytes < packer.block_bytes:
        raise HostCacheTooSmall(config.host_cache_bytes, packer.block_bytes)
    check_memory("the host cache", config.host_cache_bytes, "lower engine.hostCacheMiB")
    return packer


def _model_info(
    prepared: PreparedModel, *, max_sequence_tokens: int, max_image_embeddings: int, block_size: int
) -> ModelInfo:
    config = prepared.config
    return ModelInfo(
        tokenizer_json=prepared.tokenizer_json,
        chat_template=prepared.chat_template,
        architecture=config.architecture,
        max_context_tokens=config.max_context_tokens,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        model_digest=prepared.digest,
        bos_token=config.bos_token,
        eos_token=config.eos_token,
        max_sequence_tokens=max_sequence_tokens,
        vision_json=vision_json(config.vision) if config.vision is not None else "",
        max_image_embeddings=max_image_embeddings,
        block_size=block_size,
    )
