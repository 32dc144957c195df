"""This process as one of those that share a GPU through one MPS daemon, which the first of them starts and the last one ends.

A process joins before it first uses the GPU, and is a member until it ends, by whatever death: see `mps_keeper`, which keeps the daemon.
"""

import fcntl
import logging
import os
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.device import mps
from workers.device.mps_keeper import LOCK, LOG, MEMBERS, PIPE, READY, has_no_members, open_lock, remove
from workers.errors import MpsFailed

logger = logging.getLogger(__name__)

#: Not the folder for temporary files, which may differ between processes of one machine, and be too long for a socket's path.
ROOT = Path("/tmp")  # noqa: S108 - what is made there is looked at: it is this user's, and closed to others
#: For an interpreter and a daemon to start.
START_S = 30.0
_MODULE = "workers.device.mps_keeper"
_SOURCES = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class MpsMember:
    """command: path of the daemon's. folder: the daemon's own. lock: the descriptor that makes this process a member while it is open."""

    command: str
    folder: Path
    lock: int

    def environment(self, percentage: float) -> dict[str, str]:
        """What this process is to have in its environment before it first uses the GPU. Raises ValueError."""
        return mps.client_environment(self.folder, percentage)

    def check(self) -> None:
        """Raises MpsFailed unless the daemon has this process, which has used the GPU, among its clients."""
        pids = mps.client_pids(self.command, self.folder)
        if os.getpid() not in pids:
            found = ", ".join(map(str, pids)) or "none"
            raise MpsFailed(
                f"this process, {os.getpid()}, is no client of the daemon in {self.folder}; its clients: {found}"
            )

    def leave(self) -> None:
        """For a process that has not used the GPU. Whoever has stays a member until it ends."""
        os.close(self.lock)


def join(uuid: str, *, command: str = mps.COMMAND, root: Path = ROOT) -> MpsMember:
    """One daemon for all processes of this user that join with this UUID of a GPU; a new one where none lives.

    Raises SharingUnsupported when the command is not there, and MpsFailed.
    """
    path = mps.find_command(command)
    # Short: a socket's path has 107 characters at most.
    folder = root / f"phasewise-mps-{os.geteuid()}-{uuid.removeprefix('GPU-')[:8]}"
    lock = _lock(folder)
    try:
        members = open_lock(folder / MEMBERS)
        fcntl.flock(members, fcntl.LOCK_SH)
        try:
            _see_to_keeper(folder, lock, path)
        except BaseException:
            os.close(members)
            _tidy(folder)
            raise
        return MpsMember(path, folder / (folder / PIPE).read_text(), members)
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """The descriptor of `lock` in the folder, which is made, locked. Raises MpsFailed."""
    while True:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise MpsFailed(f"cannot make {folder}: {error.strerror}") from error
        with suppress(FileNotFoundError):
            _check_ours(folder)
            lock = open_lock(folder / LOCK)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, folder / LOCK):
                return lock
            os.close(lock)
        # A keeper that ended has just taken it away.


def _check_ours(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise MpsFailed(f"{folder} is no folder that this user alone can use; remove it")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _see_to_keeper(folder: Path, lock: int, command: str) -> None:
    """There is one that lives, or it is started. Raises MpsFailed."""
    own = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        _start_keeper(folder, lock, own, command)
    finally:
        os.close(own)


def _start_keeper(folder: Path, lock: int, own: int, command: str) -> None:
    # Its locks are ours, inherited: there is no moment without them, and they stay when we die meanwhile.
    path = os.pathsep.join([str(_SOURCES), os.environ.get("PYTHONPATH", "")])
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - a command of ours
            [sys.executable, "-m", _MODULE, command, str(folder), str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(lock, own),
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            text=True,
        )
    try:
        answer, _ = process.communicate(timeout=START_S)
    except subprocess.TimeoutExpired as error:
        raise MpsFailed(f"its keeper does not start within {START_S:g} s; see {folder / LOG}") from error
    if answer.strip() != READY:
        raise MpsFailed(answer.strip() or f"its keeper does not start: {_last_line(folder / LOG)}")
    logger.info("mps_keeper_started folder=%s", folder)


def _tidy(folder: Path) -> None:
    """Nothing is left where no member is; that nobody else has `lock` is seen to by the caller."""
    members = open_lock(folder / MEMBERS)
    if has_no_members(members):
        remove(folder)
    os.close(members)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
