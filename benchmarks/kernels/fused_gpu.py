"""The small and the KV-moving kernels on a GPU, against torch, eager and compiled.

    python benchmarks/kernels/fused_gpu.py [--quick] [--only PART] [--json FILE]

Needs an NVIDIA GPU, and measures nothing where tests/gpu/test_fused.py fails on it. Every way runs as a CUDA graph of several launches over different copies of its inputs, which
together are larger than the L2 cache, so that neither launches nor caches are measured; transfers, which are large and
take their slots from the host, run without one. Times are medians; bytes are counted by hand: what must be read and written once. The share is
of the rate of a copy within the device, measured beside.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812 - torch's own name for it

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from phasewise_kernels.block_copy.op import start_block_copy  # noqa: E402
from phasewise_kernels.block_copy.reference import TokenRows, convert, gather, scatter  # noqa: E402
from phasewise_kernels.kv_codec.op import decode_pages, encode_pages  # noqa: E402
from phasewise_kernels.kv_codec.reference import CODECS, PageCodec  # noqa: E402
from phasewise_kernels.kv_int4.op import PACKED_DTYPE  # noqa: E402
from phasewise_kernels.kv_int4.rows import row_bytes  # noqa: E402
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch, paged_attention_cuda  # noqa: E402
from phasewise_kernels.quantised_attention.op import quantised_attention  # noqa: E402
from phasewise_kernels.rms_norm.op import rms_norm  # noqa: E402
from phasewise_kernels.rope_write.op import rope_write  # noqa: E402
from phasewise_kernels.sample.op import sample  # noqa: E402
from phasewise_kernels.swiglu.op import swiglu  # noqa: E402

TESTS = "tests/gpu/test_fused.py"
#: Copies of the inputs together are as large.
COPIES_BYTES = 256 << 20
#: Llama-3-8B.
HIDDEN, MLP, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 4096, 14336, 32, 8, 128, 32
EPS = 1e-5
BF16 = torch.bfloat16
Way = Callable[[int], Any]
#: Small: norms, gates, rotation.
PARTS = ("small", "sample", "transfer", "attention")


def seconds(way: Way, num_copies: int, num_rounds: int, is_graph: bool = True) -> float:
    """Median of one call."""
    for i in range(min(3, num_copies)):
        way(i)
    torch.cuda.synchronize()
    calls = max(8, num_copies) if is_graph else 3
    graph = torch.cuda.CUDAGraph()
    if is_graph:
        with torch.cuda.graph(graph):
            for i in range(calls):
                way(i % num_copies)
    times = []
    for number in range(num_rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if is_graph:
            graph.replay()
        else:
            for i in range(calls):
                way(i % num_copies)
        end.record()
        end.synchronize()
        if number:
            times.append(begin.elapsed_time(end) / 1e3 / calls)
    return float(statistics.median(times))


class Table:
    """Rows that are measured and printed as they come."""

    def __init__(self, num_rounds: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._num_rounds = num_rounds
        one = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(one)
        copy_s = seconds(lambda _: other.copy_(one), 1, num_rounds, is_graph=False)
        self.copy_bytes_per_s = 2 * one.numel() / copy_s
        print(f"copy within the device: {self.copy_bytes_per_s / 1e12:.2f} TB/s, read and written")

    def measure(
        self, what: str, num_bytes: int, num_copies: int, ways: dict[str, Way], is_graph: bool = True
    ) -> None:
        """num_bytes: that one call must move. A way that fails has no row but a reason."""
        for name, way in ways.items():
            row: dict[str, Any] = {"what": what, "way": name, "bytes": num_bytes}
            try:
                row["seconds"] = seconds(way, num_copies, self._num_rounds, is_graph)
                row["share_of_copy"] = num_bytes / row["seconds"] / self.copy_bytes_per_s
                times = f"{row['seconds'] * 1e6:>9.1f} us {num_bytes / row['seconds'] / 1e9:>7.0f} GB/s"
                print(f"{what:<52}{name:<16}{times}{row['share_of_copy']:>6.2f}", flush=True)
            except (ImportError, RuntimeError, TypeError) as error:
                row["not_run"] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{what:<52}{name:<16} not run, {row['not_run'][:80]}", flush=True)
            self.rows.append(row)


def copies_of(num_bytes: int) -> int:
    return max(1, min(64, COPIES_BYTES // max(1, num_bytes)))


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def norm_ways(table: Table, num_rows: int) -> None:
    """Sum with the residual, and norm."""
    num_bytes = 4 * num_rows * HIDDEN * 2
    n = copies_of(num_bytes)
    rows, added, weight = random(n, num_rows, HIDDEN), random(n, num_rows, HIDDEN), random(HIDDEN)

    def eager(i: int) -> torch.Tensor:
        rows[i].add_(added[i])
        return F.rms_norm(rows[i], (HIDDEN,), weight, EPS)

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return F.rms_norm(x, (HIDDEN,), weight, EPS)

    compiled = torch.compile(both, dynamic=False)
    ways: dict[str, Way] = {
        "ours": lambda i: rms_norm(rows[i], weight, EPS, added=added[i]),
        "torch": eager,
        "torch.compile": lambda i: compiled(rows[i], added[i]),
    }
    table.measure(f"rms_norm with residual, {num_rows} x {HIDDEN}", num_bytes, n, ways)


def gate_ways(table: Table, num_rows: int) -> None:
    """The gate."""
    num_bytes = 3 * num_rows * MLP * 2
    n = copies_of(num_bytes)
    gate_up = random(n, num_rows, 2 * MLP)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    compiled = torch.compile(plain, dynamic=False)
    ways: dict[str, Way] = {
        "ours": lambda i: swiglu(gate_up[i]),
        "torch": lambda i: plain(gate_up[i]),
        "torch.compile": lambda i: compiled(gate_up[i]),
    }
    table.measure(f"swiglu, {num_rows} x {MLP}", num_bytes, n, ways)


def rope_ways(table: Table, num_tokens: int, cache_dtype: torch.dtype) -> None:
    """Rotation and write."""
    num_all = NUM_HEADS + 2 * NUM_KV_HEADS
    is_packed = cache_dtype == PACKED_DTYPE
    width = row_bytes(HEAD_DIM) if is_packed else HEAD_DIM
    read_bytes = HEAD_DIM * (num_all * 2 + 2 * 4)
    num_bytes = num_tokens * (
        read_bytes + NUM_HEADS * HEAD_DIM * 2 + 2 * NUM_KV_HEADS * width * cache_dtype.itemsize
    )
    n = copies_of(num_bytes)
    heads, half = (
        random(n, num_tokens, num_all, HEAD_DIM),
        torch.rand(num_tokens, 1, HEAD_DIM // 2, device="cuda"),
    )
    angles = torch.cat((half, half), -1)
    cos, sin = angles.cos(), angles.sin()
    num_blocks = num_tokens // 16 + 64
    caches = [
        torch.zeros(n, num_blocks, 16, NUM_KV_HEADS, width, device="cuda").to(cache_dtype) for _ in "kv"
    ]
    slots = torch.randperm(num_blocks * 16, device="cuda")[:num_tokens]

    def plain(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        query_key = x[:, : NUM_HEADS + NUM_KV_HEADS].float()
        first, second = query_key.chunk(2, dim=-1)
        turned = (query_key * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
        k.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = turned[:, NUM_HEADS:].to(k.dtype)
        v.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = x[:, NUM_HEADS + NUM_KV_HEADS :].to(v.dtype)
        return turned[:, :NUM_HEADS].contiguous()

    compiled = torch.compile(plain, dynamic=False)
    ways: dict[str, Way] = {
        "ours": lambda i: rope_write(heads[i], (cos, sin), slots, caches[0][i], caches[1][i]),
        "torch": lambda i: plain(heads[i], caches[0][i], caches[1][i]),
        "torch.compile": lambda i: compiled(heads[i], caches[0][i], caches[1][i]),
    }
    if is_packed:
        # Of torch it would be a dozen kernels.
        ways = {"ours": ways["ours"]}
    name = "int4" if is_packed else str(cache_dtype).removeprefix("torch.")
    table.measure(f"rope_write, {num_tokens} tokens, cache {name}", num_bytes, n, ways)


def sample_ways(
    table: Table, num_rows: int, vocab_size: int, kind: str, options: tuple[float, int, float]
) -> None:
    """peaked: logits as a model's; flat: normal ones, whose draw does not end among the likeliest; flat, bf16: with many that are equal."""
    heat, top_k, top_p = options
    dtype = BF16 if kind == "flat, bf16" else torch.float32
    num_bytes = num_rows * vocab_size * dtype.itemsize
    n = max(2, min(8, copies_of(num_bytes)))
    logits = torch.randn(n, num_rows, vocab_size, device="cuda")
    if kind == "peaked":
        logits = (logits * 0.9).exp() * 1.5
    logits = logits.to(dtype)
    given = {
        "temperature": torch.full((num_rows,), heat, dtype=torch.float64, device="cuda"),
        "top_k": torch.full((num_rows,), top_k, dtype=torch.int64, device="cuda"),
        "top_p": torch.full((num_rows,), top_p, dtype=torch.float64, device="cuda"),
        "min_p": torch.zeros(num_rows, dtype=torch.float64, device="cuda"),
        # The first draws 0.3: a flat row alone does not end among the likeliest either.
        "seeds": torch.arange(1, num_rows + 1, device="cuda"),
        "positions": torch.arange(num_rows, device="cuda"),
        "streams": torch.zeros(num_rows, dtype=torch.int64, device="cuda"),
    }
    number = torch.rand(num_rows, 1, device="cuda")

    def by_sort(x: torch.Tensor) -> torch.Tensor:
        if heat == 0:
            return x.argmax(-1)
        values, ids = torch.sort(x, dim=-1, descending=True)
        shares = torch.softmax(values.float() / heat, -1)
        if top_k:
            shares[:, top_k:] = 0
        cumulative = shares.cumsum(-1)
        if top_p < 1:
            shares = torch.where(cumulative - shares < top_p * cumulative[:, -1:], shares, 0)
            cumulative = shares.cumsum(-1)
        picked = torch.searchsorted(cumulative, number * cumulative[:, -1:])
        return ids.gather(-1, picked.clamp(max=vocab_size - 1))

    ways: dict[str, Way] = {
        "ours": lambda i: sample(logits[i], **given),
        "torch, sorted": lambda i: by_sort(logits[i]),
    }
    name = f"sample, {num_rows} x {vocab_size} {kind}, T {heat}, k {top_k}, p {top_p}"
    table.measure(name, num_bytes, n, ways)


def transfer_ways(table: Table, num_tokens: int) -> None:
    """A sequence of a paged pool, all layers: packed, unpacked, and converted to another pool."""
    num_blocks = 2 * num_tokens // 16
    pool = random(NUM_LAYERS, 2, num_blocks, 16, NUM_KV_HEADS, HEAD_DIM)
    order = np.random.default_rng(0).permutation(num_blocks)[: num_tokens // 16]
    slots = (order[:, None] * 16 + np.arange(16)).reshape(-1).astype(np.int64)
    rows = TokenRows(pool, slots, (0, NUM_LAYERS), (0, NUM_KV_HEADS))
    kv_bytes = NUM_LAYERS * 2 * num_tokens * NUM_KV_HEADS * HEAD_DIM * 2
    for codec in CODECS:
        codec_ways(table, rows, kv_bytes, codec)
    small = torch.zeros(pool.shape, dtype=torch.float8_e4m3fn, device="cuda")
    target = TokenRows(small, slots, rows.layers, rows.heads)

    def by_torch(_: int) -> None:
        scatter(convert(gather(rows), small.dtype), target)

    ways: dict[str, Way] = {
        "ours": lambda _: start_block_copy(rows, target, is_checked=False),
        "torch": by_torch,
    }
    table.measure(f"block_copy bf16 to fp8, {num_tokens} tokens", kv_bytes * 3 // 2, 1, ways, is_graph=False)


def codec_ways(table: Table, rows: TokenRows, kv_bytes: int, codec: PageCodec) -> None:
    """There and back."""
    packed = encode_pages(rows, codec).pages
    num_tokens, num_bytes = len(rows.slots), kv_bytes + packed.numel()
    ways: dict[str, Way] = {
        "encode": lambda _: encode_pages(rows, codec),
        "decode": lambda _: decode_pages(packed, rows, codec),
    }
    table.measure(f"{codec}, {num_tokens} tokens", num_bytes, 1, ways, is_graph=False)


def attention_ways(table: Table, batch: int, context_len: int) -> None:
    """Packed pages, against attention over KV in bf16: its own bytes for each way."""
    num_pages = batch * context_len // 64
    query = random(batch, NUM_HEADS, HEAD_DIM)
    pool = random(1, 2, num_pages, 64, NUM_KV_HEADS, HEAD_DIM)
    lens = torch.full((batch,), context_len, dtype=torch.int32, device="cuda")
    page_table = torch.randperm(num_pages, device="cuda").view(batch, -1).int()
    tail = (random(batch, 64, NUM_KV_HEADS, HEAD_DIM), random(batch, 64, NUM_KV_HEADS, HEAD_DIM))
    rows = TokenRows(pool, np.arange(num_pages * 64, dtype=np.int64), (0, 1), (0, NUM_KV_HEADS))
    name = f"decode attention, batch {batch}, context {context_len}"
    for codec in ("int4_hadamard", "gear", "gear_l"):
        pages = encode_pages(rows, codec).pages.view(num_pages, -1)
        way = {codec: lambda _: quantised_attention(query, pages, page_table, lens, tail, codec=codec)}  # noqa: B023
        table.measure(name, pages.numel(), 1, way)
    k, v = (pool[0, i].view(batch, context_len, NUM_KV_HEADS, HEAD_DIM).transpose(1, 2) for i in range(2))
    k, v = k.contiguous(), v.contiguous()

    def attend(_: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(query[:, :, None], k, v, enable_gqa=True)

    def attend_packed(_: int) -> torch.Tensor:
        # Heads of a group as rows: SDPA then reads K and V once.
        grouped = query.view(batch, NUM_KV_HEADS, -1, HEAD_DIM)
        return F.scaled_dot_product_attention(grouped, k, v)

    ways: dict[str, Way] = {"bf16, SDPA": attend, "bf16, SDPA rows": attend_packed}
    ways |= varlen_way(query, pool, context_len)
    batch_of = CudaAttentionBatch(
        page_table,
        torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        lens,
        64,
        num_tokens=batch,
        max_query_len=1,
        max_context_len=context_len,
    )
    ways["bf16, our paged"] = lambda _: paged_attention_cuda(query, pool[0, 0], pool[0, 1], batch_of)
    table.measure(name, 2 * k.numel() * 2, 1, ways)


def varlen_way(query: torch.Tensor, pool: torch.Tensor, context_len: int) -> dict[str, Way]:
    """FlashAttention as torch has it for sequences of any length; from torch 2.10 on."""
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device="cuda")
    k_starts = starts * context_len
    k, v = (pool[0, i].view(-1, NUM_KV_HEADS, HEAD_DIM) for i in range(2))

    def attend(_: int) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        # Earlier versions of torch take fewer KV heads without being told.
        given = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
        return varlen_attn(query, k, v, starts, k_starts, 1, context_len, **given)

    return {"bf16, varlen": attend}


def measure_part(table: Table, part: str, *, is_quick: bool) -> None:
    """All rows of one part."""
    match part:
        case "small":
            for num_rows in (64, 2048):
                norm_ways(table, num_rows)
                gate_ways(table, num_rows)
                for cache_dtype in (BF16, torch.float8_e4m3fn, PACKED_DTYPE):
                    rope_ways(table, num_rows, cache_dtype)
        case "sample":
            for num_rows in (1, 8, 64, 256):
                for kind, options in (
                    ("peaked", (0.0, 0, 1.0)),
                    ("peaked", (1.0, 0, 1.0)),
                    ("peaked", (0.8, 0, 0.95)),
                    ("peaked", (0.8, 50, 1.0)),
                    ("flat", (1.0, 0, 1.0)),
                    ("flat", (1.0, 0, 0.9)),
                    ("flat", (2.0, 0, 1.0)),
                    ("flat", (2.0, 20000, 0.9)),
                    ("flat, bf16", (2.0, 20000, 0.9)),
                ):
                    sample_ways(table, num_rows, 128256, kind, options)
        case "transfer":
            transfer_ways(table, 4096 if is_quick else 8192)
        case "attention":
            for batch, context_len in ((1, 32768), (8, 32768), (32, 32768), (64, 2048)):
                attention_ways(table, batch, context_len)
                torch.cuda.empty_cache()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    args = parser.parse_args()
    parts = [args.only] if args.only else PARTS
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    machine = describe_gpu()
    table = Table(5 if args.quick else 20)
    for part in parts:
        measure_part(table, part, is_quick=args.quick)
        if args.json:
            results = {"machine": machine, "copy_bytes_per_s": table.copy_bytes_per_s, "rows": table.rows}
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
