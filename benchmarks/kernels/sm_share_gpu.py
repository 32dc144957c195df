"""Sharing the SMs of one GPU: what layouts cost, how fast one switches, what a part of the SMs reaches, and what MPS takes instead.

    python benchmarks/kernels/sm_share_gpu.py [--quick] [--json FILE]

Runs tests/gpu/test_sm_share.py first and measures nothing when it fails. Needs an NVIDIA GPU, torch for CUDA, cuda-bindings, Triton, numpy and
pytest; the part on MPS also nvidia-cuda-mps-control, and says so where it is not there.

Rates are by CUDA events on random values. The curves are in the form of `workers.step_shape.DeviceShape`: (share of the SMs, share of the rate
on all of them). Of two streams only the window counts in which both are busy. A switch by MPS is timed from the decision until the end of the
first step of the new process over the shared weights, both phases computing all the while.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.kernels.mps_share_gpu import measure_mps  # noqa: E402
from workers.api import Phase  # noqa: E402
from workers.device.capability import capability_of, report  # noqa: E402
from workers.device.device_facts import device_facts  # noqa: E402
from workers.device.green_contexts import GreenContext, GreenContexts  # noqa: E402
from workers.device.sm_layouts import SmPart, layout_table  # noqa: E402
from workers.device.sm_share import LiveLayout, SmShares, open_sm_shares  # noqa: E402

PHASES = (Phase.PREFILL, Phase.DECODE)
TESTS = "tests/gpu/test_sm_share.py"
#: A layer's largest product of Llama-3-8B for a chunk of a prompt.
ROWS, INNER, OUTER = 2048, 4096, 14336
SQUARE = 8192
#: Far above the L2 cache of 50 MB.
NUM_VALUES = 1 << 28
MIB = 2**20


class Load:
    """Products and copies, each on a stream of its own."""

    def __init__(self) -> None:
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.left, self.right = torch.randn((ROWS, INNER), **make), torch.randn((INNER, OUTER), **make)
        self.out = torch.empty((ROWS, OUTER), **make)
        self.big_left, self.big_right = (
            torch.randn((SQUARE, SQUARE), **make),
            torch.randn((SQUARE, SQUARE), **make),
        )
        self.big_out = torch.empty_like(self.big_left)
        self.source = torch.randn(NUM_VALUES, **make)
        self.target = torch.empty_like(self.source)
        torch.cuda.synchronize()

    def product(self) -> None:
        """2 * ROWS * INNER * OUTER operations."""
        torch.mm(self.left, self.right, out=self.out)

    def big_product(self) -> None:
        """2 * SQUARE ** 3 operations."""
        torch.mm(self.big_left, self.big_right, out=self.big_out)

    def copy(self) -> None:
        """By a kernel: the copy engine has no part in it. 4 * NUM_VALUES bytes, read and written."""
        torch.neg(self.source, out=self.target)

    def read(self) -> None:
        """2 * NUM_VALUES bytes, which is what decode attention does."""
        torch.amax(self.source.view(-1, 4096), dim=1)


def seconds_of(work: Callable[[], None], stream: torch.cuda.Stream, num: int) -> float:
    """Of one, the median of `num`, back to back."""
    with torch.cuda.stream(stream):
        work()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(num + 1)]
        marks[0].record(stream)
        for mark in marks[1:]:
            work()
            mark.record(stream)
    stream.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


def curve(contexts: GreenContexts, load: Load, num: int) -> dict[str, Any]:
    """Rates by number of SMs, and the curves of the latency model."""
    rows = []
    whole = torch.cuda.Stream()
    groups = contexts.groups
    sizes = range(1, groups.num_groups + 1)
    for count in [*sizes, None]:
        context: GreenContext | None = None
        if count is not None:
            context = contexts.make(SmPart(Phase.DECODE, 0, count, False, count * groups.group_sms))
        stream = whole if context is None else context.stream
        product_s, copy_s, read_s = (
            seconds_of(work, stream, num) for work in (load.big_product, load.copy, load.read)
        )
        rows.append(
            {
                "num_sms": groups.num_sms if context is None else context.num_sms,
                "gemm_tflops": 2 * SQUARE**3 / product_s / 1e12,
                "copy_tb_per_s": 4 * NUM_VALUES / copy_s / 1e12,
                "read_tb_per_s": 2 * NUM_VALUES / read_s / 1e12,
            }
        )
        if context is not None:
            contexts.destroy(context)
    best = rows[-1]

    def curve_of(name: str) -> list[tuple[float, float]]:
        return [
            (round(row["num_sms"] / best["num_sms"], 4), round(row[name] / best[name], 4))
            for row in rows[:-1]
        ]

    return {
        "rows": rows,
        "compute_curve": curve_of("gemm_tflops"),
        "memory_curve": curve_of("read_tb_per_s"),
        "copy_curve": curve_of("copy_tb_per_s"),
    }


def both_at_once(
    live: LiveLayout, load: Load, memory_work: Callable[[], None], duration_s: float
) -> dict[str, float]:
    """Seconds of one product and of one `memory_work` while the other stream is busy too; 0 where none lies in the window."""
    work = {Phase.PREFILL: load.product, Phase.DECODE: memory_work}
    alone = {phase: seconds_of(work[phase], live.streams[phase], 20) for phase in PHASES}
    marks: dict[Phase, list[torch.cuda.Event]] = {}
    base = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    base.record(torch.cuda.current_stream())
    for phase in PHASES:
        live.streams[phase].wait_event(base)
    left = {phase: max(12, min(900, round(duration_s / alone[phase]))) for phase in PHASES}
    for phase in PHASES:
        marks[phase] = []
        with torch.cuda.stream(live.streams[phase]):
            for _ in range(left[phase]):
                mark = torch.cuda.Event(enable_timing=True)
                mark.record()
                marks[phase].append(mark)
                work[phase]()
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            marks[phase].append(end)
    torch.cuda.synchronize()
    times = {phase: [base.elapsed_time(mark) / 1e3 for mark in marks[phase]] for phase in PHASES}
    begin_s = max(times[phase][0] for phase in PHASES)
    end_s = min(times[phase][-1] for phase in PHASES)
    found = {}
    for phase in PHASES:
        spans = [
            b - a for a, b in zip(times[phase], times[phase][1:], strict=False) if a >= begin_s and b <= end_s
        ]
        name = "gemm" if phase is Phase.PREFILL else "memory"
        found |= {
            f"{name}_alone_s": alone[phase],
            f"{name}_together_s": statistics.fmean(spans) if spans else 0.0,
            f"{name}_in_window": len(spans),
        }
    return found


def contention(shares: SmShares, load: Load, duration_s: float) -> list[dict[str, Any]]:
    """By layout, for a copy and for a read beside products: how many times longer each takes than alone on the same SMs."""
    rows = []
    for live in shares.layouts:
        for name, work in (("copy", load.copy), ("read", load.read)):
            found = both_at_once(live, load, work, duration_s)
            rows.append(
                {
                    "layout": str(live.layout),
                    "is_shared": live.layout.is_shared,
                    "decode_sms": live.layout.sm_count(Phase.DECODE),
                    "beside": name,
                    "compute": found["gemm_together_s"] / found["gemm_alone_s"],
                    "memory": found["memory_together_s"] / found["memory_alone_s"],
                    **found,
                }
            )
    return rows


def switching(shares: SmShares, num: int) -> dict[str, Any]:
    """Microseconds until the first kernel in another layout has ended, beside staying; of a kernel and of a graph kept by each layout."""
    values = torch.zeros(1 << 10, device="cuda")
    for live in shares.layouts:
        stream = live.streams[Phase.DECODE]
        with torch.cuda.stream(stream):
            values.add_(1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            values.add_(1)
        live.kept["graph"] = graph
    times: dict[str, list[float]] = {
        "kernel stay": [],
        "kernel switch": [],
        "graph stay": [],
        "graph switch": [],
        "call": [],
    }
    layouts = shares.layouts
    for number in range(num):
        for kind in ("kernel", "graph"):
            for how in ("stay", "switch"):
                to = (
                    shares.current(Phase.DECODE)
                    if how == "stay"
                    else layouts[(2 * number + (kind == "graph")) % len(layouts)]
                )
                if how == "switch" and to is shares.current(Phase.DECODE):
                    continue
                torch.cuda.synchronize()
                began_s = time.perf_counter()
                stream = shares.switch(Phase.DECODE, to)
                called_s = time.perf_counter()
                with torch.cuda.stream(stream):
                    if kind == "kernel":
                        values.add_(1)
                    else:
                        to.kept["graph"].replay()
                stream.synchronize()
                times[f"{kind} {how}"].append((time.perf_counter() - began_s) * 1e6)
                if how == "switch":
                    times["call"].append((called_s - began_s) * 1e6)
    return {name: _spread(found) for name, found in times.items()}


def creation() -> dict[str, Any]:
    """Milliseconds and MiB of each layout: contexts alone, and with the library's workspaces after its first products."""
    rows = []
    contexts = GreenContexts(0)
    load = torch.randn((1024, 1024), device="cuda", dtype=torch.bfloat16)
    for phases, step in ((PHASES, 1), (tuple(Phase), 4)):
        for layout in layout_table(contexts.groups, phases, step_groups=step):
            before = _free()
            began_s = time.perf_counter()
            made = [contexts.make(part) for part in layout.parts]
            made_s = time.perf_counter() - began_s
            alone = before - _free()
            for context in made:
                with torch.cuda.stream(context.stream):
                    load @ load
            after_use = before - _free()
            rows.append(
                {
                    "layout": str(layout),
                    "ms": made_s * 1e3,
                    "mib": alone / MIB,
                    "mib_after_a_product": after_use / MIB,
                }
            )
            torch._C._cuda_clearCublasWorkspaces()
            for context in made:
                contexts.destroy(context)
            torch.cuda.empty_cache()
    began_s = time.perf_counter()
    before = _free()
    shares = open_sm_shares(0, PHASES)
    opened_s = time.perf_counter() - began_s
    found = {
        "rows": rows,
        "open_sm_shares": {
            "num_layouts": len(shares.layouts),
            "dropped": [[str(layout), why] for layout, why in shares.dropped],
            "seconds": opened_s,
            "mib": (before - _free()) / MIB,
        },
    }
    shares.close()
    return found


def _free() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "p95": statistics.quantiles(values, n=20)[-1],
        "num": len(values),
    }


def describe() -> dict[str, Any]:
    """Of every row."""
    facts = device_facts()
    assert facts is not None
    return describe_gpu() | {
        "num_sms": facts.num_sms,
        "cuda_bindings": facts.bindings,
        "capability": report(facts),
    }


def guarded(name: str, part: Callable[[], Any]) -> Any:
    """What a part measured; what stopped it does not take the others along."""
    began_s = time.perf_counter()
    try:
        found = part()
    except Exception as error:  # noqa: BLE001 - the other parts stand
        found = {"not_measured": repr(error)}
    print(f"-- {name}: {time.perf_counter() - began_s:.1f} s", flush=True)
    return found


def print_results(results: Mapping[str, Any]) -> None:
    """As tables."""
    for row in results["curve"].get("rows", ()):
        print(
            f"{row['num_sms']:>4} SMs{row['gemm_tflops']:>8.0f} TFLOP/s{row['copy_tb_per_s']:>7.2f} TB/s copied"
            f"{row['read_tb_per_s']:>7.2f} TB/s read"
        )
    print("\nproducts beside memory, times longer than alone" + f"{'compute':>10}{'memory':>8}")
    for row in results["contention"] if isinstance(results["contention"], list) else ():
        print(f"{row['layout']:>45} {row['beside']:<5}{row['compute']:>7.2f}{row['memory']:>8.2f}")
    for name, row in results["switching"].items():
        print(f"{name:>16}: {row}")
    for row in results["creation"].get("rows", ()):
        print(
            f"{row['layout']:>50}{row['ms']:>7.2f} ms{row['mib']:>7.1f} MiB{row['mib_after_a_product']:>7.1f} after a product"
        )
    print({name: row for name, row in results["creation"].items() if name != "rows"})
    print(json.dumps(results["mps"], indent=1))


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    refusal = capability_of(device_facts()).green_contexts
    if refusal is not None:
        print(f"green contexts: {refusal}", file=sys.stderr)
        return 1
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    results = {**describe(), "is_quick": args.quick}
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        # First: this process has nothing on the GPU yet.
        results["mps"] = guarded("MPS", lambda: measure_mps(Path(folder), 2 if args.quick else 5))
    load = Load()
    results["curve"] = guarded("curve", lambda: curve(GreenContexts(0), load, 5 if args.quick else 20))
    shares = open_sm_shares(0, PHASES)
    results["contention"] = guarded(
        "contention", lambda: contention(shares, load, 0.1 if args.quick else 0.4)
    )
    results["switching"] = guarded("switching", lambda: switching(shares, 100 if args.quick else 1000))
    shares.close()
    results["creation"] = guarded("creation", creation)
    print_results(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
