"""The processes of a phase: switched, killed and ended; without a GPU."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.share_works import make_counting, make_failing, open_nothing
from tests.support.waiting import BOUND_S, until_in_thread
from workers.api import Phase
from workers.device.phase_processes import PhaseProcesses
from workers.device.share_process import WorkMaker
from workers.device.share_switch import SwitchState
from workers.device.shared_blocks import SharedBlocks

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "blocks"
    SharedBlocks.create(found, 100).close()
    return found


def processes_of(path: Path, make: WorkMaker) -> PhaseProcesses:
    return PhaseProcesses(Phase.DECODE, make, b"", path, None, opener=open_nothing)


@pytest.fixture
def blocks(path: Path) -> Iterator[SharedBlocks]:
    opened = SharedBlocks(path)
    yield opened
    opened.close()


@pytest.fixture
def decode(path: Path) -> Iterator[PhaseProcesses]:
    found = processes_of(path, make_counting)
    found.ask(40, "start")
    found.settle(BOUND_S)
    yield found
    found.close()


def test_a_switch_keeps_the_work_and_its_blocks_and_leaves_no_process(
    decode: PhaseProcesses, blocks: SharedBlocks
) -> None:
    old = decode.pid()
    decode.ask(60, "test")
    decode.settle(BOUND_S)
    assert decode.pid() != old
    assert [number for number, _ in decode.steps] == [1, 2]
    assert blocks.blocks_of(decode.owner(1)) == []
    assert blocks.blocks_of(decode.owner(2)) != []
    decode.close()
    assert blocks.num_free() == 100
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_is_replaced_and_its_blocks_are_free(
    decode: PhaseProcesses, blocks: SharedBlocks
) -> None:
    os.kill(decode.pid(), signal.SIGKILL)
    while decode.switch.state is SwitchState.SERVING:
        decode.tick(BOUND_S)
    decode.settle(BOUND_S)
    assert decode.switch.serving is not None
    assert decode.switch.serving.percentage == 40
    assert blocks.blocks_of(decode.owner(1)) == []


def test_a_new_process_that_cannot_start_leaves_the_old_one_serving(path: Path) -> None:
    decode = processes_of(path, make_failing)
    decode.ask(40, "start")
    decode.settle(BOUND_S)
    old = decode.pid()
    decode.ask(60, "test")
    decode.tick(BOUND_S)
    decode.tick(BOUND_S)
    assert decode.switch.state is SwitchState.PREPARING
    assert decode.pid() == old
    with pytest.raises(TimeoutError, match="decode is preparing after 0"):
        decode.settle(0)
    decode.close()
    assert multiprocessing.active_children() == []


def test_they_end_when_the_process_that_started_them_is_killed(path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.workers import test_phase_processes as t\n"
        "if __name__ == '__main__':\n"
        "    decode = t.processes_of(Path(sys.argv[1]), t.make_counting); decode.ask(40, 'start'); decode.settle(t.BOUND_S)\n"
        "    print(decode.pid(), decode._spare.pid if decode._spare else 0, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = path.parent / "starts.py"
    script.write_text(code)
    killed = subprocess.run(
        [sys.executable, str(script), str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for pid in map(int, killed.stdout.split()):
        until_in_thread(lambda pid=pid: not is_running(pid), f"the end of process {pid}")  # type: ignore[misc]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
