"""SARATHI and Sarathi-Serve: how large the steps of an engine may be. Pure.

The batches themselves are the engine's: workers/engine/scheduler.py packs them, stall-free or decode-maximal. What is left is arithmetic
before it starts.
Sources: SARATHI (arXiv 2308.16369), section 4; Sarathi-Serve (OSDI'24), section 4 on the token budget, whose profile has no published
script.
"""

import math
from collections.abc import Callable

from workers.step_shape import StepShape, chunk, decodes


def max_batch(*, device_bytes: float, model_bytes: float, max_tokens: int, kv_token_bytes: float) -> int:
    """Sequences whose KV fits beside the model, each of max_tokens tokens. Source: SARATHI."""
    return max(0, math.floor((device_bytes - model_bytes) / (max_tokens * kv_token_bytes)))


def best_prompt_ratio(chunk_tokens: int, batch_size: int) -> float:
    """Prompt tokens for each output token at which every decode rides with a chunk, and every chunk with batch_size - 1 decodes.

    Infinite when there is no place for decodes. Source: SARATHI.
    """
    return chunk_tokens / (batch_size - 1) if batch_size > 1 else math.inf


def token_budget(
    step_s: Callable[[StepShape], float],
    *,
    target_s: float,
    num_decodes: int,
    context_tokens: int,
    max_prompt_tokens: int,
    multiple: int = 128,
    most: int = 4096,
) -> int | None:
    """The largest budget of which this and every smaller one keep a step within the target; None when the smallest does not.

    A step has num_decodes decodes of context_tokens tokens each, and fills the rest with the ends of prompts of max_prompt_tokens tokens: what
    is computed last has most to attend to. step_s: of a step, at the percentile that the target is for. Budgets are multiples of the GEMM's
    tile, up to `most`, and leave a token for prefill at least. Source: Sarathi-Serve.
    """
    found = None
    for budget in range(multiple * (num_decodes // multiple + 1), most + 1, multiple):
        step = decodes(num_decodes, num_decodes * context_tokens)
        left = budget - num_decodes
        while left > 0:
            size = min(left, max_prompt_tokens)
            step += chunk(size, max_prompt_tokens - size)
            left -= size
        if step_s(step) > target_s:
            break
        found = budget
    return found
