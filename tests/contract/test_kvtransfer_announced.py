"""Chunks of shared memory that are copied while their checksums are computed, and what is written together."""

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from kvtransfer import chunk_reading
from kvtransfer.chunk_writing import ChunkWriter
from kvtransfer.frames import Announce, Chunk, Nack
from tests.support.kvtransfer_ends import (
    CONFIG,
    NUM_BLOCKS,
    NUM_TOKENS,
    Ends,
    kv_of,
    owned,
    received,
    run_whole,
)
from tests.support.kvtransfer_fakes import LAYOUT, QueueStream

NUM_CHUNKS = NUM_BLOCKS * LAYOUT.num_layers
ONE_CHUNK = replace(CONFIG, max_chunk_bytes=2**20)


@pytest.fixture(autouse=True)
def small_chunks_are_announced() -> Iterator[None]:
    with patch.object(chunk_reading, "MIN_ANNOUNCED_BYTES", 0):
        yield


def test_chunks_are_announced_before_they_come_while_the_receiver_has_none() -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        report = await sender.run()
        assert torch.equal(received(ends), sent)
        assert report.num_chunks == NUM_CHUNKS
        numbers = {Announce: list[int](), Chunk: list[int]()}
        for frame in ends.way.channel.frames:
            if isinstance(frame, Announce):
                assert frame.chunk.checksum == 0
                assert frame.chunk.sequence_number not in numbers[Chunk]
                numbers[Announce].append(frame.chunk.sequence_number)
            elif isinstance(frame, Chunk):
                numbers[Chunk].append(frame.sequence_number)
        assert numbers[Chunk] == list(range(NUM_CHUNKS))
        assert numbers[Announce][: CONFIG.credits] == list(range(CONFIG.credits))
        # All that may be in flight are announced before the first checksum is computed.
        kinds = [type(frame) for frame in ends.way.channel.frames if isinstance(frame, (Announce, Chunk))]
        assert kinds[: CONFIG.credits + 1] == [Announce] * CONFIG.credits + [Chunk]

    run_whole("shm", scenario)


def test_a_copy_that_differs_from_what_is_checked_later_is_made_again() -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        pull = ChunkWriter._pull
        num_lies = 0

        def lie_once(writer: ChunkWriter, chunk: Chunk, into: tuple[int, ...]) -> int:
            nonlocal num_lies
            checksum = pull(writer, chunk, into)
            is_lie = chunk.sequence_number == 1 and num_lies == 0
            num_lies += is_lie
            return checksum ^ is_lie

        with patch.object(ChunkWriter, "_pull", lie_once):
            report = await sender.run()
        assert num_lies == 1
        # It is read again, and nothing is sent again.
        assert report.num_resent_chunks == ends.way.channel.num_of(Nack) == 0
        assert torch.equal(received(ends), sent)
        await ends.both_idle()
        assert ends.way.receiver.counts.num_corrupt_chunks == 0

    run_whole("shm", scenario)


def test_ways_that_carry_the_payload_or_one_loop_announce_nothing() -> None:
    async def scenario(ends: Ends) -> None:
        await ends.ready_sender().run()
        assert ends.way.channel.num_of(Announce) == 0

    for kind in ("queues", "in_process", "grpc"):
        run_whole(kind, scenario)


def test_what_ends_a_transfer_leaves_in_one_write_with_the_last_chunk_and_is_answered_in_one() -> None:
    writes: dict[bool, list[int]] = {True: [], False: []}
    write = QueueStream.write

    async def count(stream: QueueStream, *messages: bytes) -> None:
        writes[stream._is_sender].append(len(messages))
        await write(stream, *messages)

    async def scenario(ends: Ends) -> None:
        # Past the hooks of the tests, which see messages one by one.
        ends.way.channel.open = ends.way.channel.channel.open  # type: ignore[method-assign]
        await ends.ready_sender().run()
        assert received(ends).shape[2] == NUM_TOKENS

    with patch.object(QueueStream, "write", count):
        run_whole("in_process", scenario, config=ONE_CHUNK)
    # Reserve; the chunk, Finish and Commit. Granted; Ack, Verified and Committed, which may come in two.
    assert writes[True] == [1, 3]
    assert sum(writes[False]) == 4
