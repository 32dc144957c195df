"""The MPS daemon as a child, with a double of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.fake_mps import write_fake
from tests.support.waiting import until_in_thread
from workers.device import mps
from workers.device.mps import MpsDaemon
from workers.errors import MpsFailed, SharingUnsupported

ROOT = Path(__file__).parents[3]


def test_a_daemon_listens_answers_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with MpsDaemon(command=write_fake(tmp_path)) as daemon:
        folder = Path(daemon.environment()["CUDA_MPS_PIPE_DIRECTORY"])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "environment").read_text() == "[]"
        assert daemon.client_pids() == [110, 120]
        assert daemon.environment(62.5) == {
            "CUDA_MPS_PIPE_DIRECTORY": str(folder),
            "CUDA_MPS_LOG_DIRECTORY": str(folder),
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "62.5",
        }
        with pytest.raises(MpsFailed, match="no such command"):
            daemon.ask("dance")
    assert not folder.exists()
    daemon.stop()


@pytest.mark.parametrize("percentage", [0.0, -1.0, 100.5])
def test_a_share_that_cannot_be_is_refused(tmp_path: Path, percentage: float) -> None:
    with (
        MpsDaemon(command=write_fake(tmp_path)) as daemon,
        pytest.raises(ValueError, match="above 0, and 100"),
    ):
        daemon.environment(percentage)


def test_a_daemon_that_does_not_start_is_told_of_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(MpsFailed, match="does not listen: cannot listen"):
        MpsDaemon(command=write_fake(tmp_path, is_broken=True))


def test_a_daemon_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "END_S", 0.1)
    daemon = MpsDaemon(command=write_fake(tmp_path, is_deaf=True))
    folder = Path(daemon.environment()["CUDA_MPS_PIPE_DIRECTORY"])
    daemon.stop()
    assert daemon._process.returncode == -9
    assert not folder.exists()


def test_a_daemon_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from workers.device.mps import MpsDaemon; "
        "daemon = MpsDaemon(command=sys.argv[1]); "
        "print(daemon._process.pid, daemon.environment()['CUDA_MPS_PIPE_DIRECTORY'], flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, write_fake(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    pid, folder = killed.stdout.split()
    until_in_thread(lambda: not is_running(int(pid)), "the end of the daemon")
    until_in_thread(lambda: not Path(folder).exists(), "the end of its folder")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_without_the_command_it_is_refused_with_what_to_do() -> None:
    with pytest.raises(SharingUnsupported, match="not on the PATH; install the driver's compute utilities"):
        MpsDaemon(command="no-such-command-here")
