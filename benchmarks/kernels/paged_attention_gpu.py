"""Attention over a paged KV cache on a GPU: decode by the lean kernel, chunks of prompts, beside what else there is.

    python benchmarks/kernels/paged_attention_gpu.py [--quick] [--chunks] [--json FILE] [--commit NAME]

Decode: 32 query heads of 128 over 2, 8 and 32 KV heads, bf16, blocks of 16 tokens in random order. `split` is our kernel
with a fixed number of pieces, the best of three numbers; `unsplit` one piece per output, as FlashAttention-2 was when
LeanAttention was published; `fa2` and `cudnn` are torch's, over K and V that lie contiguously, which those of a serving
cache do not: gathering them first would cost 2 x bytes / copy bandwidth more, given as `gather_us`. Of ragged batches FA2
takes packed sequences; cuDNN cannot within torch, which makes its plan anew at every such call. `flashinfer` and `fa3`
are there where FlashInfer and vLLM are installed: they read the same cache in the same blocks, at their best setting and
without what they plan ahead (`attention_peers.py`). Where one gives other numbers than ours it is not reported.
Chunks: `whole` has one program per tile, however few there are; `tile 64` and `tile 128` read so much of the cache at a time,
with other numbers of stages than the kernel has.

All times are of CUDA graphs of calls over different parts of a pool of 36 GB, so that inputs come from memory: medians of
replays, divided by the calls. Copy bandwidth counts bytes read and written. Nothing is reported when tests/gpu is red.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812 - torch's own name for it
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.kernels import attention_peers  # noqa: E402
from benchmarks.kernels.attention_pool import (  # noqa: E402
    POOL_BYTES,
    Part,
    Pool,
    copy_bytes_per_s,
    starts_of,
    time_s,
)
from benchmarks.kernels.attention_shapes import (  # noqa: E402
    BATCH_SIZES,
    CHUNKS,
    CONTEXTS,
    HEAD_DIM,
    KV_HEADS,
    LONG_CHUNKS,
    LONG_CONTEXT,
    NUM_HEADS,
    QUICK,
    ragged_lengths,
)
from benchmarks.kernels.attention_summary import summary_of  # noqa: E402
from phasewise_kernels.kv_int4.op import PACKED_DTYPE  # noqa: E402
from phasewise_kernels.paged_attention.cuda import (  # noqa: E402
    Tuning,
    chunk_attention,
    lean_attention,
    paged_attention_cuda,
    split_attention,
)

TESTS = "tests/gpu/test_paged_attention_gpu.py"
#: Blocks of so many tokens let FlashAttention-3 fetch chunks' K and V by TMA.
TMA_BLOCK_SIZE = 128
DECODE_COLUMNS = ("lean", "split", "fa2", "cudnn", "gather", *attention_peers.NAMES)
#: Of chunks, in tokens: not those of the kernel.
OTHER_TUNINGS = ((64, 3), (128, 3))
#: Costs more than any cut of contexts saves.
NEVER = 1 << 29


def lean(part: Part, *, window: int = 0, max_query_len: int = 1) -> None:
    """The kernel of decode."""
    lean_attention(*part.arguments, window=window, max_query_len=max_query_len)


def split(part: Part, *, num_splits: int) -> None:
    """Our baseline."""
    split_attention(*part.arguments, window=0, num_splits=num_splits)


def sdpa(part: Part, backend: SDPBackend) -> torch.Tensor:
    """Decode of an even batch."""
    size = len(part.batch.context_lens)
    keys, values = (flat.view(size, -1, *flat.shape[1:]).transpose(1, 2) for flat in part.flat)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(part.query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def packed_fa2(part: Part, key_starts: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """FlashAttention-2 over packed sequences; causal from the last token on."""
    batch = part.batch
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        part.query,
        *part.flat,
        batch.query_starts,
        key_starts,
        batch.max_query_len,
        batch.max_context_len,
        0.0,
        is_causal,
        False,
        scale=HEAD_DIM**-0.5,
    )[0]
    return output


def cudnn_chunk(part: Part, prefix_len: int) -> None:
    """One sequence: the prefix and the chunk itself, whose merge is left out."""
    query = part.query.transpose(0, 1)[None]
    for span, is_causal in ((slice(prefix_len), False), (slice(prefix_len, None), True)):
        keys, values = (flat[span].transpose(0, 1)[None] for flat in part.flat)
        if keys.shape[2]:
            torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, keys, values, None, True, 0.0, is_causal, False, scale=HEAD_DIM**-0.5
            )


def peers_us(
    parts: list[Part], lengths: Sequence[tuple[int, int]], names: Sequence[str] = attention_peers.NAMES
) -> dict[str, tuple[float, str]]:
    """Of each library that is installed and agrees with our kernels: microseconds, and the setting that took these."""
    # Both with one plan, which the first must leave as it was.
    checked = [
        (part, paged_attention_cuda(part.query, *part.caches, part.batch)) for part in (parts[0], parts[-1])
    ]
    heads = attention_peers.Heads(NUM_HEADS, parts[0].caches[0].shape[2], HEAD_DIM)
    found: dict[str, tuple[float, str]] = {}
    for name in names:
        for setting, plan in attention_peers.ways_of(name, parts[0].batch, lengths, heads).items():
            try:
                call = partial(peer, way=plan())
                for part, expected in checked:
                    part.out.fill_(float("nan"))
                    call(part)
                    attention_peers.check(part.out, expected)
                found[name] = min(found.get(name, (math.inf, "")), (1e6 * time_s(call, parts), setting))
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                print(f"{name}, {setting}: not reported, {error}"[:300], file=sys.stderr)
    return found


def peer(part: Part, way: attention_peers.Call) -> None:
    """A library's way to compute it."""
    way(part.query, *part.caches, part.out)


def decode_row(pool: Pool, lengths: list[int], num_kv_heads: int, copy: float) -> dict[str, Any]:
    """One row of the grid, in microseconds."""
    parts = pool.parts([(1, length) for length in lengths], num_kv_heads)
    num_bytes = sum(lengths) * num_kv_heads * HEAD_DIM * 4
    is_even = len(set(lengths)) == 1
    num_outputs = len(lengths) * num_kv_heads
    splits = sorted({max(1, min(128, round(programs / num_outputs))) for programs in (132, 264, 528)})

    ways: dict[str, Callable[[Part], object]] = {
        "lean": lean,
        **{f"split {count}": partial(split, num_splits=count) for count in splits},
    }
    if is_even:
        ways["fa2"] = partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)
    else:
        key_starts = starts_of(lengths)
        ways["fa2"] = lambda part: packed_fa2(part, key_starts, is_causal=False)
    times = {name: 1e6 * time_s(way, parts) for name, way in ways.items()}
    if is_even:
        try:
            times["cudnn"] = 1e6 * time_s(partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), parts)
        except RuntimeError as error:
            print(f"cuDNN: {error}"[:100], file=sys.stderr)
    peers = peers_us(parts, [(1, length) for length in lengths])
    row: dict[str, Any] = {
        "kv_heads": num_kv_heads,
        "batch": len(lengths),
        "mean_context": sum(lengths) // len(lengths),
        "is_ragged": not is_even,
        "kv_bytes": num_bytes,
        "lean_us": times["lean"],
        "split_us": min(times[f"split {count}"] for count in splits),
        "num_splits": min(splits, key=lambda count: times[f"split {count}"]),
        "fa2_us": times["fa2"],
        "cudnn_us": times.get("cudnn"),
        **{f"{name}_us": microseconds for name, (microseconds, _) in peers.items()},
        **{f"{name}_setting": setting for name, (_, setting) in peers.items()},
        "gather_us": 1e6 * 2 * num_bytes / copy,
        "share_of_copy": num_bytes / times["lean"] * 1e6 / copy,
    }
    if max(lengths) >= LONG_CONTEXT:
        # One program reads all of an output: more replays would take seconds.
        row["unsplit_us"] = 1e6 * time_s(partial(split, num_splits=1), parts[:1], num_replays=1)
    return row


def decode_grid(is_quick: bool) -> list[tuple[list[int], int]]:
    """(lengths, KV heads) of each row that fits into the pool."""
    rows = []
    for num_kv_heads, batch_size, context_len in (
        QUICK if is_quick else product(KV_HEADS, BATCH_SIZES, CONTEXTS)
    ):
        if batch_size * context_len * num_kv_heads * HEAD_DIM * 2 * 1.1 > POOL_BYTES:
            continue
        rows.append(([context_len] * batch_size, num_kv_heads))
        if batch_size > 1:
            rows.append((ragged_lengths(batch_size, context_len), num_kv_heads))
    return rows


def chunk(part: Part, **arguments: Any) -> None:
    """The kernel of chunks."""
    chunk_attention(*part.arguments, **arguments)


def chunk_row(pool: Pool, name: str, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Chunks of prompts over 8 KV heads, causal; TFLOP/s of what rows see."""
    parts = pool.parts(lengths, 8)[:8]
    flop = sum(
        4 * NUM_HEADS * HEAD_DIM * (new * (total - new) + new * (new + 1) / 2) for new, total in lengths
    )
    key_starts = starts_of([total for _, total in lengths])
    ways: dict[str, Callable[[Part], object]] = {
        "paged": lambda part: paged_attention_cuda(part.query, *part.caches, part.batch, out=part.out),
        "fa2": lambda part: packed_fa2(part, key_starts, is_causal=True),
    }
    if all(new > 1 for new, _ in lengths):
        kernel = partial(chunk, window=0, min_query_len=2)
        ways["chunk kernel"] = kernel
        ways["whole"] = partial(kernel, part_tokens=NEVER)
        for tile_tokens, num_stages in OTHER_TUNINGS:
            ways[f"tile {tile_tokens}, {num_stages} stages"] = partial(
                kernel, tuning=Tuning(tile_tokens, 8, num_stages)
            )
    if len(lengths) == 1:
        ways["cudnn"] = lambda part: cudnn_chunk(part, lengths[0][1] - lengths[0][0])
    row: dict[str, Any] = {"name": name, "tflop": flop / 1e12}
    for way, call in ways.items():
        seconds = time_s(call, parts)
        row[way] = {"us": seconds * 1e6, "tflop_per_s": flop / seconds / 1e12}
    peers = peers_us(parts, lengths)
    if "fa3" in peers:
        large = pool.parts(lengths, 8, block_size=TMA_BLOCK_SIZE)[:8]
        found = peers_us(large, lengths, ("fa3",))
        peers |= {f"{name}, blocks of {TMA_BLOCK_SIZE}": value for name, value in found.items()}
    for peer_name, (microseconds, setting) in peers.items():
        row[peer_name] = {"us": microseconds, "tflop_per_s": flop / microseconds / 1e6, "setting": setting}
    return row


def shape_rows(pool: Pool, copy: float) -> list[dict[str, Any]]:
    """Decode of 64 sequences of 2,048 tokens over 8 KV heads in other dtypes, with a window, with trees' rows."""
    rows = []
    for name, dtype, new, window in (
        ("bf16", torch.bfloat16, 1, 0),
        ("fp8 cache", torch.float8_e4m3fn, 1, 0),
        ("int4 cache", PACKED_DTYPE, 1, 0),
        ("int4 cache, 4 new tokens", PACKED_DTYPE, 4, 0),
        ("window of 1024", torch.bfloat16, 1, 1024),
        ("4 new tokens", torch.bfloat16, 4, 0),
        ("16 new tokens", torch.bfloat16, 16, 0),
    ):
        parts = pool.parts([(new, 2048)] * 64, 8, dtype)
        num_bytes = 64 * min(2048, window or 2048) * 2 * parts[0].caches[0][0, 0].nbytes
        call = partial(lean, window=window, max_query_len=new)
        seconds = time_s(call, parts)
        rows.append({"name": name, "us": seconds * 1e6, "share_of_copy": num_bytes / seconds / copy})
    # Chunks unpack again in each tile of new tokens.
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, PACKED_DTYPE):
        parts = pool.parts([(512, 2560)], 8, dtype)
        seconds = time_s(partial(chunk, window=0, min_query_len=2), parts)
        rows.append({"name": f"512 after 2048, cache {dtype}".replace("torch.", ""), "us": seconds * 1e6})
    return rows


def compile_all(pool: Pool) -> None:
    """Our kernels, side by side."""
    calls: list[Callable[[], object]] = []
    for heads, size in product(KV_HEADS, (1, 64)):
        part = pool.parts([(1, 64)] * size, heads)[0]
        calls += [partial(lean, part), partial(split, part, num_splits=2)]
    for lengths in ([(64, 64)], [(64, 64), (1, 64)]):
        part = pool.parts(lengths, 8)[0]
        calls.append(partial(paged_attention_cuda, part.query, *part.caches, part.batch, out=part.out))

    def compiled(call: Callable[[], object]) -> None:
        torch.cuda.set_device(0)
        call()

    with ThreadPoolExecutor(16) as executor:
        list(executor.map(compiled, calls))
    torch.cuda.synchronize()


def print_decode(row: dict[str, Any]) -> None:
    """A line of the table."""
    times = (row.get(f"{name}_us") for name in DECODE_COLUMNS)
    shown = " ".join(f"{'-':>9}" if value is None else f"{value:9.1f}" for value in times)
    kind = "ragged" if row["is_ragged"] else ""
    print(
        f"{row['kv_heads']:>3} {row['batch']:>3} {row['mean_context']:>7} {kind:6} {shown} {row['share_of_copy']:5.0%}",
        flush=True,
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the most telling rows alone")
    parser.add_argument("--chunks", action="store_true", help="these alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--commit", help="of the code, where git cannot say")
    args = parser.parse_args()
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    pool = Pool()
    compile_all(pool)
    copy = copy_bytes_per_s()
    machine = describe_gpu(args.commit) | attention_peers.versions()
    print(machine, f"copy {copy / 1e12:.2f} TB/s")
    result: dict[str, Any] = {"machine": machine, "copy_tb_per_s": copy / 1e12}

    def keep(**found: Any) -> None:
        result.update(found)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    shapes = [] if args.quick else shape_rows(pool, copy)
    keep(shapes=shapes)
    for row in shapes:
        share = f"{row['share_of_copy']:5.0%} of copy" if "share_of_copy" in row else ""
        print(f"{row['name']:32} {row['us']:8.1f} us {share}", flush=True)
    chunks: list[dict[str, Any]] = []
    for name, lengths in CHUNKS.items():
        if args.quick and name in LONG_CHUNKS:
            continue
        chunks.append(chunk_row(pool, name, lengths))
        keep(chunks=chunks)
        found = {way: value for way, value in chunks[-1].items() if isinstance(value, dict)}
        shown = (
            f"{way} {value['us']:.0f} us {value['tflop_per_s']:.0f} TFLOP/s" for way, value in found.items()
        )
        print(f"{name:34}", "; ".join(shown), flush=True)
    if args.chunks:
        return 0
    print("kv seq context         us", *(f"{name:>9}" for name in DECODE_COLUMNS), "of copy")
    rows: list[dict[str, Any]] = []
    for context_lens, num_kv_heads in decode_grid(args.quick):
        rows.append(decode_row(pool, context_lens, num_kv_heads, copy))
        print_decode(rows[-1])
        keep(decode=rows)
    keep(summary=summary_of(rows, attention_peers.NAMES))
    for name, value in result["summary"].items():
        print(f"{name:40} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
