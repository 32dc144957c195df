"""Processes that share one GPU through MPS: at the same time, each on its part of the SMs; one is killed, and whoever comes computes.

Nobody else may use the GPU meanwhile: MPS takes turns with those that are not its clients.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.mps_spinner import SPIN_NS
from tests.support.waiting import until_in_thread
from workers.device.capability import capability_of
from workers.device.device_facts import device_facts

CAPABILITY = capability_of(device_facts())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY.mps is not None, reason=f"MPS: {CAPABILITY.mps}"),
]
ROOT = Path(__file__).parents[2]
Start = Callable[..., "Spinner"]


class Spinner:
    """A process of `mps_spinner`."""

    def __init__(self, root: Path, percentage: float | None) -> None:
        more = [] if percentage is None else [f"{percentage:g}"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.mps_spinner", str(root), *more],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        """What to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def said(self) -> str:
        """Its next line; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended with status {self._process.wait()}"
        return line.strip()

    def computes(self, num: int) -> bool:
        """Whether it says so many times that it has; not when it ends instead."""
        assert self._process.stdout is not None
        return all(self._process.stdout.readline().strip() == "computed" for _ in range(num))

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts spinners. Of them, and of a daemon, nothing is left."""
    started: list[Spinner] = []
    # Short: a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="pw", dir="/tmp") as folder:
        root = Path(folder)

        def start_one(percentage: float | None) -> Spinner:
            started.append(Spinner(root, percentage))
            return started[-1]

        yield start_one
        for one in started:
            one.kill()
        until_in_thread(lambda: not list(root.iterdir()), "the end of the daemon")


def together(spinners: list[Spinner], folder: Path) -> float:
    """Part of the time in which both computed that both had a kernel on the GPU. One that waited for its turn in the middle has not been there."""
    paths = [folder / str(index) for index in range(2)]
    for spinner, path in zip(spinners, paths, strict=True):
        spinner.tell(f"note {path}")
    for spinner in spinners:
        assert spinner.said() == "noted"
    first, second = (torch.load(path).tolist() for path in paths)
    begin, end = max(first[0][0], second[0][0]), min(first[-1][1], second[-1][1])
    assert begin < end, "they did not compute at the same time, whatever the GPU does"
    total: float = 0
    kernels = sorted((*one, index) for index, notes in enumerate((first, second)) for one in notes)
    last: list[tuple[float, float]] = [(0, 0), (0, 0)]
    for began, ended, index in kernels:
        if ended - began <= 2 * SPIN_NS:
            other = last[1 - index]
            total += max(0, min(ended, other[1], end) - max(began, other[0], begin))
            last[index] = (began, ended)
    return total / float(end - begin)


def test_two_processes_compute_at_the_same_time_each_on_half_of_the_sms(start: Start, tmp_path: Path) -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    spinners = [start(50), start(50)]
    for spinner in spinners:
        # Rounded down to whole pairs.
        assert num_sms / 2 - 2 < int(spinner.said()) <= num_sms / 2
    assert together(spinners, tmp_path) > 0.5


def test_shares_may_add_up_to_more_than_all_sms(start: Start, tmp_path: Path) -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    spinners = [start(100), start(70)]
    assert int(spinners[0].said()) == num_sms
    assert int(spinners[1].said()) < num_sms
    assert together(spinners, tmp_path) > 0.5


def test_without_shares_two_processes_take_turns(start: Start, tmp_path: Path) -> None:
    """What the shares are for; and `together` can tell."""
    spinners = [start(None), start(None)]
    for spinner in spinners:
        spinner.said()
    assert together(spinners, tmp_path) < 0.5


def test_a_process_is_killed_while_both_compute_and_whoever_comes_computes(start: Start) -> None:
    # The first has started the daemon.
    killed, other = start(50), start(50)
    for spinner in (killed, other):
        spinner.said()
        spinner.tell("go on")
        assert spinner.computes(1)
    killed.kill()
    # MPS promises nothing of one whose neighbour ends with work on the GPU: it goes on, or it loses the GPU.
    goes_on = other.computes(50)
    again = start(50)
    again.said()
    again.tell("go on")
    assert again.computes(5)
    assert not goes_on or other.computes(1)
