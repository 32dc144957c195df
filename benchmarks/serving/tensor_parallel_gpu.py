"""Steps on one GPU and on two with the shape of Llama-3-8B, random bf16 weights: decode, prefill, and their ratio.

    python benchmarks/serving/tensor_parallel_gpu.py [--quick] [--degrees 1,2] [--json FILE]

Each rank is a process with its part of the weights and of KV, as in a worker; all run the same steps, and rank 0 measures, by
CUDA events, medians. What the host does to tell the other ranks of a step is measured by itself: packing a batch of 64
sequences, sending it to one process and having it unpacked there, which a worker overlaps with the step before.

- decode: steps of 64 sequences and of one, 2,048 tokens each, replayed as CUDA graphs with the collectives inside.
- prefill: one prompt of 2,048 tokens in one eager step.
- all_reduce: 64 x 4,096 and 2,048 x 4,096 numbers of bf16 alone; a step has two for each of 32 layers.

Needs as many NVIDIA GPUs as the largest degree; exits with 2 and the reason otherwise. Measures nothing where the tests of
ranks fail.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.serving.engine_gpu import BLOCK_SIZE, LLAMA_3_8B, batch_of  # noqa: E402
from workers.device.forward import DeviceForward  # noqa: E402
from workers.model.convert import output_shapes  # noqa: E402
from workers.model.forward_batch import ForwardBatch  # noqa: E402
from workers.model.llama import Llama  # noqa: E402
from workers.tensor_parallel.cutting import Rank, cut_shape, cuts, rank_config  # noqa: E402
from workers.tensor_parallel.messages import Step, pack, unpack  # noqa: E402
from workers.tensor_parallel.ranks import Ranks, join, open_store  # noqa: E402

TESTS = ("tests/gpu/test_nccl_ranks.py", "tests/gpu/test_tensor_parallel_gpu.py")
CONTEXT, PREFILL_TOKENS, BATCHES = 2048, 2048, (64, 1)
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank does. port: of the store; 0 for a degree of 1."""

    rank: Rank
    port: int
    num_rounds: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--degrees", default="1,2", help="with commas between them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    degrees = [int(one) for one in args.degrees.split(",")]
    found = torch.cuda.device_count()
    if found < max(degrees):
        print(f"needs {max(degrees)} NVIDIA GPUs and this host has {found}", file=sys.stderr)
        return 2
    if (problem := tests_problem(*TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    about = describe_gpu() | {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "is_quick": args.quick}
    rows = [measure(degree, 20 if args.quick else 60) for degree in degrees]
    for row in rows:
        print(row)
    host = tell_us(100 if args.quick else 1000)
    print(f"telling one rank of a step of 64 sequences: {host}")
    ratios = {
        f"{key} at {row['degree']}": round(rows[0][key] / row[key], 3)
        for row in rows[1:]
        for key in rows[0]
        if key.endswith("_ms")
    }
    print(f"times as fast as at {rows[0]['degree']}: {ratios}")
    if args.json:
        about |= {"rows": rows, "ratios": ratios, "tell_us": host}
        args.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0


def measure(degree: int, num_rounds: int) -> dict[str, Any]:
    """By so many processes, rank 0 among them."""
    store = open_store(degree) if degree > 1 else None
    context, (ours, theirs) = get_context("spawn"), Pipe()
    jobs = [Job(Rank(i, degree), store.port if store is not None else 0, num_rounds) for i in range(degree)]
    processes = [
        context.Process(target=run, args=(job, theirs if job.rank.index == 0 else None)) for job in jobs
    ]
    for process in processes:
        process.start()
    try:
        if not ours.poll(10 * TIMEOUT_S):
            raise TimeoutError(f"no answer from rank 0 of {degree}")
        row: dict[str, Any] = ours.recv()
    finally:
        for process in processes:
            process.join(TIMEOUT_S / 10)
            process.kill()
    return row


def run(job: Job, answer: "Connection | None") -> None:
    """One rank."""
    device = torch.device("cuda", job.rank.index)
    torch.cuda.set_device(device)
    ranks = join(job.rank, job.port, device, TIMEOUT_S) if job.port else None
    began_s = time.perf_counter()
    forward = forward_of(job.rank, ranks, device)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"degree": job.rank.degree, "start_s": round(time.perf_counter() - began_s, 2)}
    for num in BATCHES:
        batch = batch_of([(CONTEXT - 1, 1)] * num)
        row[f"decode_{num}_ms"] = 1e3 * seconds(lambda batch=batch: forward(batch), job.num_rounds, ranks)
    batch = batch_of([(0, PREFILL_TOKENS)])
    row["prefill_ms"] = 1e3 * seconds(lambda: forward(batch), job.num_rounds, ranks)
    if ranks is not None:
        add = ranks.summed(lambda rows: rows)
        for num in (64, PREFILL_TOKENS):
            values = torch.zeros(num, LLAMA_3_8B.hidden_size, dtype=torch.bfloat16, device=device)
            added = seconds(lambda values=values: add(values), job.num_rounds, ranks)
            row[f"all_reduce_{num}_us"] = 1e6 * added
    if answer is not None:
        answer.send(row)
    if ranks is not None:
        # Nobody leaves while another still waits for it.
        ranks.meet()
        torch.cuda.synchronize()


def forward_of(rank: Rank, ranks: Ranks | None, device: torch.device) -> DeviceForward:
    """This rank's part, with random weights, and decode steps captured."""
    shapes = output_shapes(LLAMA_3_8B)
    generator = torch.Generator(device).manual_seed(rank.index)
    weights = {}
    for name, one in cuts(shapes, LLAMA_3_8B, rank):
        shape = cut_shape(shapes[name], one)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        weights[name] = values.normal_(
            1.0 if len(shape) == 1 else 0.0, shape[-1] ** -0.5, generator=generator
        )
    model = Llama(rank_config(LLAMA_3_8B, rank), weights, ranks=ranks)
    num_blocks = max(BATCHES) * CONTEXT // BLOCK_SIZE + 1
    kv_cache = torch.empty(model.kv_cache_shape(num_blocks, BLOCK_SIZE), dtype=torch.bfloat16, device=device)
    for layer in kv_cache:
        layer.normal_(generator=generator)
    forward = DeviceForward(
        model, kv_cache, max_context_tokens=LLAMA_3_8B.max_context_tokens, buckets=sorted(BATCHES)
    )
    forward.capture(lambda _what, _done: None)
    return forward


def seconds(step: Callable[[], object], num_rounds: int, ranks: Ranks | None) -> float:
    """Median of a step, of groups of five that follow each other as they do in serving. All ranks begin together."""
    for _ in range(3):
        step()
    found = []
    for _ in range(num_rounds // 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ranks is not None:
            ranks.meet()
        torch.cuda.synchronize()
        step()
        begin.record()
        for _ in range(5):
            step()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 5e3)
    return statistics.median(found)


def tell_us(num_rounds: int) -> dict[str, float]:
    """Microseconds of the host for a step of 64 sequences."""
    batch: ForwardBatch = batch_of([(CONTEXT - 1, 1)] * max(BATCHES))
    packed = pack(batch)
    ours, theirs = Pipe()
    found: dict[str, list[float]] = {"pack": [], "send_and_receive": [], "unpack": []}
    for _ in range(num_rounds):
        times = [time.perf_counter()]
        packed = pack(batch)
        times.append(time.perf_counter())
        ours.send(Step(packed, is_shared=True))
        step = theirs.recv()
        times.append(time.perf_counter())
        unpack(step.batch)
        times.append(time.perf_counter())
        for name, before, after in zip(found, times, times[1:], strict=False):
            found[name].append(1e6 * (after - before))
    return {"bytes": len(packed), **{name: round(statistics.median(all_), 1) for name, all_ in found.items()}}


if __name__ == "__main__":
    sys.exit(main())
