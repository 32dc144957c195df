"""Pictures decoded in threads: bounds on threads, memory, time and on how many wait; giving up; closing."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.image_files import LIMITS, MODES, picture, png_of_size, saved
from tests.support.waiting import in_loop, until
from workers.errors import DecodePoolBusy, ImageFault, ImageRejected
from workers.images import pool as pool_module
from workers.images.decode import decode, peak_bytes
from workers.images.header import ImageHeader, read_header
from workers.images.limits import ImageLimits
from workers.images.pool import DecodePool, DecodePoolConfig

SMALL = saved(picture(), "PNG")
SMALL_PEAK = peak_bytes(read_header(SMALL, "", LIMITS))
#: Small ones; not for a small and a large one.
ROOM_FOR_TWO = 2 * SMALL_PEAK
LONG_S = 60.0


@asynccontextmanager
async def open_pool(config: DecodePoolConfig) -> AsyncIterator[DecodePool]:
    pool = DecodePool(config, LIMITS)
    try:
        yield pool
        pool.check_invariants()
    finally:
        await pool.close()


class Gate:
    """A decoder that works when it is told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.order: list[int] = []

    def __call__(self, data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
        assert self.opened.wait(LONG_S), "the gate was never opened"
        self.order.append(header.width)
        return decode(data, header)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(pool_module, "decode", gate)
    return gate


def sized(width: int) -> bytes:
    return saved(picture(width=width), "PNG")


@in_loop
async def test_pictures_come_back_as_pixels() -> None:
    async with open_pool(DecodePoolConfig()) as pool:
        files = [saved(picture(), image_format) for image_format in MODES] * 8
        found = await asyncio.gather(*(pool.decode(data, "") for data in files))
        for data, pixels in zip(files, found, strict=True):
            np.testing.assert_array_equal(pixels, decode(data, read_header(data, "", LIMITS)))
        assert (pool.num_running, pool.num_waiting, pool.bytes_in_flight) == (0, 0, 0)


@in_loop
async def test_a_refused_picture_fails_alone() -> None:
    async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
        files = [SMALL, b"text", SMALL[: len(SMALL) // 2], png_of_size(2**31, 2**31), SMALL]
        found = await asyncio.gather(
            *(pool.decode(data, "image/png") for data in files), return_exceptions=True
        )
        assert [type(one) for one in found[1:4]] == [ImageRejected] * 3
        assert isinstance(found[0], np.ndarray)
        assert isinstance(found[4], np.ndarray)
        with pytest.raises(ImageRejected, match="sent as 'image/gif'"):
            await pool.decode(SMALL, "image/gif")


def test_no_more_run_than_there_are_threads(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=2)) as pool:
            tasks = [asyncio.create_task(pool.decode(sized(10 + i), "")) for i in range(6)]
            await until(lambda: pool.num_waiting == 4, "four pictures to wait")
            assert pool.num_running == 2
            pool.check_invariants()
            gate.opened.set()
            await asyncio.gather(*tasks)
            assert sorted(gate.order) == list(range(10, 16))

    asyncio.run(scenario())


def test_first_come_first_served(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
            tasks = [asyncio.create_task(pool.decode(sized(width), "")) for width in (9, 8, 12, 7)]
            await until(lambda: pool.num_waiting == 3, "three pictures to wait")
            gate.opened.set()
            await asyncio.gather(*tasks)
            assert gate.order == [9, 8, 12, 7]

    asyncio.run(scenario())


def test_one_more_than_may_wait_is_refused(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1, max_waiting=2)) as pool:
            tasks = [asyncio.create_task(pool.decode(SMALL, "")) for _ in range(3)]
            await until(lambda: pool.num_waiting == 2, "two pictures to wait")
            with pytest.raises(DecodePoolBusy, match=r"2 pictures wait.*later"):
                await pool.decode(SMALL, "")
            pool.check_invariants()
            gate.opened.set()
            assert len(await asyncio.gather(*tasks)) == 3

    asyncio.run(scenario())


def test_memory_bounds_what_runs_and_a_small_one_does_not_overtake(gate: Gate) -> None:
    large = sized(1000)

    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=4, max_bytes_in_flight=ROOM_FOR_TWO)) as pool:
            tasks = [asyncio.create_task(pool.decode(data, "")) for data in (SMALL, large, SMALL)]
            await until(lambda: pool.num_waiting == 2, "two pictures to wait")
            assert (pool.num_running, pool.bytes_in_flight) == (1, SMALL_PEAK)
            pool.check_invariants()
            gate.opened.set()
            await asyncio.gather(*tasks)
            assert gate.order[:2] == [29, 1000]

    asyncio.run(scenario())


@in_loop
async def test_a_picture_larger_than_all_memory_is_decoded_alone() -> None:
    async with open_pool(DecodePoolConfig(num_threads=2, max_bytes_in_flight=1)) as pool:
        found = await asyncio.gather(*(pool.decode(SMALL, "") for _ in range(4)))
        assert len(found) == 4


def test_giving_up_while_waiting_frees_the_place(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1, max_waiting=1)) as pool:
            first = asyncio.create_task(pool.decode(SMALL, ""))
            second = asyncio.create_task(pool.decode(SMALL, ""))
            await until(lambda: pool.num_waiting == 1, "the second to wait")
            second.cancel()
            await asyncio.wait([second])
            assert pool.num_waiting == 0
            third = asyncio.create_task(pool.decode(SMALL, ""))
            await until(lambda: pool.num_waiting == 1, "the third to wait")
            gate.opened.set()
            await asyncio.gather(first, third)
            assert second.cancelled()

    asyncio.run(scenario())


def test_giving_up_lets_the_next_one_start(gate: Gate) -> None:
    large = sized(1000)

    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=2, max_bytes_in_flight=ROOM_FOR_TWO)) as pool:
            tasks = [asyncio.create_task(pool.decode(data, "")) for data in (SMALL, large, SMALL)]
            await until(lambda: pool.num_waiting == 2, "two pictures to wait")
            tasks[1].cancel()
            await until(lambda: pool.num_running == 2, "the last to start")
            gate.opened.set()
            await asyncio.gather(tasks[0], tasks[2])

    asyncio.run(scenario())


def test_giving_up_while_it_runs_keeps_its_thread_counted_until_it_ends(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
            task = asyncio.create_task(pool.decode(SMALL, ""))
            await until(lambda: pool.num_running == 1, "it to run")
            task.cancel()
            await asyncio.wait([task])
            assert pool.num_running == 1
            assert pool.bytes_in_flight == SMALL_PEAK
            gate.opened.set()
            await until(lambda: pool.num_running == 0, "its thread to be free")
            assert pool.bytes_in_flight == 0

    asyncio.run(scenario())


def test_all_places_given_up_in_one_moment_are_freed(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
            tasks = [asyncio.create_task(pool.decode(SMALL, "")) for _ in range(5)]
            await until(lambda: pool.num_waiting == 4, "four to wait")
            gate.opened.set()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await until(lambda: pool.num_running == 0, "the thread to be free")
            assert pool.num_waiting == 0
            assert (await pool.decode(SMALL, "")).shape == (17, 29, 3)

    asyncio.run(scenario())


def test_a_picture_that_takes_too_long_is_refused_and_the_pool_stays_bounded(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1, timeout_s=0.05)) as pool:
            with pytest.raises(ImageRejected, match=r"not decoded after 0.05 s") as caught:
                await pool.decode(SMALL, "")
            assert caught.value.fault is ImageFault.TOO_SLOW
            # The only thread hangs: what comes now waits for it in vain, and no thread is added.
            with pytest.raises(DecodePoolBusy, match="no thread was free"):
                await pool.decode(SMALL, "")
            assert (pool.num_running, pool.num_waiting) == (1, 0)
            gate.opened.set()
            await until(lambda: pool.num_running == 0, "the thread to be free")
            assert pool.bytes_in_flight == 0

    asyncio.run(scenario())


def test_a_deadline_of_the_caller_is_the_callers(gate: Gate) -> None:
    async def scenario() -> None:
        async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await pool.decode(SMALL, "")
            gate.opened.set()
            await until(lambda: pool.num_running == 0, "the thread to be free")

    asyncio.run(scenario())


def test_closing_refuses_what_waits_and_lets_what_runs_end(gate: Gate) -> None:
    async def scenario() -> None:
        pool = DecodePool(DecodePoolConfig(num_threads=1), LIMITS)
        running = asyncio.create_task(pool.decode(SMALL, ""))
        waiting = asyncio.create_task(pool.decode(SMALL, ""))
        await until(lambda: pool.num_waiting == 1, "one to wait")
        closing = asyncio.create_task(pool.close())
        with pytest.raises(DecodePoolBusy, match="stopping"):
            await waiting
        with pytest.raises(DecodePoolBusy, match="stopping"):
            await pool.decode(SMALL, "")
        gate.opened.set()
        assert (await running).shape == (17, 29, 3)
        await closing
        pool.check_invariants()

    before = threading.active_count()
    asyncio.run(scenario())
    assert not [one for one in threading.enumerate() if one.name.startswith("image-decode")], before


def test_closing_does_not_wait_for_a_thread_that_hangs(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "CLOSE_S", 0.01)
    threads: list[threading.Thread] = []

    async def scenario() -> None:
        pool = DecodePool(DecodePoolConfig(num_threads=2, timeout_s=0.01), LIMITS)
        threads.extend(one for one in threading.enumerate() if one.name.startswith("image-decode"))
        with pytest.raises(ImageRejected, match="not decoded"):
            await pool.decode(SMALL, "")
        await pool.close()
        assert all(one.daemon for one in threads)

    asyncio.run(scenario())
    assert "image_decode_threads_left num_threads=1" in caplog.text
    # It ends by itself when its loop is gone.
    gate.opened.set()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


@in_loop
async def test_a_pool_keeps_no_pixels_alive() -> None:
    async with open_pool(DecodePoolConfig(num_threads=1)) as pool:
        pixels = await pool.decode(SMALL, "")
        alive = weakref.ref(pixels)
        del pixels

        def is_gone() -> bool:
            gc.collect()
            return alive() is None

        await until(is_gone, "the pixels to be freed")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecodePoolConfig(num_threads=0),
        lambda: DecodePoolConfig(max_waiting=0),
        lambda: DecodePoolConfig(max_bytes_in_flight=0),
        lambda: DecodePoolConfig(timeout_s=float("nan")),
        lambda: DecodePoolConfig(timeout_s=0),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make: Callable[[], DecodePoolConfig]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        make().validate()


@in_loop
async def test_limits_are_those_of_the_pool() -> None:
    pool = DecodePool(DecodePoolConfig(num_threads=1), ImageLimits(max_pixels=29 * 17 - 1))
    try:
        with pytest.raises(ImageRejected, match="492 are allowed"):
            await pool.decode(SMALL, "")
    finally:
        await pool.close()
