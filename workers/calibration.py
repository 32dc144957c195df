"""Steps of many shapes on this machine, and the latency model that fits them: `python -m workers.calibration --model M`

Writes lines of JSON: {"doing": ...} while it loads and measures, then {"calibration": ...}, or {"failed": ...}. A process of its
own, with the environment of a worker: `phasewise calibrate` starts it. What is not in a step here and is in a worker's is the
engine's own work between steps, which is less than a millisecond.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from workers.api import (
    Device,
    EngineConfig,
    KvDtype,
    Phase,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    WeightDtype,
    WorkerId,
    WorkerSpec,
)
from workers.engine.sequence import Sequence as TokenSequence
from workers.engine.step_plan import Slice, StepPlan
from workers.engine.step_records import shape_of
from workers.errors import PhasewiseWorkerError
from workers.latency_model import LatencyModel
from workers.launch_environment import missing_variables
from workers.step_shape import FactorSource, StepCosts, StepShape

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
#: Of a GPU: its pool is what is left of its share, and what is captured and prepared goes up to the grid's largest steps.
GPU_TOKEN_BUDGET, GPU_MAX_SEQUENCES = 8192, 256
#: The grid is gone through so often, or until so many seconds have passed, but at least twice: the first round warms up.
MAX_ROUNDS, MAX_S = 6, 100.0


@dataclass(frozen=True, slots=True)
class GridStep:
    """Decodes of as many sequences, each of as many tokens, and a chunk of one prompt after `num_before` of its tokens."""

    num_decodes: int = 0
    context_tokens: int = 0
    chunk_tokens: int = 0
    num_before: int = 0

    def __str__(self) -> str:
        decodes = f"{self.num_decodes} decodes of {self.context_tokens:,}" if self.num_decodes else ""
        after = f" after {self.num_before:,}" if self.num_before else ""
        chunk = f"chunk of {self.chunk_tokens}{after}" if self.chunk_tokens else ""
        return ", ".join(filter(None, (decodes, chunk)))

    @property
    def sequence_tokens(self) -> list[int]:
        """Of each sequence, those known with this step."""
        chunk = [self.num_before + self.chunk_tokens] if self.chunk_tokens else []
        return [self.context_tokens] * self.num_decodes + chunk


GRID = (
    *(GridStep(num, 128) for num in (1, 2, 4, 8, 16, 32)),
    *(GridStep(num, 1024) for num in (1, 4, 8)),
    GridStep(2, 4096),
    *(GridStep(chunk_tokens=num) for num in (16, 64, 128, 256, 512)),
    GridStep(chunk_tokens=128, num_before=512),
    GridStep(chunk_tokens=128, num_before=1536),
    GridStep(chunk_tokens=256, num_before=1024),
    GridStep(4, 512, chunk_tokens=64),
    GridStep(8, 512, chunk_tokens=248),
    GridStep(16, 128, chunk_tokens=128, num_before=512),
)
#: Steps of a GPU are shorter than those of a CPU, and a worker's are larger there.
GPU_GRID = (
    *(GridStep(num, 128) for num in (1, 8, 32, 128, 256)),
    *(GridStep(num, 1024) for num in (1, 8, 32, 64, 128, 256)),
    *(GridStep(num, 4096) for num in (1, 16, 48)),
    *(GridStep(chunk_tokens=num) for num in (64, 256, 512, 1024, 2048, 4096, 8192)),
    GridStep(chunk_tokens=512, num_before=1536),
    GridStep(chunk_tokens=1024, num_before=3072),
    GridStep(chunk_tokens=2048, num_before=6144),
    GridStep(16, 1024, chunk_tokens=256),
    GridStep(64, 1024, chunk_tokens=512),
    GridStep(64, 1024, chunk_tokens=1984),
    GridStep(128, 512, chunk_tokens=1024, num_before=1024),
)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """name: of the grid's step. measured_s: median. predicted_s: by the fitted model."""

    name: str
    shape: StepShape
    measured_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out. model_digest: see ModelInfo. The error of `costs` is that of single steps of the grid."""

    model_digest: str
    costs: StepCosts
    steps: tuple[MeasuredStep, ...]


def plan_of(step: GridStep, block_size: int) -> StepPlan:
    """Each sequence in blocks of its own, whatever KV they hold."""
    sequences = [_sequence(number, num) for number, num in enumerate(step.sequence_tokens)]
    num_blocks = [-(-len(one.token_ids) // block_size) for one in sequences]
    tables = np.zeros((len(sequences), max(num_blocks)), np.int32)
    first = 0
    for one, num in zip(sequences, num_blocks, strict=True):
        tables[one.row, :num] = np.arange(first, first + num)
        first += num
    chunks: tuple[Slice, ...] = ()
    if step.chunk_tokens:
        prompt = sequences.pop()
        chunks = (Slice(prompt, step.num_before, len(prompt.token_ids)),)
    return StepPlan(sequences, chunks, tables)


def _sequence(number: int, num_tokens: int) -> TokenSequence:
    # Token 1 again and again: which tokens they are makes no difference to how long they take.
    submit = Submit(
        RequestKey(RequestId(str(number)), 1), BOTH, (1,) * num_tokens, SamplingParams(1), timeout_s=1e9
    )
    sequence = TokenSequence.from_submit(submit, 0.0, root=b"", number=number)
    sequence.row = number
    return sequence


def grid_for(
    num_blocks: int, block_size: int, max_context_tokens: int, *, steps: Sequence[GridStep] = GRID
) -> list[GridStep]:
    """Those of these steps whose sequences fit the pool and the model."""
    return [
        step
        for step in steps
        if max(step.sequence_tokens) <= max_context_tokens
        and sum(-(-num // block_size) for num in step.sequence_tokens) <= num_blocks
    ]


def fit(
    latency: LatencyModel,
    grid: Sequence[GridStep],
    shapes: Sequence[StepShape],
    rounds_s: Sequence[Sequence[float]],
) -> tuple[StepCosts, tuple[MeasuredStep, ...]]:
    """latency: has seen nothing. rounds_s: of each round, what each step of the grid took."""
    for times_s in rounds_s:
        for shape, measured_s in zip(shapes, times_s, strict=True):
            latency.observe(shape, measured_s)
    predicted_s = [latency.step_s(shape) for shape in shapes]
    ratios = sorted(m / p for times_s in rounds_s for m, p in zip(times_s, predicted_s, strict=True))
    costs = latency.costs()
    steps = tuple(
        MeasuredStep(str(step), shape, statistics.median(times_s[i] for times_s in rounds_s), predicted_s[i])
        for i, (step, shape) in enumerate(zip(grid, shapes, strict=True))
    )
    return (
        StepCosts(
            costs.model,
            costs.device,
            costs.factors,
            costs.num_steps,
            mean_error=statistics.mean(abs(1 / ratio - 1) for ratio in ratios),
            upper_ratio=max(1.0, ratios[len(ratios) * 9 // 10]),
            # However few steps a slow model had time for.
            source=FactorSource.FITTED,
            num_prompt_steps=costs.num_prompt_steps,
        ),
        steps,
    )


def calibrate(
    spec: WorkerSpec, tell: Callable[[str], None], *, clock: Callable[[], float] = time.perf_counter
) -> Calibration:
    """Load the model and measure it; blocks for a minute or two. Raises what `loading.load` raises."""
    from workers.loading import load  # brings torch, which a wrong command line does not need

    loaded = load(spec, lambda what, fraction: tell(f"{what} {fraction:.0%}"))
    text = loaded.text
    assert text is not None
    steps = GPU_GRID if spec.device is Device.CUDA else GRID
    grid = grid_for(text.num_blocks, spec.engine.block_size, text.config.max_context_tokens, steps=steps)
    plans = [plan_of(step, spec.engine.block_size) for step in grid]
    shapes = [shape_of(plan) for plan in plans]
    rounds_s: list[list[float]] = []
    began_s = clock()
    try:
        while len(rounds_s) < 2 or (len(rounds_s) < MAX_ROUNDS and clock() - began_s < MAX_S):
            rounds_s.append([])
            for number, plan in enumerate(plans):
                tell(f"measuring steps, round {len(rounds_s)}: {number / len(plans):.0%}")
                step_began_s = clock()
                text.runner.run(plan, lambda _lo, _hi: None)
                rounds_s[-1].append(clock() - step_began_s)
    finally:
        text.runner.close()
        text.compiler.close()
    costs, measured = fit(text.latency, grid, shapes, rounds_s[1:])
    return Calibration(text.model_digest, costs, measured)


def engine_for(
    device: Device, num_threads: int, weight_dtype: WeightDtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> EngineConfig:
    """Limits that hold the grid of this device."""
    if device is Device.CUDA:
        return EngineConfig(
            kv_cache_bytes=0,
            token_budget=GPU_TOKEN_BUDGET,
            max_running_sequences=GPU_MAX_SEQUENCES,
            num_threads=num_threads,
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
        )
    return EngineConfig(num_threads=num_threads, weight_dtype=weight_dtype, kv_dtype=kv_dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workers.calibration")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", type=Device, required=True)
    parser.add_argument("--weight-dtype", type=WeightDtype, required=True)
    parser.add_argument("--kv-dtype", type=KvDtype, default=KvDtype.AUTO)
    arguments = parser.parse_args(argv)
    engine = engine_for(arguments.device, arguments.threads, arguments.weight_dtype, arguments.kv_dtype)
    spec = WorkerSpec(
        WorkerId("calibration"), 1, BOTH, arguments.model, device=arguments.device, engine=engine
    )
    try:
        found = calibrate(spec, lambda text: _write({"doing": text}))
    except PhasewiseWorkerError as error:
        _write({"failed": str(error)})
        return 1
    _write({"calibration": asdict(found)})
    return 0


def _write(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})  # noqa: S606 - no shell
    sys.exit(main())
