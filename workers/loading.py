"""Everything between a WorkerSpec and an engine that can run: model, KV cache, layout. Blocks for seconds."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from kvtransfer.config import TransportChoice
from kvtransfer.errors import TransportUnavailable
from kvtransfer.layout import head_bytes
from kvtransfer.pool import KvPool
from workers.api import Device, ModelInfo, Phase, PhaseSharing, Submit, WorkerSpec
from workers.block_hash import root_hash
from workers.device.buckets import MAX_MIXED_TOKENS
from workers.device.cpu_placing import check_dtypes, place_on_cpu
from workers.device.gpu import gpu_uuid
from workers.device.placed import PlacedText
from workers.embeddings.memory import EmbeddingMemory
from workers.engine.decoding.cautious import punctuation_token_ids
from workers.engine.grammar import GrammarCompiler
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.grammar_states import GrammarStates
from workers.engine.kv_packer import KvPacker, codec_of
from workers.engine.pacing import GPU_LAYER_LAUNCH_S, LayerPacing
from workers.engine.runner import GrammarTools, ModelRunner
from workers.errors import HostCacheTooSmall, SharingUnsupported, UnsupportedModel
from workers.image_loading import LoadedImages, load_images
from workers.latency_model import LatencyModel
from workers.limits import SPLIT_PHASES, why_mixed
from workers.loaded_shapes import first_latency, model_shape
from workers.model.config import ModelConfig, RopeScaling
from workers.model.prepare import PreparedModel, prepare
from workers.model.resources import check_memory
from workers.model.vision.config import vision_json

if TYPE_CHECKING:
    from workers.device.split_runner import SplitRunner
    from workers.tensor_parallel.followers import Followers

logger = logging.getLogger(__name__)

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
    images = load_images(spec, prepared, progress)
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
        placed = place_on_cpu(spec, prepared, progress)
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


def _punctuation(tokenizer_json: bytes) -> frozenset[int]:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    return punctuation_token_ids(tokenizer.decode_batch([[i] for i in ids]))


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
