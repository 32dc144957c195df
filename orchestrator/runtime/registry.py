"""Which deployments were started from this machine: one JSON file each, so that `phasewise down` finds them."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path


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
        """Remember it, in place of an earlier one of the same name. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(running.name)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(running), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def get(self, name: str) -> RunningDeployment | None:
        """The deployment of this name; None when there is none, or its file is not one of this version."""
        return _read(self._path(name))

    def list(self) -> "list[RunningDeployment]":
        """All of them, by name."""
        found = [_read(path) for path in sorted(self._folder.glob("*.json"))]
        return [running for running in found if running is not None]

    def remove(self, name: str) -> None:
        """Forget it; nothing happens when it is not known."""
        self._path(name).unlink(missing_ok=True)

    def log_path(self, name: str) -> Path:
        """Where the process that owns the local Ray cluster of this deployment writes what goes wrong."""
        return self._folder / f"{name}.log"

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _read(path: Path) -> RunningDeployment | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(RunningDeployment)}:
        return None
    return RunningDeployment(**values)
