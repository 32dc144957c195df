"""Which process is the one that was started: pids are used again, and clocks are set."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from orchestrator.runtime.head import MODULE, end_process, is_running


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    """A process with this as its last argument, which waits until its stdin closes."""
    command = [
        sys.executable,
        "-c",
        "import sys; print(); sys.stdout.flush(); sys.stdin.read()",
        request.param,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield psutil.Process(child.pid)


@pytest.mark.parametrize("process", [MODULE], indirect=True)
def test_a_head_is_known_again_when_the_clock_was_set(process: psutil.Process) -> None:
    assert is_running(process.pid, process.create_time())
    assert is_running(process.pid, process.create_time() + 90)
    end_process(process.pid, process.create_time() - 90)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_head_that_nobody_waits_for_has_ended_all_the_same() -> None:
    # As the first process of a container may be, which is the parent of a head whose start is over.
    child = "print(flush=True); input()"
    parent = (
        "import subprocess, sys; pipe = subprocess.PIPE;"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], stdin=pipe, stdout=pipe);"
        "child.stdout.readline(); print(child.pid, flush=True); input()"
    )
    command = [sys.executable, "-c", parent, MODULE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as careless:
        assert careless.stdout is not None
        process = psutil.Process(int(careless.stdout.readline()))
        end_process(process.pid, process.create_time())
        assert process.status() == psutil.STATUS_ZOMBIE
        careless.kill()


@pytest.mark.parametrize(
    ("process", "shift_s"), [(MODULE, 86400.0), ("something else", 0.0)], indirect=["process"]
)
def test_a_process_that_got_the_pid_of_a_head_is_left_alone(process: psutil.Process, shift_s: float) -> None:
    began_s = process.create_time() - shift_s
    assert not is_running(process.pid, began_s)
    end_process(process.pid, began_s)
    assert process.is_running()
    assert process.status() != psutil.STATUS_ZOMBIE


def test_a_process_that_is_gone_is_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        began_s = psutil.Process(child.pid).create_time()
    assert not is_running(child.pid, began_s)
    end_process(child.pid, began_s)
