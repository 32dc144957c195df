"""A process that owns a KV pool in shared memory, for tests that read it from another one.

python -m tests.support.pool_owner NAME      prints the offer, then does what its input says, line by line
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pool import PoolOffer
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory

ROOT = Path(__file__).parents[2]
LAYOUT = KvLayout("model", "float16", 4, 3, 2, 8, "rope")
NUM_BLOCKS = 20


def filled_cache(layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS, seed: int = 0) -> torch.Tensor:
    """What the owner puts into its pool."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(pool_shape(layout, num_blocks), generator=generator)
    return values.to(getattr(torch, layout.dtype))


def shared_pool(name: str = "", *, layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS) -> HostPool:
    """A filled pool in shared memory of this process."""
    return shared_pool_and_cache(name, layout=layout, num_blocks=num_blocks)[0]


def shared_pool_and_cache(
    name: str = "", *, layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS
) -> tuple[HostPool, torch.Tensor]:
    """The same, and the tensor."""
    memory = SharedMemory.create(num_blocks * layout.block_bytes, name)
    cache = memory.tensor(pool_shape(layout, num_blocks), getattr(torch, layout.dtype))
    cache.copy_(filled_cache(layout, num_blocks))
    return HostPool(cache, layout, memory), cache


def shm_offer(pool: HostPool) -> PoolOffer:
    """How other processes may read it."""
    return next(offer for offer in pool.offers if offer.transport == "shm")


@dataclass(frozen=True, slots=True)
class PoolOwner:
    """The process, and how to read its pool."""

    process: "subprocess.Popen[str]"
    offer: PoolOffer

    def tell(self, command: str) -> None:
        """flip: change one byte of block 3; close: end the offer. Returns when it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def pool_owner(name: str = "test") -> Iterator[PoolOwner]:
    """A process of its own with a filled pool; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.pool_owner", name],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield PoolOwner(process, PoolOffer("shm", bytes.fromhex(process.stdout.readline())))
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    pool, cache = shared_pool_and_cache(sys.argv[1])
    print(shm_offer(pool).descriptor.hex(), flush=True)
    for line in sys.stdin:
        if line == "flip\n":
            cache[1, 1, 3, 2].view(torch.uint8).view(-1)[5] ^= 4
        elif line == "close\n":
            assert pool._shared_memory is not None
            pool._shared_memory.close()
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
