"""This process as one of those that share a GPU through one MPS daemon, which the first of them starts and the last one ends.

A process joins before it first uses the GPU, and is a member until it ends, by whatever death: see `keeper`, which keeps the daemon.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from workers.device import keeper, mps
from workers.device.keeper import ROOT, Keeping, Membership, Tell
from workers.errors import MpsFailed

#: For an interpreter and a daemon to start.
START_S = 30.0


@dataclass(frozen=True, slots=True)
class MpsMember:
    """command: path of the daemon's. folder: the daemon's own. membership: of those for whom it is kept."""

    command: str
    folder: Path
    membership: Membership

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
        self.membership.leave()


def join(uuid: str, *, command: str = mps.COMMAND, root: Path = ROOT) -> MpsMember:
    """One daemon for all processes of this user that join with this UUID of a GPU; a new one where none lives.

    Raises SharingUnsupported when the command is not there, and MpsFailed.
    """
    path = mps.find_command(command)
    keeping = Keeping(partial(_start_daemon, path), MpsFailed, START_S)
    # Short: a socket's path has 107 characters at most.
    membership = keeper.join("mps", uuid.removeprefix("GPU-")[:8], keeping, root=root)
    return MpsMember(path, membership.folder / membership.kept.decode(), membership)


def _start_daemon(command: str, folder: Path, _tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """In the keeper; tells the name of the daemon's own folder, which is in that of the keeper. Raises MpsFailed."""
    daemon = mps.MpsDaemon(command=command, parent=folder)
    is_ending = threading.Event()
    threading.Thread(target=_end_without, args=(daemon, is_ending), daemon=True).start()

    def end() -> None:
        is_ending.set()
        daemon.stop()

    return daemon.folder.name.encode(), end


def _end_without(daemon: mps.MpsDaemon, is_ending: threading.Event) -> None:
    """The next to join gets another keeper: those that have joined have lost the GPU."""
    daemon.wait()
    if not is_ending.is_set():
        daemon.kill()
        os._exit(1)
