"""Bytes that change on the way or in memory: seen, sent again, counted, never decoded from."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import torch

from kvtransfer.digest import token_digest
from kvtransfer.driver import MAX_QUEUED_FRAMES
from kvtransfer.errors import ChunkRejected, InvalidTransfer, LeaseExpired, TransferEnded, TransferRefused
from kvtransfer.frames import Chunk, Finish, Frame, Nack, Reserve
from kvtransfer.sender import MAX_RESENDS
from kvtransfer.wire import decode, encode
from tests.support.kvtransfer_ends import (
    CONFIG,
    DIGEST,
    NUM_BLOCKS,
    NUM_TOKENS,
    Ends,
    Run,
    ended_with,
    kv_of,
    owned,
    received,
    run_whole,
)
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost
from tests.support.waiting import until

NUM_CHUNKS = NUM_BLOCKS * LAYOUT.num_layers
#: Where the number of a chunk begins in its message.
NUMBER_AT = 16


def flip(host: FakeKvHost, chunk: Chunk, block_ids: list[int]) -> None:
    """One bit of the source's memory where this chunk lies; or back."""
    where = chunk.kv_range
    block, place = divmod(where.token_lo, LAYOUT.block_size)
    host.kv_cache[where.layer_lo, 1, block_ids[block], place].view(torch.uint8).view(-1)[1] ^= 8


def rewrite(ends: Ends, kind: type[Frame], change: Callable[..., Frame]) -> None:
    """Every frame of this kind arrives changed, with a checksum that fits."""

    def hook(message: bytes) -> list[bytes]:
        frame = decode(message)
        return [encode(change(frame)) if isinstance(frame, kind) else message]

    ends.way.channel.to_receiver = hook


def on_chunks(ends: Ends, number: int, do: Callable[[Chunk, bytes], bytes]) -> None:
    """`do` sees each chunk of this number, and says what arrives."""

    def hook(message: bytes) -> list[bytes]:
        frame = decode(message)
        is_it = isinstance(frame, Chunk) and frame.sequence_number == number
        return [do(frame, message)] if isinstance(frame, Chunk) and is_it else [message]

    ends.way.channel.to_receiver = hook


# Memory.


def test_kv_that_is_wrong_in_memory_only_while_it_is_read_is_sent_again(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        block_ids = owned(ends.source, "t1")
        sent = kv_of(ends.source, block_ids)
        flipped: list[Chunk] = []

        def flip_once(chunk: Chunk, message: bytes) -> bytes:
            if flipped:
                return message
            flipped.append(chunk)
            if chunk.is_in_place:
                flip(ends.source, chunk, block_ids)
                return message
            return message[:-1] + bytes([message[-1] ^ 1])

        def flip_back(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Nack):
                assert "its checksum is" in frame.reason
                if flipped[0].is_in_place:
                    flip(ends.source, flipped[0], block_ids)
            return [message]

        on_chunks(ends, 4, flip_once)
        ends.way.channel.to_sender = flip_back
        report = await sender.run()
        assert report.num_resent_chunks == 1
        assert torch.equal(received(ends), sent)
        await ends.both_idle()
        assert ends.way.receiver.counts.num_corrupt_chunks == 1

    run(scenario)


def test_a_copy_that_is_wrong_every_time_ends_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        def lie(chunk: Chunk, _message: bytes) -> bytes:
            return encode(replace(chunk, checksum=chunk.checksum ^ 1))

        on_chunks(ends, 5, lie)
        message = await ended_with(ends, ends.ready_sender(), ChunkRejected)
        assert f"chunk 5 was rejected {MAX_RESENDS + 1} times: its checksum is" in message
        assert "t1" not in ends.target.committed
        await ends.both_idle()
        assert ends.way.receiver.counts.num_corrupt_chunks == MAX_RESENDS + 1

    run(scenario)


def test_kv_that_is_wrong_each_time_it_is_read_ends_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        block_ids = owned(ends.source, "t1")
        before = kv_of(ends.source, block_ids)
        reasons: list[str] = []
        wrong: list[Chunk] = []

        def flip_while_read(chunk: Chunk, message: bytes) -> bytes:
            if not chunk.is_in_place:
                return message[:-1] + bytes([message[-1] ^ 1])
            flip(ends.source, chunk, block_ids)
            wrong.append(chunk)
            return message

        def flip_back(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Nack):
                reasons.append(frame.reason)
                # At the source nothing is wrong, as far as it can see.
                if wrong:
                    flip(ends.source, wrong.pop(), block_ids)
            return [message]

        on_chunks(ends, 7, flip_while_read)
        ends.way.channel.to_sender = flip_back
        message = await ended_with(ends, sender, ChunkRejected)
        assert f"chunk 7 was rejected {MAX_RESENDS + 1} times: its checksum is" in message
        assert len(reasons) == MAX_RESENDS + 1
        assert torch.equal(kv_of(ends.source, block_ids), before)
        assert "t1" not in ends.target.committed
        await ends.both_idle()
        counts = ends.way.receiver.counts
        assert (counts.num_corrupt_chunks, counts.num_received) == (MAX_RESENDS + 1, 0)

    run(scenario)


def test_kv_that_changes_before_it_is_sent_again_ends_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        block_ids = owned(ends.source, "t1")
        is_changed = False

        def damage_then_change(chunk: Chunk, message: bytes) -> bytes:
            nonlocal is_changed
            if not is_changed:
                is_changed = True
                flip(ends.source, chunk, block_ids)
                return encode(replace(chunk, checksum=chunk.checksum ^ 1))
            return message

        on_chunks(ends, 3, damage_then_change)
        message = await ended_with(ends, sender, InvalidTransfer)
        assert "the KV of chunk 3 changed while it was sent" in message
        assert "t1" not in ends.target.committed

    run(scenario)


# The whole.


def test_the_receiver_is_told_whose_kv_it_is(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.ready_sender().run()
        assert ends.target.digests["t1"] == DIGEST
        # The host knows by itself which tokens it asked for, in which order and where.
        assert token_digest([*range(NUM_TOKENS)][::-1]) != ends.target.digests["t1"]
        assert token_digest(range(NUM_TOKENS), first_position=1) != ends.target.digests["t1"]

    run(scenario)


@pytest.mark.parametrize("changed", ["finish", "tokens"])
def test_chunks_that_are_whole_and_not_what_was_meant_come_once_more_and_end_it(
    run: Run, changed: str
) -> None:
    async def scenario(ends: Ends) -> None:
        if changed == "finish":
            rewrite(ends, Finish, lambda frame: replace(frame, digest=bytes(16)))
        else:
            # The receiver is told that it is the KV of other tokens.
            rewrite(ends, Reserve, lambda frame: replace(frame, token_digest=token_digest([9])))
        message = await ended_with(ends, ends.ready_sender(), TransferEnded)
        assert "does not fit the digest of what was sent, 2 times" in message
        assert ends.way.channel.num_of(Chunk) == 2 * NUM_CHUNKS
        assert not ends.target.committed
        await ends.both_idle()
        counts = ends.way.receiver.counts
        assert (counts.num_digest_mismatches, counts.num_corrupt_chunks, counts.num_received) == (2, 0, 0)

    run(scenario)


def test_more_chunks_than_answers_may_wait_come_once_more() -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=100)
        sent = kv_of(ends.source, owned(ends.source, "t1"), 100)
        changed: list[Chunk] = []

        def change_once(chunk: Chunk, message: bytes) -> bytes:
            if changed:
                return message
            changed.append(chunk)
            payload = bytes([chunk.payload[0] ^ 1]) + bytes(chunk.payload[1:])
            return encode(replace(chunk, payload=memoryview(payload), checksum=google_crc32c.value(payload)))

        on_chunks(ends, 3, change_once)
        report = await sender.run()
        assert report.num_resent_chunks > MAX_QUEUED_FRAMES
        assert torch.equal(received(ends, 100), sent)

    # Over queues the answers leave one by one.
    run_whole("grpc", scenario, num_target_blocks=40)


def test_two_chunks_under_each_others_names_are_not_taken(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        # Both are whole, and each block of each layer is there: only the digest of all can tell.
        sender = ends.ready_sender()
        firsts: dict[int, Chunk] = {}

        def swap(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Chunk) and frame.sequence_number in (0, 1):
                firsts.setdefault(frame.sequence_number, frame)
                other = {0: (1, 2), 1: (0, 1)}[frame.sequence_number]
                where = replace(frame.kv_range, layer_lo=other[0], layer_hi=other[1])
                return [encode(replace(frame, kv_range=where))]
            return [message]

        ends.way.channel.to_receiver = swap
        # In place the layer is where it is copied from too: a header that lies is a copy that is wrong.
        with pytest.raises((TransferEnded, ChunkRejected)):
            await sender.run()
        assert firsts.keys() == {0, 1}
        assert not ends.target.committed
        await ends.both_idle()

    run(scenario)


# What is counted and logged.


def test_what_is_counted_is_what_happened(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        report = await ends.ready_sender().run()
        await ends.both_idle()
        counts = ends.way.receiver.counts
        assert (counts.num_received, counts.num_bytes_received) == (1, report.num_bytes)
        assert counts.num_corrupt_chunks == counts.num_digest_mismatches == counts.num_resumed == 0
        # Refused: of another life of the receiver. Expired: nothing is heard of its sender any more.
        await ended_with(ends, ends.ready_sender("t2", incarnation=5), TransferRefused)
        await ends.both_idle()
        assert counts.num_refused == 1
        sender = ends.sender("t3")
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.way.receiver.num_leases == 1, "there is a lease")
        ends.way.channel.to_receiver = lambda _: []
        with pytest.raises((LeaseExpired, TransferEnded)):
            await running
        await ends.both_idle()
        assert (counts.num_received, counts.num_refused, counts.num_expired) == (1, 1, 1)

    run(scenario, config=replace(CONFIG, lease_s=0.4))


def test_corruption_is_logged_once_for_a_transfer(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(ends: Ends) -> None:
        damaged: set[tuple[int, int]] = set()

        def damage_each_once(message: bytes) -> list[bytes]:
            frame = decode(message)
            if not isinstance(frame, Chunk) or (frame.lease_id, frame.sequence_number) in damaged:
                return [message]
            damaged.add((frame.lease_id, frame.sequence_number))
            return [encode(replace(frame, checksum=frame.checksum ^ 1))]

        ends.way.channel.to_receiver = damage_each_once
        for name in ("t1", "t2"):
            report = await ends.ready_sender(name).run()
            assert report.num_resent_chunks == NUM_CHUNKS
            ends.target.end_sequence(name)
        await ends.both_idle()
        assert ends.way.receiver.counts.num_corrupt_chunks == 2 * NUM_CHUNKS

    with caplog.at_level(logging.INFO, "kvtransfer"):
        run(scenario, config=replace(CONFIG, lease_s=5.0))
    lines = [one.getMessage() for one in caplog.records if "chunk_corrupt" in one.getMessage()]
    assert [line.split()[1] for line in lines] == ["transfer_id=t1", "transfer_id=t2"]
    assert all("its checksum is" in line for line in lines)


@pytest.mark.parametrize("place", [6, NUMBER_AT], ids=["first layer", "number"])
def test_a_damaged_header_breaks_the_stream_and_costs_no_credit(
    run: Run, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    async def scenario(ends: Ends) -> None:
        damaged: list[int] = []

        def damage(chunk: Chunk, message: bytes) -> bytes:
            if damaged:
                return message
            damaged.append(chunk.sequence_number)
            return message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :]

        on_chunks(ends, 2, damage)
        sender = ends.ready_sender()
        sent = ends.source.content(owned(ends.source, "t1"), NUM_TOKENS).copy()
        report = await sender.run()
        assert report.num_resumes == 1
        # What was on its way behind it.
        assert 1 <= report.num_resent_chunks <= CONFIG.credits
        assert np.array_equal(ends.target.content(ends.target.committed["t1"][0], NUM_TOKENS), sent)
        await until(lambda: ends.way.receiver.counts.num_corrupt_chunks == 1, "the damage is counted")

    with caplog.at_level(logging.INFO, "kvtransfer"):
        run(scenario)
    [line] = [one.getMessage() for one in caplog.records if "chunk_corrupt" in one.getMessage()]
    assert "number=- reason=" in line
