"""A process that keeps something for several others as long as any of them lives: the first of them starts it, and it ends after the last.

A process joins, and is a member until it leaves or ends, by whatever death. The keeper is nobody's child and in a session of its own, so
that it outlives whoever started it, and waits with one lock of the kernel's for the last member: that goes with a process however it ends,
and no number of a process can be mistaken.

What is in its folder, and what a lock on it means:

    the folder  its keeper lives
    lock        somebody changes what is here: a process that joins, or the keeper while it starts and while it ends
    members     shared: a process lives that uses what is kept
    kept        none: what members are told, to find what is kept
    progress    none: how far the keeper is with its start, 0 to 1
    keeper.log  none: what the keeper had to say
"""

import fcntl
import logging
import os
import pickle
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from workers.errors import PhasewiseWorkerError

logger = logging.getLogger(__name__)

#: Not the folder for temporary files, which may differ between processes of one machine, and be too long for a socket's path.
ROOT = Path("/tmp")  # noqa: S108 - what is made there is looked at: it is this user's, and closed to others
LOCK, MEMBERS, KEPT, PROGRESS, LOG = "lock", "members", "kept", "progress", "keeper.log"
POLL_S = 0.05
#: How often a keeper looks whether a member has come within its grace.
LOOK_S = 1.0
_MODULE = "workers.device.keeper"
_SOURCES = Path(__file__).parents[2]

#: Told how far it is, 0 to 1.
Tell = Callable[[float], None]
#: Makes what is kept, in the process that keeps it, which may leave files in its folder; returns what members are told, and what ends it.
#: Of a module, with arguments that can be pickled, so that it can be named to another process.
Start = Callable[[Path, Tell], tuple[bytes, Callable[[], None]]]


@dataclass(frozen=True, slots=True)
class Keeping:
    """start_s: how long that may take; None: as long as it likes. grace_s: what is kept stays for so long without a member.

    failed: makes an error of what went wrong with the keeper itself. environment: of the keeper; that of this process when None.
    """

    start: Start
    failed: Callable[[str], PhasewiseWorkerError]
    start_s: float | None
    grace_s: float = 0.0
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """folder: the keeper's. kept: what `Start` told. lock: the descriptor that makes this process a member while it is open."""

    folder: Path
    kept: bytes
    lock: int

    def leave(self) -> None:
        """For a process that uses it no more."""
        os.close(self.lock)

    def give_up(self) -> None:
        """For a process that cannot use it: who joins from now on has another keeper. This one ends as ever, with its members."""
        with suppress(FileNotFoundError):
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
            # Whoever has it is about to change what is there anyway.
            if (
                _is_taken(lock)
                and _is_at(lock, self.folder / LOCK)
                and _is_at(self.lock, self.folder / MEMBERS)
            ):
                remove(self.folder)
            os.close(lock)
        self.leave()


def _ignore(_fraction: float) -> None:
    pass


def join(kind: str, name: str, keeping: Keeping, *, root: Path = ROOT, on_wait: Tell = _ignore) -> Membership:
    """One keeper for all processes of this user that join with this kind and name; a new one where none lives.

    on_wait: told again and again how far the keeper is with its start; may raise to wait no longer. The keeper starts on then.
    Raises what `keeping.start` raised, if it is an error of ours, and `keeping.failed`.
    """
    beginning = f"phasewise-{kind}-{os.geteuid()}-"
    folder = root / f"{beginning}{name}"
    lock = _locked(folder, keeping, on_wait)
    try:
        _sweep(folder, f"{beginning}*")
        members = open_lock(folder / MEMBERS)
        fcntl.flock(members, fcntl.LOCK_SH)
        try:
            problem = _see_to_keeper(folder, lock, keeping, on_wait)
            if problem is None:
                return Membership(folder, (folder / KEPT).read_bytes(), members)
        except BaseException:
            os.close(members)
            raise
        os.close(members)
        _tidy(folder)
        raise problem
    finally:
        os.close(lock)


def _locked(folder: Path, keeping: Keeping, on_wait: Tell) -> int:
    """The descriptor of `lock` in the folder, which is made, locked."""
    while True:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise keeping.failed(f"cannot make {folder}: {error.strerror}") from error
        with suppress(FileNotFoundError):
            if not _is_ours(folder):
                raise keeping.failed(f"{folder} is no folder that this user alone can use; remove it")
            lock = open_lock(folder / LOCK)
            try:
                while not _is_taken(lock):
                    on_wait(_progress(folder))
                    time.sleep(POLL_S)
            except BaseException:
                os.close(lock)
                raise
            if _is_at(lock, folder / LOCK):
                return lock
            os.close(lock)
        # A keeper that ended has just taken it away.


def _is_ours(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _progress(folder: Path) -> float:
    try:
        return float((folder / PROGRESS).read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def _sweep(own: Path, pattern: str) -> None:
    """Removes what other keepers that were killed, and a machine that went down, have left."""
    for folder in own.parent.glob(pattern):
        # Whoever is there, or comes, has one of these.
        with ExitStack() as opened, suppress(OSError):
            if folder == own or not _is_ours(folder):
                continue
            lock = open_lock(folder / LOCK)
            opened.callback(os.close, lock)
            itself = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, itself)
            members = open_lock(folder / MEMBERS)
            opened.callback(os.close, members)
            # In this order: whoever has no `lock` may not look like a keeper to who has.
            if all(map(_is_taken, (lock, itself, members))) and _is_at(lock, folder / LOCK):
                remove(folder)


def _see_to_keeper(folder: Path, lock: int, keeping: Keeping, on_wait: Tell) -> PhasewiseWorkerError | None:
    """There is one that lives, or it is started; what kept it from that, and it has ended then. Raises also while it starts."""
    own = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _start_keeper(folder, lock, own, keeping, on_wait) if _is_taken(own) else None
    finally:
        os.close(own)


def _start_keeper(
    folder: Path, lock: int, own: int, keeping: Keeping, on_wait: Tell
) -> PhasewiseWorkerError | None:
    # Its locks are ours, inherited: there is no moment without them, and they stay when we die meanwhile.
    environment = os.environ if keeping.environment is None else keeping.environment
    # What is found here is found there, whatever made it so.
    path = os.pathsep.join(dict.fromkeys([str(_SOURCES), *filter(None, sys.path)]))
    (folder / PROGRESS).write_text(_fraction(0.0))
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - a command of ours
            [sys.executable, "-m", _MODULE, str(folder), str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(lock, own),
            start_new_session=True,
            cwd="/",
            env={**environment, "PYTHONPATH": path},
        )
    with process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(pickle.dumps((keeping.start, keeping.grace_s)))
            process.stdin.close()
        answer = _answer(process, folder, keeping, on_wait)
    if not answer:
        return keeping.failed(f"its keeper does not start: {_last_line(folder / LOG)}")
    problem: PhasewiseWorkerError | None = pickle.loads(answer)  # noqa: S301 - of a process of ours
    if problem is None:
        logger.info("keeper_started folder=%s", folder)
    return problem


def _answer(process: "subprocess.Popen[bytes]", folder: Path, keeping: Keeping, on_wait: Tell) -> bytes:
    """All that the keeper says until it has started or ended."""
    assert process.stdout is not None
    began_s, answer = time.monotonic(), b""
    while True:
        if select.select([process.stdout], [], [], POLL_S)[0]:
            piece = os.read(process.stdout.fileno(), 65536)
            answer += piece
            if not piece:
                return answer
        elif keeping.start_s is not None and time.monotonic() - began_s > keeping.start_s:
            problem = f"its keeper does not start within {keeping.start_s:g} s; see {folder / LOG}"
            raise keeping.failed(problem)
        else:
            on_wait(_progress(folder))


def _tidy(folder: Path) -> None:
    """Nothing is left where no member is; that nobody else has `lock` is seen to by the caller."""
    members = open_lock(folder / MEMBERS)
    if _is_taken(members):
        remove(folder)
    os.close(members)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def open_lock(path: Path) -> int:
    """A descriptor of this file, which is made. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_taken(descriptor: int) -> bool:
    """It is locked by us from now on, unless anybody else has a lock on it. Of `members`, that means that there are none, nor come any."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(folder: Path) -> None:
    """All of it; only who has `lock` may. At once for whoever comes, who then makes another one."""
    gone = folder.with_name(f"{folder.name}-gone-{os.getpid()}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


# The process that keeps.


def main(arguments: list[str]) -> int:
    """arguments: the folder, and a descriptor of its `lock`. Both are locked by whoever starts this process, through descriptors that it
    has inherited. Its input is what to start, and its grace; its output, pickled, None when that has started and `lock` is free, or why not.
    """
    folder, lock = Path(arguments[0]), int(arguments[1])
    if os.fork():
        # Nobody's child, as Ray ends the children of a worker with it.
        os._exit(0)
    answer = os.dup(sys.stdout.fileno())
    # What libraries print is no answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    members, progress = open_lock(folder / MEMBERS), open_lock(folder / PROGRESS)
    start, grace_s = pickle.load(sys.stdin.buffer)  # noqa: S301 - of a process of ours
    try:
        kept, end = start(folder, lambda done: os.pwrite(progress, _fraction(done).encode(), 0))
    except PhasewiseWorkerError as error:
        os.write(answer, pickle.dumps(error))
        return 1
    (folder / KEPT).write_bytes(kept)
    fcntl.flock(lock, fcntl.LOCK_UN)
    # Whoever started it may have been killed.
    with suppress(BrokenPipeError):
        os.write(answer, pickle.dumps(None))
    # It reads to the end.
    os.close(answer)
    _wait_for_end(lock, members, grace_s)
    end()
    # Unless a member has given it up.
    if _is_at(lock, folder / LOCK):
        remove(folder)
    return 0


def _wait_for_end(lock: int, members: int, grace_s: float) -> None:
    """Until there has been no member for so long. `lock` is ours then."""
    while True:
        fcntl.flock(members, fcntl.LOCK_EX)
        # Whoever joins now has `lock` and waits for this.
        fcntl.flock(members, fcntl.LOCK_UN)
        if not _stays_without(members, grace_s):
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_taken(members):
            return
        fcntl.flock(lock, fcntl.LOCK_UN)


def _stays_without(members: int, grace_s: float) -> bool:
    """No member was seen for so long."""
    end_s = time.monotonic() + grace_s
    while (left_s := end_s - time.monotonic()) > 0:
        if not _is_taken(members):
            return False
        fcntl.flock(members, fcntl.LOCK_UN)
        time.sleep(min(left_s, LOOK_S))
    return True


def _fraction(done: float) -> str:
    """Always as long, so that it is written over what was there."""
    return f"{done:.4f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
