"""What choosing the next tokens costs in a step, by rows and options, against a loop of transformers' processors.

    python benchmarks/engine/sampler.py [--quick] [--json FILE]

Both get the same logits (49152 tokens, falling with the logarithm of their rank, as those of language models
nearly do) and the same 600 tokens before each row, 100 of them generated; one torch thread, as a worker with
one core has. The baseline goes row by row, as transformers has no options that differ within a batch; what it
has no processor for is a line of torch. Both take turns in one process.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orchestrator.bench.machine import describe_machine
from workers.api import SamplingParams
from workers.engine.sampler import SampleRow, sample

NUM_ROWS = (1, 16, 64, 256)
VOCAB_SIZE = 49152
NUM_PROMPT_TOKENS = 500
NUM_TOKENS = 600
NUM_LOGPROBS = 20

CASES = {
    "greedy": SamplingParams(8),
    "top-p": SamplingParams(8, 0.8, top_p=0.95),
    "top-k": SamplingParams(8, 0.8, top_k=50),
    "all options": SamplingParams(
        8,
        0.8,
        top_k=200,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias=((7, 2.0), (11, -5.0)),
    ),
    "logprobs": SamplingParams(8, num_logprobs=NUM_LOGPROBS),
}


def make_logits(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    by_rank = 14 - 1.6 * torch.log(torch.arange(1, VOCAB_SIZE + 1.0))
    order = torch.rand(num_rows, VOCAB_SIZE, generator=generator).argsort(dim=-1)
    return by_rank[order] + 0.5 * torch.randn(num_rows, VOCAB_SIZE, generator=generator)


def row_by_row(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    """The baseline."""
    return [_one_row(logits[i : i + 1], row) for i, row in enumerate(rows)]


def _one_row(scores: torch.Tensor, row: SampleRow) -> int:
    sampling = row.sampling
    given = scores
    if sampling.logit_bias:
        scores = scores.clone()
        scores[0, [token for token, _ in sampling.logit_bias]] += torch.tensor(
            [bias for _, bias in sampling.logit_bias]
        )
    tokens = torch.tensor([row.token_ids])
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.bincount(tokens[0, row.num_prompt_tokens :], minlength=VOCAB_SIZE)
        scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        scores = _processors(sampling)(tokens, scores)  # type: ignore[arg-type]
        token = int(torch.multinomial(torch.softmax(scores, dim=-1), 1))
    if sampling.num_logprobs is not None:
        logprobs = torch.log_softmax(given, dim=-1)
        torch.topk(logprobs, sampling.num_logprobs).indices.tolist()
        int((logprobs > logprobs[0, token]).sum())
    return token


def _processors(sampling: SamplingParams) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


def measure(sampling: SamplingParams, logits: torch.Tensor, num_steps: int) -> dict[str, float]:
    """Medians of both ways in microseconds a step, and their ratio."""
    history = random.Random(2)
    rows = [
        SampleRow(sampling, i, [history.randrange(VOCAB_SIZE) for _ in range(NUM_TOKENS)], NUM_PROMPT_TOKENS)
        for i in range(len(logits))
    ]
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "loop": lambda given: row_by_row(given, rows),
        "ours": lambda given: sample(given, rows),
    }
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_steps + 1):
        for name, way in ways.items():
            # The sampler may overwrite what it gets.
            given = logits.clone()
            began_s = time.perf_counter()
            way(given)
            if number:
                times_s[name].append(time.perf_counter() - began_s)
    found = {name: round(statistics.median(values) * 1e6, 1) for name, values in times_s.items()}
    return {**found, "ratio": round(found["loop"] / found["ours"], 2)}


@torch.inference_mode()
def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'options':<12}  {'rows':>5}  {'loop':>10}  {'ours':>10}  {'ratio':>6}  (us a step, p50)")
    results = []
    for num_rows in NUM_ROWS:
        logits = make_logits(num_rows)
        for name, sampling in CASES.items():
            row = measure(sampling, logits, 3 if args.quick else 15)
            results.append({"options": name, "num_rows": num_rows, **row})
            print(
                f"{name:<12}  {num_rows:>5}  {row['loop']:>10.0f}  {row['ours']:>10.0f}  {row['ratio']:>6.2f}",
                flush=True,
            )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rows": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
