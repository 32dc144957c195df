"""The engine on one GPU with the shape of Llama-3-8B and random weights: prefill, decode steps, and a full house.

    python benchmarks/serving/engine_gpu.py [--weights fp8] [--kv fp8|int4] [--quick] [--profile] [--json FILE]

- copy: 2 GiB within the device; bytes read and written are both counted. What a decode step could do at best follows from it:
  it reads all weights but the embedding table, and the KV of all sequences.
  With fp8 the bytes are those of fp8.
- prefill: one prompt of 2,048 tokens in one eager step, medians of CUDA events. FLOPs are those of the matrices and of attention
  to the tokens before.
- decode: steps of 64 sequences and of one, with 2,048 tokens each, replayed as CUDA graphs; from the call with the batch
  on the host until logits are there, steps one after the other.
- serving: the real engine, runner and loop, closed loop of 256 requests, prompts of 930 tokens and answers of 275 on average
  (spread as in the Azure conversation trace: lognormal, sigma 1 and 0.6, cut at 4,096 and 1,024), greedy, prefix cache off, token
  budget 2,048. Output tokens per second after the first 10 seconds. Also without overlapped steps.

Needs an NVIDIA GPU with 40 GB, and measures nothing where the engine's tests fail on it. --profile prints where the time of a prefill and of a decode step goes, and that of
the host while it serves.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.serving.gpu_clients import BOTH, Clients  # noqa: E402
from kvtransfer.pool_tensor import torch_dtype  # noqa: E402
from phasewise_kernels.block_copy.reference import convert  # noqa: E402
from workers.api import EngineConfig, KvDtype, WeightDtype  # noqa: E402
from workers.device.buckets import decode_buckets, mixed_buckets  # noqa: E402
from workers.device.dtypes import kv_dtype  # noqa: E402
from workers.device.forward import DeviceForward  # noqa: E402
from workers.device.gpu import placed  # noqa: E402
from workers.device.sampler import DeviceSampler  # noqa: E402
from workers.engine.engine import Engine  # noqa: E402
from workers.engine.runner import ModelRunner  # noqa: E402
from workers.engine.step_loop import StepLoop  # noqa: E402
from workers.model.config import ModelConfig, RopeConfig  # noqa: E402
from workers.model.convert import output_shapes  # noqa: E402
from workers.model.forward_batch import ForwardBatch  # noqa: E402
from workers.model.llama import Llama  # noqa: E402

LLAMA_3_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=500_000.0),
    rms_norm_eps=1e-5,
    max_context_tokens=8192,
    vocab_size=128_256,
    tie_embeddings=False,
    eos_token_ids=(128_001,),
    bos_token="",
    eos_token="",
)
BLOCK_SIZE = 16
#: New tokens of a prompt, those before them, and so many decodes of a context.
MIXED = ((512, 0, 63, 1024), (512, 2048, 63, 2048), (1536, 0, 63, 1024), (256, 7680, 15, 4096))
PREFILL_TOKENS = 2048
DECODES = ((64, 2048), (1, 2048))
NUM_CLIENTS = 256
TOKEN_BUDGET = 2048
WARM_UP_S = 10.0
TESTS, FP8_TESTS = ("tests/gpu/test_cuda_engine.py",), ("tests/gpu/test_fp8.py",)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and 15 s of serving")
    add_dtypes(parser)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    has_fewer_bits = args.weights == WeightDtype.FP8 or args.kv != KvDtype.AUTO
    if (problem := tests_problem(*TESTS, *(FP8_TESTS if has_fewer_bits else ()))) is not None:
        print(problem, file=sys.stderr)
        return 1
    about = describe_gpu()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    bench = Bench(20 if args.quick else 60, WeightDtype(args.weights), KvDtype(args.kv))
    rows: dict[str, Any] = {
        **about,
        "is_quick": args.quick,
        "weights": args.weights,
        "kv": args.kv,
        "copy_tb_s": bench.copy_tb_s,
        "start": bench.start_s,
    }
    print(f"copy {bench.copy_tb_s:.3f} TB/s; {bench.start_s}")
    rows["prefill"] = bench.prefill()
    print(rows["prefill"])
    rows["decode"] = [bench.decode(num, context) for num, context in DECODES]
    for row in rows["decode"]:
        print(row)
    rows["mixed"] = [bench.mixed(*one) for one in MIXED]
    for row in rows["mixed"]:
        print(row)
    if args.profile:
        bench.profile()
    rows["serving"] = []
    duration_s = 12.0 if args.quick else 40.0
    # What is compiled or allocated at a first use is no part of either.
    bench.serve(0.1, is_overlapping=True)
    for is_overlapping in (True, False):
        is_profiled = args.profile and not is_overlapping
        row = asdict(bench.serve(duration_s, is_overlapping=is_overlapping, is_profiled=is_profiled))
        rows["serving"].append(row)
        print(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    """--weights and --kv."""
    parser.add_argument(
        "--weights", choices=(WeightDtype.BFLOAT16, WeightDtype.FP8), default=WeightDtype.BFLOAT16
    )
    parser.add_argument("--kv", choices=list(KvDtype), default=KvDtype.AUTO, help="auto is bfloat16")


@dataclass(frozen=True, slots=True)
class Served:
    """A closed loop."""

    is_overlapping: bool
    seconds: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    steps_per_s: float
    step_ms_mean: float
    host_ms_mean: float
    num_running_mean: float
    num_preemptions: int


class Bench:
    """A model on the GPU, and what is measured with it."""

    def __init__(self, num_rounds: int, weights: WeightDtype, kv: KvDtype) -> None:
        self._num_rounds = num_rounds
        began_s = time.perf_counter()
        self.copy_tb_s = copy_tb_s()
        torch.cuda.empty_cache()
        self._weights = random_weights(LLAMA_3_8B, weights)
        self._model = Llama(LLAMA_3_8B, self._weights)
        weights_s = time.perf_counter() - began_s
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        kept_in = kv_torch_dtype(weights, kv)
        block_bytes = kv_block_bytes(self._model, BLOCK_SIZE, kept_in)
        self._kv_token_bytes = block_bytes // BLOCK_SIZE
        self._num_blocks = (free_bytes - int(0.1 * total_bytes) - 3 * 2**30) // block_bytes
        shape = self._model.kv_cache_shape(self._num_blocks, BLOCK_SIZE, kept_in)
        self._kv_cache = torch.empty(shape, dtype=kept_in, device="cuda")
        # A few blocks of random numbers again and again: what they are makes no difference, but for NaN.
        some = torch.randn(
            1, 2, min(4096, shape[2]), *self._model.kv_cache_shape(1, BLOCK_SIZE)[3:], device="cuda"
        )
        some = convert(some, kept_in)[0]
        for layer in self._kv_cache:
            for first in range(0, shape[2], some.shape[1]):
                part = layer[:, first : first + some.shape[1]]
                part.copy_(some[:, : part.shape[1]])
        del some
        torch.cuda.empty_cache()
        began_s = time.perf_counter()
        self._forward = DeviceForward(
            self._model,
            self._kv_cache,
            max_context_tokens=LLAMA_3_8B.max_context_tokens,
            buckets=decode_buckets(NUM_CLIENTS),
            mixed_buckets=mixed_buckets(TOKEN_BUDGET),
        )
        self._forward.warm_up(NUM_CLIENTS, lambda _what, _done: None)
        torch.cuda.synchronize()
        warm_up_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        self._forward.capture(lambda _what, _done: None)
        torch.cuda.synchronize()
        free_after = torch.cuda.mem_get_info()[0]
        self.start_s = {
            "weights_s": round(weights_s, 2),
            "warm_up_s": round(warm_up_s, 2),
            "capture_s": round(time.perf_counter() - began_s, 2),
            "kv_blocks": self._num_blocks,
            "free_gib_at_last": round(free_after / 2**30, 2),
        }

    def prefill(self) -> dict[str, float]:
        """One prompt in one step."""
        seconds = self._seconds(lambda: self._forward(batch_of([(0, PREFILL_TOKENS)])))
        config = LLAMA_3_8B
        attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * PREFILL_TOKENS**2 / 2
        flops = 2 * self._layer_values() * PREFILL_TOKENS + attention
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        self._forward(batch_of([(0, PREFILL_TOKENS)]))
        launch_s = time.perf_counter() - began_s
        return {
            "tokens": PREFILL_TOKENS,
            "ms": seconds * 1e3,
            "tflops": flops / seconds / 1e12,
            "launch_ms": launch_s * 1e3,
        }

    def decode(self, num_sequences: int, context: int) -> dict[str, float]:
        """One step; its floor is reading weights and KV at the rate of the copy."""
        batch = batch_of([(context - 1, 1)] * num_sequences)
        seconds = self._seconds(lambda: self._forward(batch))
        read = sum(one.nbytes for name, one in self._weights.items() if name != "embedding")
        num_bytes = read + num_sequences * context * self._kv_token_bytes
        floor_s = num_bytes / (self.copy_tb_s * 1e12)
        return {
            "sequences": num_sequences,
            "context": context,
            "ms": seconds * 1e3,
            "floor_ms": floor_s * 1e3,
            "ratio": seconds / floor_s,
        }

    def mixed(self, num_new: int, num_before: int, num_decodes: int, context: int) -> dict[str, float]:
        """One step of a part of a prompt and of decodes; apart: of the two as steps of their own, one after the other."""
        prompt, decodes = [(num_before, num_new)], [(context - 1, 1)] * num_decodes
        both, *parts = (batch_of(sequences) for sequences in (prompt + decodes, prompt, decodes))
        return {
            "new_tokens": num_new,
            "tokens_before": num_before,
            "decodes": num_decodes,
            "context": context,
            "ms": self._seconds(lambda: self._forward(both)) * 1e3,
            "apart_ms": sum(self._seconds(lambda part=part: self._forward(part)) for part in parts) * 1e3,
        }

    def profile(self) -> None:
        """Tables of kernels."""
        steps = {
            "prefill": lambda: self._forward(batch_of([(0, PREFILL_TOKENS)])),
            "decode 64": lambda: self._forward(batch_of([(2047, 1)] * 64)),
            "decode 1": lambda: self._forward(batch_of([(2047, 1)])),
        }
        for name, step in steps.items():
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(3):
                    step()
                torch.cuda.synchronize()
            print(name)
            table = profile.key_averages().table(
                sort_by="cuda_time_total", row_limit=12, max_name_column_width=60
            )
            print("\n".join(line for line in table.splitlines() if line.strip("- ")))

    def serve(self, duration_s: float, *, is_overlapping: bool, is_profiled: bool = False) -> Served:
        """NUM_CLIENTS requests at a time, each followed by another."""
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            token_budget=TOKEN_BUDGET,
            max_running_sequences=NUM_CLIENTS,
            max_waiting_requests=2 * NUM_CLIENTS,
            is_prefix_cache_on=False,
        )
        sampler = DeviceSampler(torch.device("cuda"))
        runner = ModelRunner(self._model, self._kv_cache, BLOCK_SIZE, forward=self._forward, sampler=sampler)
        engine = Engine(
            config,
            BOTH,
            num_blocks=self._num_blocks,
            max_context_tokens=LLAMA_3_8B.max_context_tokens,
            claim_s=5.0,
            attention_tokens=LLAMA_3_8B.attention_tokens,
        )
        clients = Clients(engine)
        loop = StepLoop(engine, runner, clients.take, print, overlapping=runner if is_overlapping else None)
        for _ in range(NUM_CLIENTS):
            clients.submit()
        clients.run(loop, WARM_UP_S)
        if is_profiled:
            profile = cProfile.Profile()
            profile.runcall(clients.run, loop, WARM_UP_S / 2)
            pstats.Stats(profile).sort_stats("tottime").print_stats(28)
        clients.reset()
        num_before, began_s = loop.num_steps, time.perf_counter()
        waited_s = clients.run(loop, duration_s)
        seconds = time.perf_counter() - began_s
        num_steps = loop.num_steps - num_before
        return Served(
            is_overlapping,
            round(seconds, 2),
            clients.num_output / seconds,
            clients.num_prompt / seconds,
            clients.num_finished / seconds,
            num_steps / seconds,
            1e3 * seconds / num_steps,
            1e3 * (seconds - waited_s) / num_steps,
            clients.num_running / max(1, clients.num_looks),
            engine.num_preemptions,
        )

    def _layer_values(self) -> int:
        return sum(prod(s) for name, s in output_shapes(LLAMA_3_8B).items() if name.startswith("layers."))

    def _seconds(self, step: Callable[[], object]) -> float:
        """Median of a step, of groups of five that follow each other as they do in serving."""
        for _ in range(3):
            step()
        found = []
        for _ in range(self._num_rounds // 5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            step()
            begin.record()
            for _ in range(5):
                step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 5e3)
        return statistics.median(found)


def random_weights(config: ModelConfig, dtype: WeightDtype = WeightDtype.BFLOAT16) -> dict[str, torch.Tensor]:
    """Made on the GPU, in bfloat16 or of that in fp8."""
    generator, device = torch.Generator("cuda").manual_seed(0), torch.device("cuda")
    weights: dict[str, torch.Tensor] = {}
    for name, shape in output_shapes(config).items():
        values = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        values.normal_(generator=generator)
        values = values.mul_(0.1).add_(1) if name.endswith("norm") else values.mul_(shape[-1] ** -0.5)
        weights |= placed(name, values, device, dtype)
    return weights


def kv_torch_dtype(weights: WeightDtype, kv: KvDtype) -> torch.dtype:
    """What a worker with these settings keeps KV in."""
    return torch_dtype(kv_dtype(EngineConfig(weight_dtype=weights, kv_dtype=kv)))


def kv_block_bytes(model: Llama, block_size: int, kept_in: torch.dtype) -> int:
    """Of all layers."""
    return prod(model.kv_cache_shape(1, block_size, kept_in)) * kept_in.itemsize


def batch_of(sequences: list[tuple[int, int]]) -> ForwardBatch:
    """(tokens before, new tokens) of each, in blocks of its own."""
    lens = np.array([new for _, new in sequences])
    contexts = np.array([before + new for before, new in sequences])
    num_blocks = -(-int(contexts.max()) // BLOCK_SIZE)
    tables = np.arange(len(sequences) * num_blocks, dtype=np.int32)
    np.random.default_rng(0).shuffle(tables)
    tables = tables.reshape(len(sequences), num_blocks)
    places = np.concatenate([np.arange(before, before + new) for before, new in sequences])
    owners = np.repeat(np.arange(len(sequences)), lens)
    slots = tables[owners, places // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + places % BLOCK_SIZE
    tokens = np.random.default_rng(1).integers(0, LLAMA_3_8B.vocab_size, len(places))
    return ForwardBatch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(places),
        slots=torch.from_numpy(slots),
        block_tables=tables,
        query_lens=lens,
        context_lens=contexts,
        logit_rows=torch.from_numpy(np.cumsum(lens) - 1),
    )


def copy_tb_s() -> float:
    """Of 2 GiB within the device, read and written."""
    source = torch.empty(2**30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    found = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        found.append(2 * source.nbytes / begin.elapsed_time(end) / 1e9)
    return statistics.median(found[2:])


if __name__ == "__main__":
    sys.exit(main())
