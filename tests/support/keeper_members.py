"""Where keepers of `keeper_starts` are, and processes that join one."""

import subprocess
import sys
from pathlib import Path

_JOIN = """
import sys
from functools import partial
from pathlib import Path
from tests.support.keeper_starts import write_line
from workers.device.keeper import Keeping, join
from workers.errors import MpsFailed
root, log, gate = map(Path, sys.argv[1:4])
keeping = Keeping(partial(write_line, log, gate), MpsFailed, None, float(sys.argv[4]))
print(join("test", "a", keeping, root=root).kept.decode(), flush=True)
sys.stdin.read()
"""


class KeeperPlace:
    """root: of the keepers' folders. log: a line for each keeper. gate: they have started when it is there, as it is at first."""

    def __init__(self, path: Path) -> None:
        self.root, self.log, self.gate = path / "keepers", path / "log", path / "gate"
        self.root.mkdir()
        self.gate.touch()

    @property
    def pids(self) -> list[int]:
        """Of all keepers that there were."""
        return [int(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


class KeeperMember:
    """A process that joins, and stays a member until it is killed."""

    def __init__(self, root: Path, log: Path, gate: Path, grace_s: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _JOIN, str(root), str(log), str(gate), str(grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def keeper_pid(self) -> int:
        """Of the keeper that it has joined; waits for that."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        assert text, "it ended"
        return int(text)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.communicate()
