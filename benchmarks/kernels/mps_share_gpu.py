"""The part of sm_share_gpu.py that starts processes: switches by MPS, and what a client's death does to the other.

A module of its own since its work is named to processes, which import it.
"""

import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from workers.api import Phase
from workers.device.capability import capability_of
from workers.device.device_facts import device_facts
from workers.device.mps import MpsDaemon
from workers.device.phase_processes import PhaseProcesses
from workers.device.resident_memory import AttachedMemory
from workers.device.resident_owner import ResidentOwner
from workers.device.share_switch import SwitchState
from workers.device.shared_blocks import SharedBlocks

#: 8 matrices of Llama-3-8B's MLP, 0.94 GB, and a KV pool of 16 GB.
NUM_LAYERS, HIDDEN, INNER = 8, 4096, 14336
NUM_BLOCKS, BLOCK_VALUES = 8192, 1 << 20
BATCH = 64
BOUND_S = 60.0
SHARES = (40.0, 60.0, 80.0, 20.0)


def make_tensors() -> Mapping[str, torch.Tensor]:
    """notes: [4096] seconds of pause, by number of the process."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        **{f"weight {index}": torch.randn((HIDDEN, INNER), **make) / 64 for index in range(NUM_LAYERS)},
        "kv": torch.zeros((NUM_BLOCKS, BLOCK_VALUES), **make),
        "notes": torch.zeros(4096, device="cuda", dtype=torch.float64),
    }


class GraphWork:
    """A decode-like step: a batch through all matrices, as one CUDA graph, and a write into the KV of its blocks."""

    def __init__(self, memory: AttachedMemory, blocks: SharedBlocks, number: int) -> None:
        self._tensors = memory.tensors
        self._blocks, self._number = blocks, number
        self._rows = torch.randn((BATCH, HIDDEN), device="cuda", dtype=torch.bfloat16)
        self._graph = torch.cuda.CUDAGraph()
        #: Its blocks; when its last step ended; that the pause is not noted yet.
        self._held: list[int] = []
        self._last_s = 0.0
        self._is_first = True

    def warm_up(self) -> None:
        """Library and graph."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._compute()
        stream.synchronize()
        with torch.cuda.graph(self._graph):
            self._compute()
        self._graph.replay()
        # Of the KV's dtype: the kernel that `step` uses is loaded now.
        torch.zeros(BLOCK_VALUES, device="cuda", dtype=torch.bfloat16).add_(1)
        torch.cuda.synchronize()

    def adopt(self, state: Any) -> None:
        """Blocks and time."""
        self._held, self._last_s = state or ([], 0.0)
        self._is_first = True

    def step(self) -> bool:
        """Until it is in memory."""
        if not self._held:
            self._held = self._blocks.allocate(16, self._number) or []
        self._graph.replay()
        self._tensors["kv"][self._held[0]].add_(1)
        torch.cuda.synchronize()
        now_s = time.monotonic()
        if self._is_first and self._last_s:
            self._tensors["notes"][self._number % 4096] = now_s - self._last_s
        self._is_first, self._last_s = False, now_s
        return True

    def hand_over(self) -> Any:
        """See `adopt`."""
        return self._held, self._last_s

    def _compute(self) -> None:
        for index in range(NUM_LAYERS):
            self._rows @ self._tensors[f"weight {index}"]


def make_work(memory: AttachedMemory, blocks: SharedBlocks, number: int) -> GraphWork:
    """See the class."""
    return GraphWork(memory, blocks, number)


class Pair:
    """Prefill and decode over one owner, both computing."""

    def __init__(self, folder: Path, owner: ResidentOwner, daemon: MpsDaemon) -> None:
        path = folder / "blocks"
        path.unlink(missing_ok=True)
        SharedBlocks.create(path, NUM_BLOCKS).close()
        self.prefill, self.decode = (
            PhaseProcesses(phase, make_work, owner.manifest, path, daemon)
            for phase in (Phase.PREFILL, Phase.DECODE)
        )
        self.prefill.ask(60.0, "start")
        self.decode.ask(40.0, "start")
        self.settle()

    def settle(self) -> None:
        """Both serve."""
        for one in (self.prefill, self.decode):
            one.settle(BOUND_S)

    def wait_for_spares(self) -> None:
        """Until the interpreter of the next process waits, for both."""
        give_up_s = time.monotonic() + BOUND_S
        while not (self.prefill.is_spare_ready and self.decode.is_spare_ready):
            assert time.monotonic() < give_up_s, "no spare came up"
            self.decode.tick(0.05)
            self.prefill.tick(0.05)

    def close(self) -> None:
        """Both."""
        self.prefill.close()
        self.decode.close()


def measure_mps(folder: Path, num: int) -> dict[str, Any]:
    """Seconds of switches, with a spare process and without; and how often the other phase lived through a death."""
    refusal = capability_of(device_facts()).mps
    if refusal is not None:
        return {"not_measured": str(refusal)}
    began_s = time.monotonic()
    with ResidentOwner(make_tensors) as owner:
        owner_s = time.monotonic() - began_s
        began_s = time.monotonic()
        with MpsDaemon() as daemon:
            daemon_s = time.monotonic() - began_s
            pair = Pair(folder, owner, daemon)
            try:
                return {
                    "owner_start_s": owner_s,
                    "daemon_start_s": daemon_s,
                    "switch_with_spare": _switches(pair, num, has_spare=True),
                    "switch_without_spare": _switches(pair, max(1, num // 2), has_spare=False),
                    "killed_while_it_computes": _deaths(pair, max(1, num - 2), _kill),
                    "terminated_by_the_daemon": _deaths(
                        pair, max(1, num - 3), lambda pid: _terminate(daemon, pid)
                    ),
                }
            finally:
                pair.close()


def _switches(pair: Pair, num: int, *, has_spare: bool) -> dict[str, Any]:
    """Of decode: from the decision to the end of the first step, and of what it is made. pause_s: between two steps."""
    rows = []
    decode = pair.decode
    for index in range(num):
        if has_spare:
            pair.wait_for_spares()
        elif decode._spare is not None:
            decode._spare.kill()
            decode._spare.end()
            decode._spare, decode.is_spare_ready = None, False
        percentage = SHARES[(index + 1) % len(SHARES)]
        assert decode.switch.serving is not None
        if decode.switch.serving.percentage == percentage:
            percentage = 50.0
        began_s = time.monotonic()
        decode.ask(percentage, "benchmark")
        decode.settle(BOUND_S)
        number, stepped_s = decode.steps[-1]
        ready = decode.readies[number]
        rows.append(
            {
                "percentage": percentage,
                "num_sms": ready.num_sms,
                "switch_s": stepped_s - began_s,
                "context_s": ready.context_s,
                "map_s": ready.map_s,
                "warm_up_s": ready.warm_up_s,
                "pause_s": _pause_s(pair, decode.owner(number)),
            }
        )
    names = ("switch_s", "context_s", "map_s", "warm_up_s", "pause_s")
    return {"median": {name: statistics.median(row[name] for row in rows) for name in names}, "rows": rows}


def _pause_s(pair: Pair, owner: int) -> float:
    from workers.device.resident_memory import attach

    memory = attach(pair.decode._manifest)
    found = float(memory.tensors["notes"][owner % 4096])
    memory.close()
    return found


def _deaths(pair: Pair, num: int, end: Callable[[int], None]) -> dict[str, Any]:
    """Of prefill while both compute; what became of decode within a second, and how long until prefill computed again."""
    rows = []
    for _ in range(num):
        pair.wait_for_spares()
        decode_pid, began_s = pair.decode.pid(), time.monotonic()
        num_steps = len(pair.prefill.steps)
        end(pair.prefill.pid())
        while pair.prefill.switch.state is SwitchState.SERVING and time.monotonic() - began_s < BOUND_S:
            pair.prefill.tick(1.0)
        pair.settle()
        pair.decode.tick(1.0)
        pair.settle()
        rows.append(
            {
                "did_the_other_live": pair.decode.pid() == decode_pid,
                "until_it_computes_again_s": pair.prefill.steps[-1][1] - began_s
                if len(pair.prefill.steps) > num_steps
                else None,
            }
        )
    return {"num": num, "num_lived": sum(row["did_the_other_live"] for row in rows), "rows": rows}


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _terminate(daemon: MpsDaemon, pid: int) -> None:
    """Tell the server to end its client, whose next call of CUDA then fails."""
    for server in daemon.ask("get_server_list").split():
        if str(pid) in daemon.ask(f"get_client_list {server}").split():
            daemon.ask(f"terminate_client {server} {pid}")
