"""Which way to a pool is taken, and when pools are opened and closed."""

import asyncio
import pickle
import sys
import threading
from types import ModuleType

import pytest

from kvtransfer.config import TransportChoice
from kvtransfer.errors import PoolUnreachable, ReservationRefused, SharedMemoryUnavailable
from kvtransfer.host_pool import HostPool
from kvtransfer.pool import KvSpan, PoolOffer
from kvtransfer.transports import in_process, shm
from kvtransfer.transports.choice import TransportOpener
from kvtransfer.transports.in_process import InProcessPool
from kvtransfer.transports.opening import PoolOpener
from tests.support.pool_owner import pool_owner, shared_pool, shm_offer
from tests.support.waiting import BOUND_S, in_loop, until

SPAN = KvSpan((1,), 0, 4, 0, 3, 0, 2)


@in_loop
async def test_a_pool_of_this_process_is_read_in_place_and_one_of_another_in_shared_memory() -> None:
    pool, opener = shared_pool(), PoolOpener()
    transport, mapped, why = await opener.open(pool.offers[::-1])
    assert (transport, why) == ("in_process", "")
    assert mapped is not None
    assert mapped.pull(SPAN, pool, SPAN) == pool.checksum(SPAN, transport)
    with pool_owner() as owner:
        offers = (owner.offer, PoolOffer("in_process", b'{"version": 1, "pid": 1, "start": "", "number": 1}'))
        transport, mapped, why = await opener.open(offers)
        assert (transport, why) == ("shm", "in_process: it is of another process")
        assert mapped is not None
    opener.close()


@in_loop
async def test_without_a_way_the_reasons_are_given() -> None:
    opener = PoolOpener()
    offers = [PoolOffer("shm", b""), PoolOffer("teleport", b"")]
    transport, mapped, why = await opener.open(offers)
    assert (transport, mapped) == ("grpc", None)
    assert why.startswith("shm: its descriptor makes no sense")
    assert why.endswith("teleport: it is not known here")
    assert await opener.open([]) == ("grpc", None, "")
    assert opener.num_open == 0


@in_loop
async def test_a_transport_that_cannot_be_loaded_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, opener = shared_pool(), PoolOpener()
    monkeypatch.setitem(sys.modules, "kvtransfer.transports.cuda_ipc", None)
    offers = [PoolOffer("cuda_ipc", b""), shm_offer(pool)]
    transport, _, why = await opener.open(offers)
    assert transport == "shm"
    assert why.startswith("cuda_ipc: it cannot be loaded here")
    opener.close()


@in_loop
async def test_a_transport_is_loaded_when_it_is_offered_and_goes_before_those_that_are_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("kvtransfer.transports.cuda_ipc")
    pool, opener = shared_pool(), PoolOpener()
    made = shm.open_pool(shm_offer(pool).descriptor)
    module.open_pool = lambda _descriptor: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvtransfer.transports.cuda_ipc", module)
    assert await opener.open([shm_offer(pool), PoolOffer("cuda_ipc", b"")]) == ("cuda_ipc", made, "")
    opener.close()


@in_loop
async def test_a_pool_is_opened_once_for_all_transfers_and_again_after_it_was_closed() -> None:
    pool, opener = shared_pool(), PoolOpener(max_idle=0)
    offers = [shm_offer(pool)]
    first, second = (await opener.open(offers))[1], (await opener.open(offers))[1]
    assert first is second
    assert first is not None
    opener.release(first)
    assert opener.num_open == 1
    opener.release(first)
    assert opener.num_open == 0
    third = (await opener.open(offers))[1]
    assert third is not first
    opener.close()


@in_loop
async def test_of_the_idle_ones_those_not_used_for_longest_are_closed() -> None:
    pools, opener = [shared_pool() for _ in range(4)], PoolOpener(max_idle=2)
    mapped = [(await opener.open([shm_offer(pool)]))[1] for pool in pools]
    for one in mapped:
        assert one is not None
        opener.release(one)
    assert opener.num_open == 2
    again = [(await opener.open([shm_offer(pool)]))[1] for pool in pools]
    assert [new is old for new, old in zip(again, mapped, strict=True)] == [False, False, True, True]
    opener.close()


@in_loop
async def test_pools_whose_owners_are_gone_are_closed_when_nobody_uses_them() -> None:
    opener = PoolOpener()
    ours = shared_pool()
    kept = (await opener.open([shm_offer(ours)]))[1]
    assert kept is not None
    with pool_owner() as owner:
        mapped = (await opener.open([owner.offer]))[1]
        assert mapped is not None
        owner.kill()
        opener.close_gone()
        assert opener.num_open == 2
        opener.release(mapped)
        assert opener.num_open == 1
        with pytest.raises(ConnectionError):
            mapped.pull(SPAN, ours, SPAN)
    opener.release(kept)
    opener.close_gone()
    assert opener.num_open == 1
    _give_up(ours)
    opener.close_gone()
    assert opener.num_open == 0


class SlowPools:
    """Opens pools of this process when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_open = threading.Event()
        self.num_opened = 0
        self.threads: set[str] = set()
        self.pool = shared_pool()
        self.offers = [one for one in self.pool.offers if one.transport == "in_process"]
        monkeypatch.setattr(in_process, "open_pool", self._open)

    def _open(self, descriptor: bytes) -> InProcessPool:
        self.num_opened += 1
        self.threads.add(threading.current_thread().name)
        assert self.may_open.wait(BOUND_S)
        return InProcessPool(1)


@in_loop
async def test_while_a_pool_is_opened_the_loop_goes_on_and_others_wait_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, opener = SlowPools(monkeypatch), PoolOpener(max_idle=0)
    waiting = [asyncio.create_task(opener.open(slow.offers)) for _ in range(3)]
    await until(lambda: slow.num_opened == 1, "it is being opened, and this is not held up")
    waiting.pop().cancel()
    slow.may_open.set()
    (_, first, _), (_, second, _) = await asyncio.gather(*waiting)
    assert first is second
    assert first is not None
    assert slow.threads == {"open-in_process"}
    opener.release(first)
    assert opener.num_open == 1
    opener.release(first)
    assert opener.num_open == 0
    opener.close()


@in_loop
async def test_a_pool_that_takes_too_long_is_passed_over_and_there_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, opener = SlowPools(monkeypatch), PoolOpener(open_s=0.01)
    why = "in_process: it was not open after 0.01 s"
    # The second does not wait as long again, and no thread more.
    assert await opener.open(slow.offers) == await opener.open(slow.offers) == ("grpc", None, why)
    assert (slow.num_opened, opener.num_open) == (1, 0)
    slow.may_open.set()
    await until(lambda: opener.num_open == 1, "it is open")
    assert (await opener.open(slow.offers))[0] == "in_process"
    assert slow.num_opened == 1
    opener.close()


@in_loop
async def test_a_forced_way_that_only_takes_too_long_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, opener = SlowPools(monkeypatch), TransportOpener(TransportChoice.IN_PROCESS)
    opener._pools = PoolOpener(open_s=0.01)
    with pytest.raises(ReservationRefused, match="it was not open after") as late:
        await opener.open(slow.offers)
    assert late.value.retryable
    with pytest.raises(ReservationRefused, match="offers shm") as never:
        await opener.open([PoolOffer("shm", b"")])
    assert not never.value.retryable
    slow.may_open.set()
    await until(lambda: opener._pools.num_open == 1, "it is open")
    assert (await opener.open(slow.offers))[0] == "in_process"
    opener._pools.close()


@in_loop
async def test_a_pool_that_is_open_after_the_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, opener = SlowPools(monkeypatch), PoolOpener(open_s=0.01)
    closed = threading.Event()
    monkeypatch.setattr(InProcessPool, "close", lambda _pool: closed.set())
    assert (await opener.open(slow.offers))[1] is None
    opener.close()
    slow.may_open.set()
    await until(closed.is_set, "it is closed")
    assert opener.num_open == 0


@in_loop
async def test_pools_of_owners_that_are_gone_are_closed_while_nothing_is_transferred() -> None:
    ours, opener = shared_pool(), PoolOpener(look_s=0.01)
    mapped = (await opener.open([shm_offer(ours)]))[1]
    assert mapped is not None
    opener.release(mapped)
    assert opener.num_open == 1
    _give_up(ours)
    await until(lambda: opener.num_open == 0, "it is closed")
    opener.close()


def _give_up(pool: HostPool) -> None:
    assert pool._shared_memory is not None
    pool._shared_memory.close()


def test_errors_of_opening_name_the_transport_and_survive_pickling() -> None:
    for error in (PoolUnreachable("shm", "it is gone"), SharedMemoryUnavailable(4096, "no memory")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))
    assert str(SharedMemoryUnavailable(4096, "no memory")) == "no 4096 bytes of shared memory: no memory"
    assert str(PoolUnreachable("shm", "it is on another host")) == (
        "the other side's pool cannot be read by shm: it is on another host"
    )
