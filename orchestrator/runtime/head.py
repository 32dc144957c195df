"""Starts and ends the process that owns a local Ray cluster (`local_head`)."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.errors import LaunchFailed
from workers.launch_environment import LAUNCH_ENVIRONMENT

START_TIMEOUT_S = 120.0
#: Ray needs one to two seconds to end all its processes.
END_TIMEOUT_S = 20.0
POLL_S = 0.05
SHOWN_LOG_LINES = 5
MODULE = "orchestrator.runtime.local_head"
#: A process that began at another time is another one. But all such times shift when the clock of the machine
#: is set, as after a sleep: in seconds, by how much they may differ.
MAX_CLOCK_STEP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Head:
    """A running one."""

    process: "subprocess.Popen[bytes]"
    #: host:port of Ray's GCS.
    ray_address: str
    #: Where the processes of the cluster write their logs.
    log_dir: str
    created_unix_s: float

    def release(self) -> None:
        """From now on it outlives us."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.close()

    def close(self) -> None:
        """Let go of a process that has ended, or will since its stdin closes."""
        _close(self.process)


def start_head(*, num_cpus: int, log: Path) -> Head:
    """Start Ray, in a session of its own so that Ctrl-C here does not reach it.

    It ends when this process does, even by a kill, unless it is released. log: gets what it says on stderr.
    Raises LaunchFailed.
    """
    command = [sys.executable, "-m", MODULE, f"--num-cpus={num_cpus}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603 - a command of ours
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, **LAUNCH_ENVIRONMENT},
        )
    try:
        report = json.loads(_first_line(process))
        return Head(process, report["address"], report["log_dir"], psutil.Process(process.pid).create_time())
    except BaseException as error:
        end_process(process.pid, None)
        _close(process)
        if not isinstance(error, ValueError | KeyError | TimeoutError | psutil.Error):
            raise
        problem = _last_lines(log) or str(error)
        raise LaunchFailed(f"Ray did not start: {problem}", f"All it said is in {log}") from error


def end_process(pid: int, created_unix_s: float | None) -> None:
    """End the process, kindly first; returns when it is gone. One that began at another time is left alone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if created_unix_s is not None and not _began_at(process, created_unix_s):
            return
        process.terminate()
        try:
            _wait(process)
        except psutil.TimeoutExpired:
            process.kill()
            _wait(process)


def _wait(process: psutil.Process) -> None:
    """Until it has ended; nobody may wait for it then, as in a container whose first process takes no children over.

    Raises psutil.TimeoutExpired after END_TIMEOUT_S.
    """
    give_up_s = time.monotonic() + END_TIMEOUT_S
    while process.status() != psutil.STATUS_ZOMBIE:
        try:
            process.wait(POLL_S)
        except psutil.TimeoutExpired:
            if time.monotonic() >= give_up_s:
                raise
        else:
            return


def is_running(pid: int, created_unix_s: float | None) -> bool:
    """Whether this very process lives."""
    try:
        process = psutil.Process(pid)
        is_it = created_unix_s is not None and _began_at(process, created_unix_s)
        return is_it and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _began_at(process: psutil.Process, created_unix_s: float) -> bool:
    """Whether it is a head, and the one that began then."""
    return MODULE in process.cmdline() and abs(process.create_time() - created_unix_s) < MAX_CLOCK_STEP_S


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait(END_TIMEOUT_S)


def _first_line(process: "subprocess.Popen[bytes]") -> bytes:
    """Of stdout. Raises TimeoutError, and ValueError when there is none."""
    assert process.stdout is not None
    text = b""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not text.endswith(b"\n"):
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError(f"nothing was heard of it for {START_TIMEOUT_S:g} s")
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                raise ValueError("it ended at once")
            text += piece
    return text


def _last_lines(log: Path) -> str:
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-SHOWN_LOG_LINES:])
