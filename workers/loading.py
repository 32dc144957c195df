"""Everything between a WorkerSpec and an engine that can run: model, KV cache, layout. Blocks for seconds."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from kvtransfer.layout import KvLayout
from phasewise_kernels import jit
from workers.api import EngineConfig, ModelInfo, Submit, WorkerSpec
from workers.engine.block_hash import root_hash
from workers.engine.decoding.cautious import punctuation_token_ids
from workers.engine.grammar import GrammarCompiler
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.grammar_states import GrammarStates
from workers.engine.runner import GrammarTools, ModelRunner
from workers.errors import KvCacheTooSmall
from workers.model.config import ModelConfig, RopeScaling
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
    compiler: GrammarCompiler
    #: SHA-256 of tokenizer.json, hexadecimal.
    tokenizer_digest: str
    #: Tokens that are nothing but punctuation.
    punctuation: frozenset[int]

    def root_of(self, submit: Submit) -> bytes:
        """What the first block of a request's KV is chained to in the prefix cache."""
        salt = submit.cache_salt
        # What an earlier attempt generated was no part of the prompt then either.
        rope, num_tokens = self.config.rope, len(submit.token_ids) - submit.num_delivered
        if rope.scaling is RopeScaling.DYNAMIC and num_tokens > rope.original_context_tokens:
            # All of its K depend on how long the prompt is.
            salt = f"{num_tokens} tokens:{salt}"
        return root_hash(self.info.model_digest, self.tokenizer_digest, salt)


def load(spec: WorkerSpec, progress: Callable[[str, float], None]) -> LoadedModel:
    """Load what the spec names. progress: told what is done and how much of it, 0 to 1; may raise to stop it.

    Raises ModelUnavailable, UnsupportedModel, CorruptModel, KvCacheTooSmall, OutOfMemory and OutOfDisk.
    """
    torch.set_num_threads(spec.engine.num_threads)
    prepared = prepare(spec.model_source, progress)
    progress("loading the weights", 0.0)
    model = Llama(prepared.config, load_weights(prepared), spec.engine.weight_dtype)
    layout = prepared.config.kv_layout(
        block_size=spec.engine.block_size, dtype=KV_DTYPE, model_digest=prepared.digest
    )
    kv_cache = _take_kv_cache(model, layout, spec.engine, progress)
    config = prepared.config
    compiler = GrammarCompiler(prepared.tokenizer_json, config.vocab_size, config.eos_token_ids)
    grammars = GrammarTools(GrammarStates(compiler), GrammarMasks(config.vocab_size))
    runner = ModelRunner(model, kv_cache, spec.engine.block_size, spec.kv_transfer.layer_group_size, grammars)
    jit.warm_up(lambda what, done: progress(f"preparing the CPU kernels ({what})", done))
    progress("computing a first token", 0.0)
    runner.warm_up()
    num_blocks = kv_cache.shape[2]
    return LoadedModel(
        config=config,
        runner=runner,
        kv_cache=kv_cache,
        layout=layout,
        num_blocks=num_blocks,
        info=_model_info(prepared, max_sequence_tokens=num_blocks * spec.engine.block_size),
        compiler=compiler,
        tokenizer_digest=hashlib.sha256(prepared.tokenizer_json).hexdigest(),
        punctuation=_punctuation(prepared.tokenizer_json),
    )


def _punctuation(tokenizer_json: bytes) -> frozenset[int]:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    return punctuation_token_ids(tokenizer.decode_batch([[i] for i in ids]))


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
