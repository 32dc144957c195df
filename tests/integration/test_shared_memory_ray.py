"""Two actors of one node: one owns a KV pool in shared memory, the other reads it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_ray import local_ray
from tests.support.pool_owner import LAYOUT, NUM_BLOCKS, filled_cache, shared_pool, shm_offer

pytestmark = pytest.mark.integration


class Owner:
    """A worker with a pool."""

    def __init__(self) -> None:
        self.pool = shared_pool("ray")

    def offer(self) -> tuple[str, bytes]:
        """How to read it."""
        offer = shm_offer(self.pool)
        return offer.transport, offer.descriptor

    def checksum(self) -> int:
        """Of all of it."""
        return self.pool.checksum(_span(), "shm")


class Reader:
    """A worker that reads it."""

    def pull(self, transport: str, descriptor: bytes) -> tuple[str, int, bool]:
        """What was taken, the checksum, and whether all came as it was."""
        import torch

        from kvtransfer.host_pool import HostPool
        from kvtransfer.pool import PoolOffer
        from kvtransfer.transports.opening import PoolOpener

        cache = torch.zeros_like(filled_cache())

        async def pull() -> tuple[str, int]:
            opener = PoolOpener()
            taken, mapped, _ = await opener.open([PoolOffer(transport, descriptor)])
            assert mapped is not None
            checksum = mapped.pull(_span(), HostPool(cache, LAYOUT), _span())
            opener.release(mapped)
            opener.close()
            return taken, checksum

        return *asyncio.run(pull()), torch.equal(cache, filled_cache())


def _span() -> Any:
    from kvtransfer.pool import KvSpan

    return KvSpan(tuple(range(NUM_BLOCKS)), 0, NUM_BLOCKS * LAYOUT.block_size, 0, 3, 0, 2)


def test_an_actor_reads_the_pool_of_another(tmp_path: Path) -> None:
    with local_ray(tmp_path, num_cpus=2):
        import ray

        remote: Any = ray.remote
        owner, reader = remote(num_cpus=0)(Owner).remote(), remote(num_cpus=0)(Reader).remote()
        offer = ray.get(owner.offer.remote(), timeout=60)
        taken, checksum, is_whole = ray.get(reader.pull.remote(*offer), timeout=60)
        assert (taken, is_whole) == ("shm", True)
        assert checksum == ray.get(owner.checksum.remote(), timeout=60)
