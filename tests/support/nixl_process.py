"""A process that offers a pool through NIXL and reads those of others, for tests with the library itself.

python -m tests.support.nixl_process     prints its offer, then does what its input says, line by line
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtransfer.errors import PoolUnreachable
from kvtransfer.host_pool import HostPool
from kvtransfer.pool import KvSpan
from kvtransfer.transports import nixl
from tests.support.pool_owner import LAYOUT, NUM_BLOCKS, filled_cache

ROOT = Path(__file__).parents[2]
SPAN = KvSpan(tuple(range(NUM_BLOCKS)), 0, NUM_BLOCKS * LAYOUT.block_size, 0, 3, 0, 2)


@dataclass(frozen=True, slots=True)
class NixlProcess:
    """The process, and the descriptor of its pool, hexadecimal."""

    process: "subprocess.Popen[str]"
    descriptor: str

    def tell(self, command: str) -> str:
        """open DESCRIPTOR, pull, close or is_gone DESCRIPTOR; returns what came of it."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return _answer(self.process)

    def stop(self) -> None:
        """SIGSTOP; returns when it stands."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def nixl_process(ucx_tls: str) -> Iterator[NixlProcess]:
    """A process of its own; killed at the end. ucx_tls: by which ways UCX may go."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.nixl_process"],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "UCX_TLS": ucx_tls},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield NixlProcess(process, _answer(process))
    finally:
        process.kill()
        process.communicate()


def _answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        assert line, "the process ended"
        # NIXL has words of its own there.
        if line.startswith("answer "):
            return line.removeprefix("answer ").strip()


class _Side:
    """What the process does."""

    def __init__(self) -> None:
        pool = HostPool(filled_cache(), LAYOUT, is_in_nixl=True)
        self.descriptor = pool.offers[-1].descriptor.hex()
        self._pool: nixl.NixlPool | None = None

    def do(self, command: str, argument: str) -> str:
        if command == "open":
            self._pool = nixl.open_pool(bytes.fromhex(argument))
            return "opened"
        if command == "is_gone":
            return str(nixl.is_owner_gone(bytes.fromhex(argument)))
        assert self._pool is not None
        if command == "close":
            self._pool.close()
            return "closed"
        assert command == "pull"
        cache = torch.zeros(filled_cache().shape, dtype=torch.float16)
        target = HostPool(cache, LAYOUT)
        checksum = self._pool.pull(SPAN, target, SPAN)
        is_right = torch.equal(cache, filled_cache()) and checksum == target.checksum(SPAN, "nixl")
        return "right" if is_right else "wrong"


def _serve() -> None:
    side = _Side()
    print("answer", side.descriptor, flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        try:
            answer = side.do(command, argument)
        except (ConnectionError, PoolUnreachable) as error:
            answer = f"{type(error).__name__}: {error}"
        print("answer", answer, flush=True)


if __name__ == "__main__":
    _serve()
