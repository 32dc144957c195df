"""Which deployments were started from this machine: one JSON file each, so that `phasewise down` finds them."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import IO

from orchestrator.errors import LaunchFailed


@dataclass(frozen=True, slots=True)
class RunningDeployment:
    """What `phasewise up` started. Addresses are host:port, as they were bound."""

    name: str
    #: Address that clients call.
    address: str
    #: Address of the gateway's control service.
    control_address: str
    #: Address of the Ray cluster it runs on.
    ray_address: str
    #: Process that owns the local Ray cluster; None when the cluster is somebody else's.
    head_pid: int | None
    #: When that process began, in Unix seconds: a later process may get the same pid.
    head_created_unix_s: float | None
    #: It tells Ray's autoscaler what it needs.
    is_autoscaled: bool = False


def default_folder() -> Path:
    """`phasewise/deployments` in the user's state folder."""
    # The XDG specification has a relative path ignored.
    configured = Path(os.environ.get("XDG_STATE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".local" / "state"
    return base / "phasewise" / "deployments"


class Registry:
    """The files of one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else default_folder()

    def save(self, running: RunningDeployment) -> None:
        """Remember it, in place of an earlier one of the same name. Raises LaunchFailed."""
        path = self.path(running.name)
        temporary = path.with_suffix(f".{os.getpid()}")
        with self._map_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(running), indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)

    def get(self, name: str) -> RunningDeployment | None:
        """The deployment of this name; None when there is none, or its file is not one of ours."""
        return _read(self.path(name))

    def list(self) -> "list[RunningDeployment]":
        """All of them, by name."""
        found = [_read(path) for path in sorted(self._folder.glob("*.json"))]
        return [running for running in found if running is not None]

    def remove(self, name: str) -> None:
        """Forget it; nothing happens when it is not known. A log with something in it stays."""
        self.path(name).unlink(missing_ok=True)
        log = self.log_path(name)
        if log.is_file() and log.stat().st_size == 0:
            log.unlink()

    @contextmanager
    def starting(self, name: str) -> Iterator[None]:
        """Nobody else on this machine starts a deployment of this name within the block.

        Raises LaunchFailed when somebody does already, or when the folder cannot be written.
        """
        path = self._folder / f"{name}.lock"
        with self._map_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            file = _lock(path)
        if file is None:
            raise LaunchFailed(
                f"deployment {name!r} is being started by another process",
                "Wait until it serves, or interrupt that process",
            )
        with file:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of this deployment."""
        return self._folder / f"{name}.json"

    def log_path(self, name: str) -> Path:
        """Where the process that owns the local Ray cluster of this deployment writes what goes wrong."""
        return self._folder / f"{name}.log"

    @contextmanager
    def _map_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LaunchFailed(
                f"cannot write in {self._folder}: {error.strerror}",
                "Set XDG_STATE_HOME to a folder in which you may write",
            ) from error


def _lock(path: Path) -> IO[bytes] | None:
    """The file, locked until it is closed or this process has ended; None when another has locked it."""
    while True:
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        # Whoever had it removes it: then what we have locked is a file that nobody else will find.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _read(path: Path) -> RunningDeployment | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = fields(RunningDeployment)
    # What has a default came with a later version than the file may be of.
    needed = {field.name for field in known if field.default is MISSING}
    if not isinstance(values, dict) or not needed <= set(values) <= {field.name for field in known}:
        return None
    return RunningDeployment(**values)
