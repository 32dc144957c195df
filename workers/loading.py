"""Everything between a WorkerSpec and an engine that can run: model, KV cache, layout. Blocks for seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtransfer.layout import KvLayout
from workers.api import EngineConfig, ModelInfo, WorkerSpec
from workers.engine.runner import ModelRunner
from workers.errors import KvCacheTooSmall
from workers.model.config import ModelConfig
from workers.model.llama import Llama
from workers.model.prepare import PreparedModel, load_weights, prepare
from workers.model.resources import check_memory

KV_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an engine needs to run."""

    config: ModelConfig
    runner: ModelRunner
    #: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim].
    kv_cache: torch.Tensor
    layout: KvLayout
    num_blocks: int
    info: ModelInfo


def load(spec: WorkerSpec, progress: Callable[[str, float], None]) -> LoadedModel:
    """Load what the spec names. progress: told what is done and how much of it, 0 to 1; may raise to stop it.

    Raises ModelUnavailable, UnsupportedModel, CorruptModel, KvCacheTooSmall, OutOfMemory and OutOfDisk.
    """
    torch.set_num_threads(spec.engine.num_threads)
    prepared = prepare(spec.model_source, progress)
    progress("loading the weights", 0.0)
    model = Llama(prepared.config, load_weights(prepared))
    layout = prepared.config.kv_layout(
        block_size=spec.engine.block_size, dtype=KV_DTYPE, model_digest=prepared.digest
    )
    kv_cache = _take_kv_cache(model, layout, spec.engine, progress)
    runner = ModelRunner(model, kv_cache, spec.engine.block_size, spec.kv_transfer.layer_group_size)
    progress("computing a first token", 0.0)
    runner.warm_up()
    num_blocks = kv_cache.shape[2]
    info = _model_info(prepared, max_sequence_tokens=num_blocks * spec.engine.block_size)
    return LoadedModel(prepared.config, runner, kv_cache, layout, num_blocks, info)


def _take_kv_cache(
    model: Llama, layout: KvLayout, config: EngineConfig, progress: Callable[[str, float], None]
) -> torch.Tensor:
    """The block pool's memory, every page of it touched: a first use in a step would be slow."""
    num_blocks = config.kv_cache_bytes // layout.block_bytes
    if num_blocks < 1:
        raise KvCacheTooSmall(config.kv_cache_bytes, layout.block_bytes)
    check_memory("the KV cache", num_blocks * layout.block_bytes, "lower engine.kvCacheMiB")
    kv_cache = torch.empty(model.kv_cache_shape(num_blocks, config.block_size), dtype=torch.float32)
    for i, layer in enumerate(kv_cache):
        progress(f"taking the KV cache ({kv_cache.nbytes / 2**20:.0f} MiB)", i / len(kv_cache))
        layer.zero_()
    return kv_cache


def _model_info(prepared: PreparedModel, *, max_sequence_tokens: int) -> ModelInfo:
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
    )
