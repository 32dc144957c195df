"""Processes that join an MPS daemon, and what becomes of that."""

import subprocess
import sys
from pathlib import Path

import psutil

_JOIN = """
import sys
from pathlib import Path
from workers.device.mps_member import join
print(join("GPU-1", command=sys.argv[1], root=Path(sys.argv[2])).folder, flush=True)
sys.stdin.read()
"""


class Member:
    """A process that joins, and stays a member until it is killed. command: of `fake_mps`."""

    def __init__(self, command: str, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _JOIN, command, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def folder(self) -> Path:
        """Of the daemon that it has joined; waits for that."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        assert text, "it ended"
        return Path(text.rstrip("\n"))

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.communicate()


def daemon_pid(folder: Path) -> int:
    """Of the double that has this folder."""
    return int((folder / "pid").read_text())


def keeper_pid(folder: Path) -> int:
    """The parent of that."""
    return psutil.Process(daemon_pid(folder)).ppid()


def is_running(pid: int) -> bool:
    """Zombies do not: nobody may wait for them here."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
