"""The MPS daemon of CUDA, in a folder of its own: processes that are given its environment share one GPU, each on a part of its SMs.

A process's part is fixed when it first uses the GPU; another part needs another process. Parts may add up to more than the device.
Clients of one daemon are not safe from each other: a fault on the GPU, or a client that is told to terminate while it computes,
fails the others too (docs/sm-share.md has what was seen). Who owns memory that must outlive that is therefore no client.

Source: CUDA Multi-Process Service, chapters on the control daemon and on provisioning of execution resources.
"""

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.device.capability import PERCENTAGE, PIPE_DIRECTORY
from workers.errors import MpsFailed, SharingUnsupported

logger = logging.getLogger(__name__)

LOG_DIRECTORY = "CUDA_MPS_LOG_DIRECTORY"
COMMAND = "nvidia-cuda-mps-control"
#: It was 0.02 s, and its end 0.03.
START_S, ANSWER_S, END_S = 10.0, 10.0, 10.0
POLL_S = 0.005


#: $0 is the command, $1 the folder. Runs the daemon in the foreground; when the standard input ends, which it also does when its
#: writer dies, tells it to quit and clears away.
_SCRIPT = """
exec 3<&0
(cat <&3 >/dev/null; echo quit -t 1 | "$0"; rm -rf "$1") &
exec 3<&-
exec "$0" -f </dev/null
"""


class MpsDaemon:
    """A daemon that is this process's child, in the foreground, so that it can be waited for, and that ends when this process does.

    Raises SharingUnsupported when the command is not there, MpsFailed when it does not start or end.
    """

    def __init__(self, *, command: str = COMMAND, sleep: Callable[[float], None] = time.sleep) -> None:
        path = shutil.which(command)
        if path is None:
            problem = f"{command} is not on the PATH"
            raise SharingUnsupported(
                "MPS", problem, "install the driver's compute utilities, or use green contexts"
            )
        self._command = path
        self._sleep = sleep
        # Short: a socket's path has 107 characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix="phasewise-mps-"))
        environment = {**os.environ, **self.environment()}
        environment.pop(PERCENTAGE, None)
        # The devices of a daemon are numbered anew for its clients, which choose among all by this themselves.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - no shell, and a path that was looked up
                ["/bin/sh", "-c", _SCRIPT, path, str(self._folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # The servers that it starts end with the group.
                start_new_session=True,
            )
        try:
            self._wait(lambda: (self._folder / "control").exists(), START_S, "does not listen")
        except MpsFailed:
            self._kill()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        logger.info("mps_started pid=%d folder=%s", self._process.pid, self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    def environment(self, percentage: float | None = None) -> dict[str, str]:
        """What a client is to have in its environment before it first uses the GPU.

        percentage: of the SMs, above 0 and up to 100; the device rounds it down to whole pairs. None: all. Raises ValueError.
        """
        if percentage is not None and not 0 < percentage <= 100:
            raise ValueError(f"percentage is {percentage}; it is above 0, and 100 at most")
        found = {PIPE_DIRECTORY: str(self._folder), LOG_DIRECTORY: str(self._folder)}
        return found if percentage is None else {**found, PERCENTAGE: f"{percentage:g}"}

    def ask(self, command: str) -> str:
        """What the daemon answers to a command of its own language. Raises MpsFailed."""
        try:
            answer = subprocess.run(  # noqa: S603 - as above
                [self._command],
                input=f"{command}\n",
                env={**os.environ, **self.environment()},
                capture_output=True,
                text=True,
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise MpsFailed(f"no answer to {command!r} within {ANSWER_S:g} s") from error
        if answer.returncode:
            raise MpsFailed(f"{command!r}: {(answer.stderr or answer.stdout).strip()}")
        return answer.stdout.strip()

    def client_pids(self) -> list[int]:
        """Of every server of this daemon. Raises MpsFailed."""
        servers = self.ask("get_server_list").split()
        return [int(pid) for server in servers for pid in self.ask(f"get_client_list {server}").split()]

    def stop(self) -> None:
        """End it and its servers, and remove its folder. Its clients should have ended; those that have not lose the GPU."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._wait(lambda: self._process.poll() is not None, END_S, "does not end")
        except MpsFailed as error:
            logger.warning("mps_killed reason=%s", error)
            self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        # Not yet waited for, so that the number of the group is still its own.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _wait(self, is_done: Callable[[], bool], bound_s: float, problem: str) -> None:
        give_up_s = time.monotonic() + bound_s
        while not is_done():
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise MpsFailed(f"{COMMAND} {problem}: {self._said()}")
            self._sleep(POLL_S)

    def _said(self) -> str:
        try:
            said = (self._folder / "output").read_text(errors="replace").strip().splitlines()[-3:]
        except OSError:
            said = []
        return " / ".join(said) or "it said nothing"
