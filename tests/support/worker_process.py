"""The worker as a process of its own, as `python -m workers.main` starts it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from orchestrator.control.view import LifecycleState, WorkerView
from workers.api import PhaseSet, WorkerId

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker that is ready, at this address."""

    process: "subprocess.Popen[str]"
    worker_id: str
    phases: PhaseSet
    address: str

    def view(self) -> WorkerView:
        """As a controller would publish it."""
        return WorkerView(WorkerId(self.worker_id), 1, self.phases, LifecycleState.READY, self.address)


def start_process(*arguments: str, more: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Its output comes by pipes. more: of its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= more or {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "workers.main", *arguments],
        env={**environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def next_line(lines: Iterator[str], start: str) -> str:
    """The next line that begins so."""
    return next(line for line in lines if line.startswith(start))


@contextmanager
def worker_processes(
    *started: tuple[str, PhaseSet],
    model: Path,
    arguments: Sequence[Sequence[str]] = (),
    environments: Sequence[Mapping[str, str]] = (),
) -> Iterator[list[WorkerProcess]]:
    """All ready; killed at the end if they still run. started: worker ids and phases. arguments, environments: more for each."""
    processes = [
        start_process(
            *("--worker-id", worker_id, "--phases", ",".join(sorted(phases)), "--model", str(model)),
            *("--kv-cache-mib", "2", "--token-budget", "32", "--max-running-sequences", "8"),
            *(more or ()),
            more=environment,
        )
        for (worker_id, phases), more, environment in zip_longest(started, arguments, environments)
    ]
    try:
        yield [
            WorkerProcess(process, worker_id, phases, _address(process))
            for process, (worker_id, phases) in zip(processes, started, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    bound = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", next_line(process.stdout, "listening"))
    assert bound is not None
    assert next_line(process.stdout, "ready") == "ready\n"
    return bound[1]
