"""The settings of an engine; others than these are refused, as there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AsyncEngineArgs:
    model: str = ""
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool | None = None
    max_num_batched_tokens: int | None = None
