"""transformers in this process: static batches, one after the other. It has no queue and no scheduler."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.serving.load_records import Record


def load_model(folder: Path, num_threads: int) -> PreTrainedModel:
    """fp32 on the CPU, with torch's attention."""
    torch.set_num_threads(num_threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model


def run_batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, batch_size: int, num_tokens: int
) -> list[Record]:
    """Prompts of one length in batches of so many. A request begins when its batch does.

    The greedy loop of `generate` without what that does besides, so that the time of each token is known.
    """
    records: list[Record] = []
    for first in range(0, len(prompts), batch_size):
        records += _run_batch(model, prompts[first : first + batch_size], num_tokens)
    return records


@torch.inference_mode()
def _run_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Record]:
    began_s = time.perf_counter()
    inputs, cache = torch.tensor([list(prompt) for prompt in prompts]), DynamicCache(config=model.config)
    columns: list[list[int]] = []
    times_s: list[float] = []
    for _ in range(num_tokens):
        result = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = result.logits[:, -1].argmax(dim=-1, keepdim=True)
        columns.append(inputs[:, 0].tolist())
        times_s.append(time.perf_counter())
    return [
        Record(len(prompt), began_s, tuple(column[i] for column in columns), tuple(times_s))
        for i, prompt in enumerate(prompts)
    ]
