"""A transfer between two hosts, over a stream in this process and over real gRPC: the same promises."""

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer import sender as sender_module
from kvtransfer.errors import (
    ChunkRejected,
    DeadlineExceeded,
    HostFailed,
    LeaseExpired,
    StreamLost,
    TransferAborted,
    TransferEnded,
    TransferRefused,
)
from kvtransfer.frames import Ack, Chunk, Commit, Finish, Granted, Nack, Renew, Reserve, Resume
from kvtransfer.layout import blocks_needed
from kvtransfer.sender import MAX_FRUITLESS_RESUMES, MAX_RESENDS
from kvtransfer.session import TransferReport
from kvtransfer.wire import CHUNK_HEADER_BYTES, decode
from tests.support.kvtransfer_ends import (
    CONFIG,
    DIGEST,
    NUM_BLOCKS,
    NUM_TOKENS,
    TOKEN_IDS,
    Ends,
    Run,
    ended_with,
    owned,
    tell_all,
)
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost, unchanged
from tests.support.waiting import until

# It goes well.


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 11])
@pytest.mark.parametrize("max_chunk_bytes", [1, 1000, 2**20])
def test_every_byte_arrives(run: Run, num_tokens: int, max_chunk_bytes: int) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=num_tokens)
        [block_ids] = [[i for i, owner in enumerate(ends.source.owners) if owner == "t1"]]
        # In the sequence's order, which is not the pool's.
        sent = ends.source.content(list(reversed(block_ids)), num_tokens).copy()
        report = await sender.run()
        assert report.num_bytes == sent.nbytes
        assert report.transport == ends.transport
        assert report.num_chunks == ends.way.channel.num_of(Chunk)
        assert 0 <= report.exposed_s <= report.transfer_s
        received_ids, token_ids = ends.target.committed["t1"]
        assert token_ids == TOKEN_IDS
        assert len(received_ids) == blocks_needed(num_tokens + 5, LAYOUT.block_size)
        received = ends.target.content(received_ids, num_tokens)
        assert np.array_equal(received, sent)
        assert ends.target.digests["t1"] == DIGEST

    run(scenario, config=replace(CONFIG, max_chunk_bytes=max_chunk_bytes))


def test_kv_leaves_while_prefill_goes_on(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(sender.run())
            for block in range(NUM_BLOCKS):
                size = LAYOUT.block_size
                sender.kv_ready(0, LAYOUT.num_layers, block * size, min(block * size + size, NUM_TOKENS))
                num_chunks = (block + 1) * LAYOUT.num_layers
                await until(
                    lambda num_chunks=num_chunks: ends.way.channel.num_of(Ack) == num_chunks,  # type: ignore[misc]
                    "this block is in the receiver's cache",
                )
            assert ends.way.channel.num_of(Finish) == 0
            sender.prefill_finished(TOKEN_IDS)
        assert running.result().num_chunks == NUM_BLOCKS * LAYOUT.num_layers

    run(scenario)


def test_credits_bound_the_chunks_in_flight(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.ready_sender().run()
        assert ends.way.channel.num_of(Chunk) == NUM_BLOCKS * LAYOUT.num_layers
        assert ends.way.channel.max_in_flight <= CONFIG.credits

    run(scenario)


def test_more_credits_than_the_way_holds_messages_do_not_stop_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        report = await ends.ready_sender(num_tokens=600).run()
        assert report.num_chunks == 150 * LAYOUT.num_layers

    run(scenario, config=replace(CONFIG, credits=400), num_target_blocks=160)


def test_many_transfers_at_once_share_the_blocks(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        async def one(number: int) -> TransferReport:
            transfer_id = f"t{number}"
            report = await ends.ready_sender(transfer_id, num_tokens=1 + number % 11).run()
            # The sequence is over at once, and what waits for blocks gets them.
            ends.target.end_sequence(transfer_id)
            return report

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number)) for number in range(64)]
        assert all(task.result().num_chunks > 0 for task in tasks)
        assert ends.way.channel.num_of(Commit) == 64

    run(scenario)


def test_a_silent_sender_keeps_its_lease_by_renewing_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(sender.run())
            # Each renewal comes a third of a lease after the last word: four of them outlive it.
            await until(lambda: ends.way.channel.num_of(Renew) >= 4, "the lease is renewed four times")
            assert ends.way.receiver.num_leases == 1
            tell_all(sender)
        assert running.result().num_chunks == NUM_BLOCKS * LAYOUT.num_layers

    run(scenario, config=replace(CONFIG, lease_s=1.2))


# It is refused.


def test_another_layout_is_refused_with_the_difference(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        message = await ended_with(ends, ends.ready_sender(), TransferRefused)
        assert "head_dim is 2 at the sender and 4 at the receiver" in message
        assert ends.target.num_writes == 0

    run(scenario, layout=replace(LAYOUT, head_dim=4))


def test_another_incarnation_is_refused(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        message = await ended_with(ends, ends.ready_sender(incarnation=5), TransferRefused)
        assert "this is incarnation 6, not 5" in message

    run(scenario)


def test_what_can_never_fit_is_refused_for_good(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        with pytest.raises(TransferRefused, match="5 blocks of 4") as caught:
            await ends.ready_sender(num_more=9).run()
        assert not caught.value.retryable

    run(scenario, num_target_blocks=4)


def test_a_receiver_that_closes_takes_no_more(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.way.receiver.close("shutting down")
        message = await ended_with(ends, ends.ready_sender(), TransferEnded)
        assert "shutting down" in message

    run(scenario)


def test_a_receiver_without_room_lets_it_wait_no_longer_than_its_time(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        held = ends.target.take("other", LAYOUT.block_size * 16)
        sender = ends.ready_sender(timeout_s=0.3)
        # Which side's clock is first is open; both know the time.
        with pytest.raises((DeadlineExceeded, TransferRefused, TransferEnded)):
            await sender.run()
        await until(lambda: ends.target.num_waiting == 0, "the reservation is withdrawn")
        ends.target.release("other", held, "the test is over")

    run(scenario)


# Damage.


def corrupt(message: bytes) -> bytes:
    return message[:-1] + bytes([message[-1] ^ 0x10])


def test_a_damaged_chunk_is_sent_again(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        damaged: set[int] = set()

        def damage_each_once(message: bytes) -> list[bytes]:
            frame = decode(message)
            if not isinstance(frame, Chunk) or frame.sequence_number in damaged:
                return [message]
            damaged.add(frame.sequence_number)
            return [corrupt(message)]

        ends.way.channel.to_receiver = damage_each_once
        sender = ends.ready_sender()
        sent = ends.source.content(owned(ends.source, "t1"), NUM_TOKENS).copy()
        report = await sender.run()
        # Counted once each, though all were sent twice.
        assert report.num_bytes == sent.nbytes
        assert ends.way.channel.num_of(Chunk) == 2 * report.num_chunks
        received_ids, _ = ends.target.committed["t1"]
        assert np.array_equal(ends.target.content(received_ids, NUM_TOKENS), sent)
        # One that was taken again, and had not left when the stream was given up, counts each time.
        assert report.num_resent_chunks >= report.num_chunks

    run(scenario)


def test_a_chunk_that_is_always_damaged_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "RECONNECT_DELAYS_S", (0.0, 0.0))

    async def scenario(ends: Ends) -> None:
        def damage(message: bytes) -> list[bytes]:
            is_first = len(message) > CHUNK_HEADER_BYTES and _is_chunk(message, 0)
            return [corrupt(message) if is_first else message]

        ends.way.channel.to_receiver = damage
        if ends.transport == "grpc":
            message = await ended_with(ends, ends.ready_sender(), ChunkRejected)
            assert f"chunk 0 was rejected {MAX_RESENDS + 1} times" in message
        else:
            # All of it is header: nobody knows which one it was.
            await ended_with(ends, ends.ready_sender(), StreamLost)
            assert ends.way.channel.num_of(Resume) == MAX_FRUITLESS_RESUMES + 1
        assert not ends.target.committed

    run(scenario)


def test_a_lost_chunk_is_asked_for(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        lost: list[bytes] = []

        def lose_one(message: bytes) -> list[bytes]:
            if not lost and _is_chunk(message, 2):
                lost.append(message)
                return []
            return [message]

        ends.way.channel.to_receiver = lose_one
        await ends.ready_sender().run()
        assert ends.way.channel.num_of(Nack) == 1

    run(scenario, config=replace(CONFIG, credits=100, lease_s=2.0))


# Somebody gives up, or dies.


def test_the_sender_may_abort_on_the_way(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        sender.kv_ready(0, LAYOUT.num_layers, 0, 1)
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.target.num_writes > 0, "a chunk has arrived")
        sender.abort("not wanted any more")
        # Before anything else runs.
        assert ends.source.num_free == len(ends.source.owners)
        with pytest.raises(TransferAborted, match="not wanted any more"):
            await running
        await ends.both_idle()
        [(_, _, reason)] = ends.target.releases
        assert "not wanted any more" in reason

    run(scenario)


def test_the_receiver_may_abort_on_the_way(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        sender.kv_ready(0, LAYOUT.num_layers, 0, 1)
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.target.num_writes > 0, "a chunk has arrived")
        ends.way.receiver.abort("t1", "the client left")
        assert ends.target.num_free == len(ends.target.owners)
        with pytest.raises(TransferEnded, match="the client left"):
            await running

    run(scenario)


def test_the_receiver_may_abort_what_waits_for_blocks(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        held = ends.target.take("other", LAYOUT.block_size * 16)
        running = asyncio.create_task(ends.ready_sender().run())
        await until(lambda: ends.target.num_waiting == 1, "it waits for blocks")
        ends.way.receiver.abort("t1", "the client left")
        with pytest.raises(TransferEnded, match="the client left"):
            await running
        await until(lambda: ends.target.num_waiting == 0, "the reservation is withdrawn")
        ends.target.release("other", held, "the test is over")

    run(scenario)


@pytest.mark.parametrize("num_messages", range(0, 40, 3))
def test_a_sender_cancelled_at_any_message_leaves_nothing(run: Run, num_messages: int) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        running: asyncio.Task[TransferReport]

        def cancel_then(message: bytes) -> list[bytes]:
            if ends.way.channel.num_messages >= num_messages:
                running.cancel()
            return [message]

        ends.way.channel.to_receiver = ends.way.channel.to_sender = cancel_then
        running = asyncio.create_task(sender.run())
        await asyncio.wait([running])
        # When all messages had passed before, it is done.
        assert running.cancelled() or running.result().num_chunks == NUM_BLOCKS * LAYOUT.num_layers
        assert ends.source.num_free == len(ends.source.owners)

    run(scenario)


def test_a_sender_cancelled_before_it_ran_is_ended_by_abort(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        running = asyncio.create_task(sender.run())
        running.cancel()
        await asyncio.wait([running])
        sender.abort("its task is gone")
        assert ends.source.num_free == len(ends.source.owners)
        await ended_with(ends, sender, TransferAborted)

    run(scenario)


@pytest.mark.parametrize("after", [Reserve, Granted, Chunk, Finish])
def test_a_receiver_that_vanishes_ends_the_sender(run: Run, after: type) -> None:
    async def scenario(ends: Ends) -> None:
        reached = asyncio.Event()

        def watch(message: bytes) -> list[bytes]:
            if isinstance(decode(message), after):
                reached.set()
            return [message]

        if after is Reserve:
            # Else it might be granted, and over, before the test is asked.
            ends.target.take("other", LAYOUT.block_size * 16)
        ends.way.channel.to_receiver = ends.way.channel.to_sender = watch
        sender = ends.ready_sender() if after is Finish else ends.sender()
        if after is Chunk:
            sender.kv_ready(0, 1, 0, 1)
        running = asyncio.create_task(sender.run())
        await reached.wait()
        await ends.way.vanish()
        # Its last words may have come through; else the stream is lost.
        with contextlib.suppress(StreamLost, TransferEnded):
            await running
            # All was said by then: it may have been done too.
            assert after is Finish
        if after is Reserve:
            ends.target.release("other", owned(ends.target, "other"), "the test is over")

    run(scenario)


def test_a_receiver_that_is_gone_already_ends_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        # In this process there is no address that nobody answers: there it has closed.
        await ends.way.receiver.close("gone")
        await ends.way.vanish()
        with pytest.raises((StreamLost, TransferEnded)):
            await ends.ready_sender().run()

    run(scenario)


@pytest.mark.parametrize("deaf", ["receiver", "sender"])
def test_when_nothing_is_heard_the_lease_frees_both_sides(run: Run, deaf: str) -> None:
    async def scenario(ends: Ends) -> None:
        channel = ends.way.channel
        sender = ends.sender()
        sender.kv_ready(0, 1, 0, 1)
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.way.channel.num_of(Ack) == 1, "a chunk has arrived")
        if deaf == "receiver":
            channel.to_receiver = lambda _: []
        else:
            channel.to_sender = lambda _: []
        with pytest.raises((LeaseExpired, TransferEnded)):
            await running
        await ends.both_idle()
        assert ends.target.num_free == len(ends.target.owners)

    run(scenario, config=replace(CONFIG, lease_s=0.4))


# The host behind one side breaks.


@pytest.mark.parametrize("broken", ["source", "target"])
def test_a_host_that_raises_ends_its_own_transfer_alone(run: Run, broken: str) -> None:
    async def scenario(ends: Ends) -> None:
        host: FakeKvHost = getattr(ends, broken)
        host.failure = RuntimeError("index out of range")
        error = HostFailed if broken == "source" else TransferEnded
        assert "index out of range" in await ended_with(ends, ends.ready_sender(), error)
        await ends.both_idle()
        host.failure = None
        await ends.ready_sender("t2").run()
        assert "t2" in ends.target.committed

    run(scenario)


def test_one_transfer_that_misbehaves_harms_no_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "RECONNECT_DELAYS_S", (0.0, 0.0))

    async def scenario(ends: Ends) -> None:
        def damage_first(message: bytes) -> list[bytes]:
            frame = decode(message)
            return [corrupt(message) if isinstance(frame, Chunk) and frame.lease_id == 1 else message]

        ends.way.channel.to_receiver = damage_first
        results = await asyncio.gather(
            *(ends.ready_sender(f"t{i}", num_tokens=5).run() for i in range(4)), return_exceptions=True
        )
        kinds = sorted(type(result).__name__ for result in results)
        how = "ChunkRejected" if ends.transport == "grpc" else "StreamLost"
        assert kinds == [how, "TransferReport", "TransferReport", "TransferReport"]
        ends.way.channel.to_receiver = unchanged

    # A machine that stands still for a moment must not end it before its stream does.
    run(scenario, config=replace(CONFIG, resume_s=10.0))


def _is_chunk(message: bytes, number: int) -> bool:
    frame = decode(message)
    return isinstance(frame, Chunk) and frame.sequence_number == number
