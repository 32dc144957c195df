"""The keys of `engine`: limits and ways of the engine in one worker. Pure."""

from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.manifest.section import Section, inconsistent
from workers.api import EngineConfig

MIB = 2**20

_ENGINE = EngineConfig()


class Engine(Section):
    """Limits of the engine in one worker; buffers and pools are sized from them."""

    block_size: int = Field(default=_ENGINE.block_size, ge=1, le=512, description="Tokens in one KV block.")
    kv_cache_mib: int = Field(
        default=_ENGINE.kv_cache_bytes // MIB,
        alias="kvCacheMiB",
        ge=1,
        le=16 * MIB,
        description="Memory of the KV block pool in MiB, taken at start.",
    )
    token_budget: int = Field(
        default=_ENGINE.token_budget,
        ge=1,
        le=MIB,
        description="Tokens in one step, prefill and decode together.",
    )
    max_running_sequences: int = Field(
        default=_ENGINE.max_running_sequences, ge=1, le=65536, description="Sequences in one step."
    )
    max_waiting_requests: int = Field(
        default=_ENGINE.max_waiting_requests,
        ge=1,
        le=MIB,
        description="Requests that wait in the worker; one more is refused.",
    )

    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of the CPU kernels. Default: resources.cpus, rounded down, and at least one.",
    )
    batching: Literal["stall_free", "decode_maximal"] = Field(
        default=_ENGINE.batching.value,
        description="What a step is made of. stall_free: all decodes, then prompts up to tokenBudget. "
        "decode_maximal: all decodes and one prompt.",
    )
    prefill_order: Literal["fcfs", "shortest_remaining"] = Field(
        default=_ENGINE.prefill_order.value,
        description="Which prompt goes first among those of one priority: the one that came first, or the one "
        "with the least left to do, where waiting makes up for length.",
    )
    tile_tokens: int = Field(
        default=_ENGINE.tile_tokens,
        ge=1,
        le=4096,
        description="Steps are cut to a multiple of this many tokens where a prompt allows it; 1 cuts nowhere.",
    )
    growth_reserve: float = Field(
        default=_ENGINE.growth_reserve,
        ge=0,
        le=1,
        description="Part of what running sequences may still grow to that is kept free when one more is "
        "admitted. With 1 no sequence is preempted, with 0 most run at a time.",
    )
    prefix_cache: bool = Field(
        default=_ENGINE.is_prefix_cache_on,
        description="The KV of prompts is kept for later ones that begin alike.",
    )
    weight_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        default=_ENGINE.weight_dtype.value,
        description="How the matrices of the model are kept in memory; all else is float32.",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        need = self.max_running_sequences + self.block_size
        if self.token_budget < need:
            sentence = (
                f"is {self.token_budget}; allowed: at least maxRunningSequences + blockSize = {need}, so that "
                "every running sequence gets its token and a prompt its next block"
            )
            inconsistent([(("tokenBudget",), sentence)])
        if self.tile_tokens > self.token_budget:
            sentence = f"is {self.tile_tokens}; allowed: at most tokenBudget = {self.token_budget}"
            inconsistent([(("tileTokens",), sentence)])
        return self
