"""The process that keeps an MPS daemon as long as any process lives that shares a GPU through it.

`mps_member.join` starts it. It is nobody's child and in a session of its own, so that it outlives whoever started it, and waits with
one lock of the kernel's for the last member: that goes with a process however it ends, and no number of a process can be mistaken.

What is in its folder, and what a lock on it means:

    the folder  its keeper lives
    lock        somebody changes what is here: a process that joins, or the keeper while it starts and while it ends
    members     shared: a process that shares the GPU lives
    pipe        the name of the daemon's own folder, which is beside it
    keeper.log  what the keeper had to say
"""

import fcntl
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

from workers.device.mps import MpsDaemon
from workers.errors import MpsFailed

LOCK, MEMBERS, PIPE, LOG = "lock", "members", "pipe", "keeper.log"
READY = "ready"


def main(arguments: list[str]) -> int:
    """arguments: path of the daemon's command, the folder, and a descriptor of `lock`. That and the folder are locked by whoever starts
    it, through descriptors that it has inherited.

    Its output is `ready`, after which `lock` is free, or what went wrong.
    """
    command, folder, lock = arguments[0], Path(arguments[1]), int(arguments[2])
    if os.fork():
        # Nobody's child, as Ray ends the children of a worker with it.
        os._exit(0)
    members = open_lock(folder / MEMBERS)
    try:
        daemon = MpsDaemon(command=command, parent=folder)
    except MpsFailed as error:
        sys.stdout.write(error.problem)
        return 1
    (folder / PIPE).write_text(daemon.folder.name)
    fcntl.flock(lock, fcntl.LOCK_UN)
    sys.stdout.write(READY)
    sys.stdout.flush()
    # Whoever started it reads to the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _keep(folder, daemon, lock, members)
    return 0


def _keep(folder: Path, daemon: MpsDaemon, lock: int, members: int) -> None:
    """Until the last member is gone; then nothing is left of it."""
    is_ending = threading.Event()
    threading.Thread(target=_end_without, args=(daemon, is_ending), daemon=True).start()
    while True:
        fcntl.flock(members, fcntl.LOCK_EX)
        # Whoever joins now has `lock` and waits for this.
        fcntl.flock(members, fcntl.LOCK_UN)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_no_members(members):
            break
        fcntl.flock(lock, fcntl.LOCK_UN)
    is_ending.set()
    daemon.stop()
    remove(folder)


def _end_without(daemon: MpsDaemon, is_ending: threading.Event) -> None:
    """The next to join gets another keeper: those that have joined have lost the GPU."""
    daemon.wait()
    if not is_ending.is_set():
        daemon.kill()
        os._exit(1)


def open_lock(path: Path) -> int:
    """A descriptor of this file, which is made. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def has_no_members(members: int) -> bool:
    """`members` is locked then, so that none comes either; only who has `lock` may ask."""
    try:
        fcntl.flock(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(folder: Path) -> None:
    """All of it; only who has `lock` may. At once for whoever comes, who then makes another one."""
    gone = folder.with_name(f"{folder.name}-gone-{os.getpid()}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
