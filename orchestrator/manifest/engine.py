"""The keys of `engine`: limits and ways of the engine in one worker. Pure."""

from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.manifest.section import Section, inconsistent
from workers import limits
from workers.api import EngineConfig, SpanReuseConfig
from workers.limits import MIB as MIB

_ENGINE = EngineConfig()
_SPAN_REUSE = SpanReuseConfig()


class SpanReuse(Section):
    """Reuse of KV that was computed in another context; what it costs in quality is in docs/span-reuse.md."""

    recompute_fraction: float = Field(
        default=_SPAN_REUSE.recompute_fraction,
        ge=limits.SPAN_RECOMPUTE.least,
        le=limits.SPAN_RECOMPUTE.most,
        description="Part of the reused tokens that is computed again in all layers. 1 gives exact answers and "
        "saves nothing.",
    )
    min_tokens: int = Field(
        default=_SPAN_REUSE.min_tokens,
        ge=limits.SPAN_MIN_TOKENS.least,
        le=limits.SPAN_MIN_TOKENS.most,
        description="A prompt with fewer reused tokens, beyond its cached prefix, is computed as ever.",
    )


class Engine(Section):
    """Limits of the engine in one worker; buffers and pools are sized from them."""

    block_size: int = Field(
        default=_ENGINE.block_size,
        ge=limits.BLOCK_SIZE.least,
        le=limits.BLOCK_SIZE.most,
        description="Tokens in one KV block.",
    )
    kv_cache_mib: int | None = Field(
        default=None,
        alias="kvCacheMiB",
        ge=limits.KV_CACHE_MIB.least,
        le=limits.KV_CACHE_MIB.most,
        description="Memory of the KV block pool in MiB, taken at start. "
        f"Default: {_ENGINE.kv_cache_bytes // MIB}, on a GPU what is left of gpuMemoryFraction.",
    )
    gpu_memory_fraction: float = Field(
        default=_ENGINE.gpu_memory_fraction,
        gt=limits.GPU_MEMORY_FRACTION.least,
        le=limits.GPU_MEMORY_FRACTION.most,
        description="Share of a GPU's memory that the worker takes at most: weights, KV and what steps need.",
    )
    token_budget: int = Field(
        default=_ENGINE.token_budget,
        ge=limits.TOKEN_BUDGET.least,
        le=limits.TOKEN_BUDGET.most,
        description="Tokens in one step, prefill and decode together.",
    )
    max_running_sequences: int = Field(
        default=_ENGINE.max_running_sequences,
        ge=limits.MAX_RUNNING_SEQUENCES.least,
        le=limits.MAX_RUNNING_SEQUENCES.most,
        description="Sequences in one step.",
    )
    max_waiting_requests: int = Field(
        default=_ENGINE.max_waiting_requests,
        ge=limits.MAX_WAITING_REQUESTS.least,
        le=limits.MAX_WAITING_REQUESTS.most,
        description="Requests that wait in the worker; one more is refused.",
    )

    threads: int | None = Field(
        default=None,
        ge=limits.THREADS.least,
        le=limits.THREADS.most,
        description="Threads of the CPU kernels. Default: resources.cpus, rounded down, and at least one.",
    )
    tensor_parallel: int | None = Field(
        default=None,
        ge=limits.TENSOR_PARALLEL.least,
        le=limits.TENSOR_PARALLEL.most,
        description="Devices that every layer of the model is spread over, a process for each; they are one worker. On a GPU "
        "as many as resources.gpus, on a CPU processes that share its threads. Default: resources.gpus, and at least one.",
    )
    batching: Literal["stall_free", "decode_maximal"] = Field(
        default=_ENGINE.batching.value,
        description="What a step is made of. stall_free: all decodes, then prompts up to tokenBudget. "
        "decode_maximal: all decodes and one prompt.",
    )
    prefill_order: Literal["fcfs", "shortest_remaining", "least_slack"] = Field(
        default=_ENGINE.prefill_order.value,
        description="Which prompt goes first among those of one priority. fcfs: the one that came first. shortest_remaining: the one "
        "with the least left to do, where waiting makes up for length. least_slack: the one that is due first for "
        "slo.ttftMs, fair between tenants: where not all can make it, as few as possible are late.",
    )
    step_budget: Literal["fixed", "predicted"] = Field(
        default=_ENGINE.step_budget.value,
        description="Tokens of prompts that a step computes beside decodes. fixed: what they leave of tokenBudget. predicted: no more than "
        "slo.tpotMs leaves, as the worker has learnt how long its steps take.",
    )
    phase_sharing: Literal["mixed", "predicted"] = Field(
        default=_ENGINE.phase_sharing.value,
        description="How prompts and decodes share the GPU of a worker that has both. mixed: in steps of both. predicted: side by side, each on SMs "
        "of its own, where the worker predicts that prompts get further so within slo.tpotMs; it takes memory for each division of the SMs, and needs "
        "stepBudget predicted.",
    )
    tile_tokens: int | None = Field(
        default=None,
        ge=limits.TILE_TOKENS.least,
        le=limits.TILE_TOKENS.most,
        description="Steps are cut to a multiple of this many tokens where a prompt allows it; 1 cuts nowhere. Without it: 128 on a GPU, "
        "whose products are computed in tiles of so many rows, else 1.",
    )
    growth_reserve: float = Field(
        default=_ENGINE.growth_reserve,
        ge=limits.GROWTH_RESERVE.least,
        le=limits.GROWTH_RESERVE.most,
        description="Part of what running sequences may still grow to that is kept free when one more is "
        "admitted. With 1 no sequence is preempted, with 0 most run at a time.",
    )
    prefix_cache: bool = Field(
        default=_ENGINE.is_prefix_cache_on,
        description="The KV of prompts is kept for later ones that begin alike.",
    )
    weight_dtype: Literal["float32", "bfloat16", "float16", "int8", "fp8"] | None = Field(
        default=None,
        description="How the matrices of the model are kept in memory. On a CPU (float32, bfloat16, int8) all else is float32; "
        "on a GPU (float32, bfloat16, float16) all else is the same, or with fp8 (e4m3 with a scale for each output, from compute "
        "capability 8.9 on) bfloat16. Default: float32, on a GPU bfloat16.",
    )
    kv_dtype: Literal["auto", "fp8", "int4"] = Field(
        default=_ENGINE.kv_dtype.value,
        description="What KV is kept in. auto: what is computed in, float32 on a CPU. fp8: e4m3 without a scale, half of the memory, on a "
        "GPU from compute capability 8.9 on; answers differ a little. int4: four bits with scales for each head of a token, whose channels must "
        "be a power of two from 32 on; less than a third of the memory with 64 or more, on a GPU; answers differ more.",
    )
    host_cache_mib: int = Field(
        default=_ENGINE.host_cache_bytes // MIB,
        alias="hostCacheMiB",
        ge=limits.HOST_CACHE_MIB.least,
        le=limits.HOST_CACHE_MIB.most,
        description="Host memory in MiB for prefix blocks that the pool evicts, taken as it is needed; they are "
        "restored instead of computed again. 0 keeps none.",
    )
    host_cache_codec: Literal["none", "fp8", "int4_hadamard", "gear", "gear_l"] = Field(
        default=_ENGINE.host_cache_codec.value,
        description="How they are packed. All but none lose precision: answers may differ from those without "
        "hostCacheMiB.",
    )

    image_cache_mib: int = Field(
        default=_ENGINE.image_cache_bytes // MIB,
        alias="imageCacheMiB",
        ge=limits.IMAGE_CACHE_MIB.least,
        le=limits.IMAGE_CACHE_MIB.most,
        description="Memory for embeddings of pictures in MiB, taken at start by workers that encode or prefill a model "
        "that takes pictures; one that does both gives half of it to each. On a GPU it is the GPU's. It bounds the pictures of "
        "one request too.",
    )
    encode_patch_budget: int = Field(
        default=_ENGINE.encode_patch_budget,
        ge=limits.ENCODE_PATCH_BUDGET.least,
        le=limits.ENCODE_PATCH_BUDGET.most,
        description="Patches of pictures that are encoded together, over all requests.",
    )

    span_reuse: SpanReuse | None = Field(
        default=None,
        description="The KV of spans that are no prefixes is reused too, within one tenant; answers are then "
        "approximations. Absent: it is not.",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        need = limits.min_token_budget(self.max_running_sequences, self.block_size)
        if self.token_budget < need:
            sentence = (
                f"is {self.token_budget}; allowed: at least maxRunningSequences + blockSize = {need}, so that "
                "every running sequence gets its token and a prompt its next block"
            )
            inconsistent([(("tokenBudget",), sentence)])
        if self.tile_tokens is not None and self.tile_tokens > self.token_budget:
            sentence = f"is {self.tile_tokens}; allowed: at most tokenBudget = {self.token_budget}"
            inconsistent([(("tileTokens",), sentence)])
        if self.host_cache_mib > 0 and not self.prefix_cache:
            sentence = (
                f"is {self.host_cache_mib}; allowed: 0 with prefixCache: false, which leaves no block to keep"
            )
            inconsistent([(("hostCacheMiB",), sentence)])
        if self.kv_dtype == "int4" and self.host_cache_codec != "none":
            sentence = (
                f"is {self.host_cache_codec}; allowed: none with kvDtype: int4, which is packed already"
            )
            inconsistent([(("hostCacheCodec",), sentence)])
        if self.span_reuse is not None and not self.prefix_cache:
            sentence = "is set; allowed: absent with prefixCache: false, which leaves no block to reuse"
            inconsistent([(("spanReuse",), sentence)])
        return self
