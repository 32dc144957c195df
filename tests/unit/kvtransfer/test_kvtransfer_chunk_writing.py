"""Chunks that are copied before they have come: once, where the machine allows it, and compared when they do."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from kvtransfer.chunk_writing import MAX_ANNOUNCED, ChunkWriter
from kvtransfer.codecs.codec import CodecId
from kvtransfer.frames import Chunk
from kvtransfer.kv_range import KvRange
from kvtransfer.pool import KvPool, KvSpan
from kvtransfer.session import WriteChunk
from tests.support.kvtransfer_fakes import FakeKvHost

BLOCKS = (9, 8, 7)
CHECKSUM = 0xABC
ANNOUNCED = Chunk(1, 6, 4, KvRange(0, 2, 4, 8), (0, 2), CodecId.NONE, 0, source_block_ids=(3,))
CHUNK = replace(ANNOUNCED, checksum=CHECKSUM)


class Mapped:
    """The sender's pool. Notes what is read; fails as often as it is told."""

    def __init__(self) -> None:
        self.pulled: list[tuple[KvSpan, KvSpan]] = []
        self.num_failures = 0

    def pull(self, source: KvSpan, _target: KvPool, into: KvSpan) -> int:
        self.pulled.append((source, into))
        if self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("it is gone")
        return CHECKSUM

    def close(self) -> None:
        raise AssertionError("its owner closes it")


class Bench:
    """A writer whose transfer has blocks and a pool to read from."""

    def __init__(self) -> None:
        self.mapped = Mapped()
        self.is_wanted = True
        self.writer = ChunkWriter(FakeKvHost(), lambda _chunk: self.is_wanted)
        self.writer.mapped = self.mapped
        self.writer.block_ids = BLOCKS

    def write(self, chunk: Chunk) -> int:
        return self.writer.write(WriteChunk(chunk, BLOCKS, "float32"))


async def idle() -> None:
    """All that is announced has had its turn."""
    for _ in range(MAX_ANNOUNCED + 2):
        await asyncio.sleep(0)


def run(scenario: Callable[[Bench], object], *, announces: tuple[Chunk, ...] = (ANNOUNCED,)) -> Bench:
    """`scenario` after these were announced and had their turn."""

    async def whole() -> Bench:
        bench = Bench()
        for chunk in announces:
            bench.writer.announce(chunk)
        await idle()
        scenario(bench)
        return bench

    return asyncio.run(whole())


def test_what_was_announced_is_copied_once_and_compared_when_it_comes() -> None:
    def scenario(bench: Bench) -> None:
        [(source, into)] = bench.mapped.pulled
        assert source == KvSpan((3,), 0, 4, 0, 2, 0, 2)
        assert into == KvSpan((8,), 0, 4, 0, 2, 0, 2)
        assert bench.write(replace(CHUNK, checksum=CHECKSUM)) == CHECKSUM
        assert len(bench.mapped.pulled) == 1

    run(scenario)


def test_what_was_read_before_it_was_all_there_is_read_again() -> None:
    """As may be with a GPU; that they differ then too is what the driver looks for."""

    def scenario(bench: Bench) -> None:
        assert bench.write(replace(CHUNK, checksum=CHECKSUM + 1)) == CHECKSUM
        assert len(bench.mapped.pulled) == 2

    run(scenario)


def test_one_that_is_sent_again_is_copied_again() -> None:
    def scenario(bench: Bench) -> None:
        bench.write(CHUNK)
        bench.write(CHUNK)
        assert len(bench.mapped.pulled) == 2

    run(scenario)


def test_a_chunk_that_is_not_as_announced_is_copied_as_it_is() -> None:
    def scenario(bench: Bench) -> None:
        bench.write(replace(CHUNK, source_block_ids=(5,)))
        assert [source.block_ids for source, _ in bench.mapped.pulled] == [(3,), (5,)]

    run(scenario)


def test_what_is_overwritten_is_copied_again() -> None:
    def scenario(bench: Bench) -> None:
        bench.write(replace(CHUNK, sequence_number=5, kv_range=KvRange(1, 3, 0, 8), source_block_ids=(1, 2)))
        bench.write(CHUNK)
        assert len(bench.mapped.pulled) == 3

    run(scenario)


def test_what_the_machine_would_not_take_is_not_written() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.is_wanted = False
        bench.writer.announce(ANNOUNCED)
        await idle()
        assert not bench.mapped.pulled

    asyncio.run(scenario())


def test_nothing_is_written_without_blocks_nor_after_the_end() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.writer.block_ids = ()
        bench.writer.announce(ANNOUNCED)
        await idle()
        bench.writer.block_ids = BLOCKS
        bench.writer.announce(ANNOUNCED)
        bench.writer.forget_announced()
        await idle()
        assert not bench.mapped.pulled

    asyncio.run(scenario())


def test_a_copy_that_failed_is_tried_again_when_the_chunk_comes() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.mapped.num_failures = 1
        bench.writer.announce(ANNOUNCED)
        await idle()
        assert bench.write(CHUNK) == CHECKSUM
        assert len(bench.mapped.pulled) == 2

    asyncio.run(scenario())


def test_what_has_come_is_heard_between_two_copies() -> None:
    async def scenario() -> None:
        bench = Bench()
        seen: list[int] = []
        asyncio.get_running_loop().call_soon(lambda: seen.append(len(bench.mapped.pulled)))
        for number in range(3):
            where = KvRange(number, number + 1, 0, 4)
            bench.writer.announce(replace(ANNOUNCED, sequence_number=number, kv_range=where))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(lambda: seen.append(len(bench.mapped.pulled)))
        await idle()
        assert seen == [0, 2]
        assert len(bench.mapped.pulled) == 3

    asyncio.run(scenario())


def test_more_than_fit_are_copied_when_they_come() -> None:
    async def scenario() -> None:
        bench = Bench()
        for number in range(MAX_ANNOUNCED + 5):
            where = KvRange(number, number + 1, 0, 4)
            bench.writer.announce(replace(ANNOUNCED, sequence_number=number, kv_range=where))
        await idle()
        assert len(bench.mapped.pulled) == MAX_ANNOUNCED
        bench.write(replace(CHUNK, sequence_number=MAX_ANNOUNCED, kv_range=KvRange(90, 91, 0, 4)))
        assert len(bench.mapped.pulled) == MAX_ANNOUNCED + 1

    asyncio.run(scenario())
