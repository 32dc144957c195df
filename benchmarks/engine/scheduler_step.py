"""CPU time that the engine itself takes in a step, without a model: expire, schedule, complete, outputs.

    python benchmarks/engine/scheduler_step.py [--quick] [--json FILE]

Every running sequence decodes one token in each step, so this is the cost that is added to the forward pass
of each token of a batch. Time is the process's own CPU time; steps are timed one by one after a warm-up.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from orchestrator.bench.machine import describe_machine
from workers.api import EngineConfig, Phase, RequestId, RequestKey, SamplingParams, Submit
from workers.engine.engine import Engine
from workers.engine.scheduler import StepPlan
from workers.engine.step_loop import StepLoop

NUM_SEQUENCES = (1, 16, 64, 256)
BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 64
NUM_WARM_UP_STEPS = 50


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result; times in microseconds of CPU per step."""

    num_sequences: int
    num_steps: int
    step_p50_us: float
    step_p95_us: float
    schedule_p50_us: float
    complete_p50_us: float


class NoModel:
    """Every sequence gets the same token at once."""

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> list[int]:
        del on_layers
        return [1] * len(plan.slices)


def engine_with(num_sequences: int, num_steps: int) -> Engine:
    """All of these sequences decode, and will for `num_steps` steps."""
    max_tokens = NUM_PROMPT_TOKENS + num_steps
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        token_budget=num_sequences * NUM_PROMPT_TOKENS + BLOCK_SIZE,
        max_running_sequences=num_sequences,
        max_waiting_requests=num_sequences,
    )
    num_blocks = num_sequences * -(-max_tokens // BLOCK_SIZE)
    engine = Engine(
        config,
        frozenset({Phase.PREFILL, Phase.DECODE}),
        num_blocks=num_blocks,
        max_context_tokens=max_tokens,
        claim_s=30.0,
    )
    for i in range(num_sequences):
        submit = Submit(
            key=RequestKey(RequestId(f"request-{i}"), 1),
            phases=frozenset({Phase.PREFILL, Phase.DECODE}),
            token_ids=tuple(range(NUM_PROMPT_TOKENS)),
            sampling=SamplingParams(num_steps, stop_token_ids=frozenset({0, 2})),
            timeout_s=600.0 + i,
        )
        engine.handle(submit, 0.0)
    return engine


def measure(num_sequences: int, num_steps: int) -> Row:
    """Steps of the loop, and again their parts."""
    # One step prefills all; the last token of each is never reached.
    num_needed = NUM_WARM_UP_STEPS + 2 * num_steps + 2
    engine = engine_with(num_sequences, num_needed)
    published: list[object] = []
    loop = StepLoop(engine, NoModel(), published.append, print, clock=lambda: 1.0)
    for _ in range(NUM_WARM_UP_STEPS):
        loop.step()
    assert engine.num_running == num_sequences
    gc.collect()
    whole_ns = np.empty(num_steps)
    for i in range(num_steps):
        begin_ns = time.process_time_ns()
        loop.step()
        whole_ns[i] = time.process_time_ns() - begin_ns
        published.clear()
    schedule_ns, complete_ns = np.empty(num_steps), np.empty(num_steps)
    for i in range(num_steps):
        begin_ns = time.process_time_ns()
        engine.expire(1.0)
        plan = engine.schedule(1.0)
        scheduled_ns = time.process_time_ns()
        assert plan is not None
        engine.complete(plan, [1] * num_sequences, 1.0)
        engine.take_outputs()
        complete_ns[i] = time.process_time_ns() - scheduled_ns
        schedule_ns[i] = scheduled_ns - begin_ns
    engine.check_invariants()
    p50, p95 = np.percentile(whole_ns, [50, 95]) / 1000
    return Row(
        num_sequences,
        num_steps,
        round(float(p50), 1),
        round(float(p95), 1),
        round(float(np.median(schedule_ns)) / 1000, 1),
        round(float(np.median(complete_ns)) / 1000, 1),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    arguments = parser.parse_args()
    num_steps = 200 if arguments.quick else 3000
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['num_cpus']} CPUs, Python {machine['python']}; {num_steps} steps each")
    print(
        f"{'sequences':>9}  {'step p50':>9}  {'step p95':>9}  {'schedule p50':>12}  {'complete p50':>12}  (us)"
    )
    rows = []
    for num_sequences in NUM_SEQUENCES:
        row = measure(num_sequences, num_steps)
        rows.append(row)
        print(
            f"{row.num_sequences:>9}  {row.step_p50_us:>9.1f}  {row.step_p95_us:>9.1f}"
            f"  {row.schedule_p50_us:>12.1f}  {row.complete_p50_us:>12.1f}"
        )
    if arguments.json is not None:
        result = {
            "format": "phasewise-engine-step/v1",
            "machine": machine,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
