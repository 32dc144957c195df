"""Streams that break on the way: the transfer goes on at the first missing chunk, on every way."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.client import KvSender
from kvtransfer.errors import LeaseExpired, StreamLost, TransferEnded
from kvtransfer.frames import Chunk, Commit, Committed, Finish, Frame, Granted, Reserve, Resume, Resumed
from kvtransfer.sender import RECONNECT_DELAYS_S
from kvtransfer.session import StreamBroke
from kvtransfer.wire import decode
from tests.support.kvtransfer_ends import (
    CONFIG,
    DIGEST,
    NUM_BLOCKS,
    NUM_TOKENS,
    TOKEN_IDS,
    Ends,
    Run,
    ended_with,
)
from tests.support.kvtransfer_fakes import LAYOUT
from tests.support.waiting import until

NUM_CHUNKS = NUM_BLOCKS * LAYOUT.num_layers


def break_after(ends: Ends, is_it: Callable[[Frame], bool], *, times: int = 1) -> None:
    """When such a frame has passed, in either direction, the streams break."""
    left = times

    def hook(message: bytes) -> list[bytes]:
        nonlocal left
        if left > 0 and is_it(decode(message)):
            left -= 1
            asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
        return [message]

    ends.way.channel.to_receiver = ends.way.channel.to_sender = hook


async def committed_whole(ends: Ends) -> None:
    """One transfer of NUM_TOKENS tokens, through whatever was prepared."""
    sender = ends.ready_sender()
    block_ids = [i for i, owner in reversed(list(enumerate(ends.source.owners))) if owner == "t1"]
    sent = ends.source.content(block_ids, NUM_TOKENS).copy()
    report = await sender.run()
    received_ids, token_ids = ends.target.committed["t1"]
    assert (token_ids, ends.target.digests["t1"]) == (TOKEN_IDS, DIGEST)
    assert np.array_equal(ends.target.content(received_ids, NUM_TOKENS), sent)
    assert report.num_resumes == ends.way.receiver.counts.num_resumed


@pytest.mark.parametrize("number", range(0, NUM_CHUNKS, 2))
def test_after_any_chunk_it_goes_on_where_it_was(run: Run, number: int) -> None:
    async def scenario(ends: Ends) -> None:
        break_after(ends, lambda frame: isinstance(frame, Chunk) and frame.sequence_number == number)
        await committed_whole(ends)
        assert ends.way.channel.num_of(Resume) >= 1
        # What had arrived is not sent again: at most what was in flight.
        assert ends.way.channel.num_of(Chunk) <= NUM_CHUNKS + 2 * CONFIG.credits

    run(scenario)


@pytest.mark.parametrize("kind", [Finish, Commit])
def test_the_end_is_said_again(run: Run, kind: type) -> None:
    async def scenario(ends: Ends) -> None:
        break_after(ends, lambda frame: isinstance(frame, kind))
        await committed_whole(ends)

    run(scenario)


def test_a_commit_whose_answer_was_lost_is_known(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        lost: list[bytes] = []

        def lose_first_answer(message: bytes) -> list[bytes]:
            if isinstance(decode(message), Committed) and not lost:
                lost.append(message)
                ends.way.channel.break_streams()
                return []
            return [message]

        ends.way.channel.to_sender = lose_first_answer
        await committed_whole(ends)
        assert lost
        assert ends.way.channel.num_of(Resume) >= 1

    run(scenario)


def test_it_may_break_again_and_again(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        break_after(ends, lambda frame: isinstance(frame, Chunk), times=4)
        await committed_whole(ends)

    run(scenario, config=replace(CONFIG, resume_s=5.0))


def test_while_it_is_broken_prefill_goes_on(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        running = asyncio.create_task(sender.run())
        sender.kv_ready(0, 1, 0, 4)
        await until(lambda: ends.target.num_writes > 0, "a chunk has arrived")
        ends.way.channel.break_streams()
        tell_rest(sender)
        report = await running
        assert report.num_resumes == 1

    run(scenario)


def test_what_stays_broken_ends_on_both_sides(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        running = asyncio.create_task(sender.run())
        sender.kv_ready(0, 1, 0, 4)
        await until(lambda: ends.target.num_writes > 0, "a chunk has arrived")

        def nothing_passes(message: bytes) -> list[bytes]:
            return [] if isinstance(decode(message), (Resume, Resumed)) else [message]

        ends.way.channel.to_receiver = nothing_passes
        ends.way.channel.break_streams()
        with pytest.raises((StreamLost, LeaseExpired)):
            await running
        assert ends.source.num_free == len(ends.source.owners)
        await until(
            lambda: ends.target.num_free == len(ends.target.owners), "the receiver has given its blocks back"
        )

    run(scenario, config=replace(CONFIG, resume_s=0.3))


def test_without_a_time_to_resume_it_ends_at_once(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        break_after(ends, lambda frame: isinstance(frame, Chunk))
        await ended_with(ends, ends.ready_sender(), StreamLost)
        assert ends.way.channel.num_of(Resume) == 0

    run(scenario, config=replace(CONFIG, resume_s=0.0))


def test_before_there_is_a_lease_it_asks_again(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        held = ends.target.take("other", LAYOUT.block_size * 16)
        running = asyncio.create_task(ends.ready_sender().run())
        await until(lambda: ends.target.num_waiting == 1, "it waits for blocks")
        ends.way.channel.break_streams()
        await until(
            lambda: ends.way.channel.num_of(Reserve) == 2 and ends.target.num_waiting == 1, "it waits again"
        )
        ends.target.release("other", held, "they are free now")
        report = await running
        assert report.num_resumes == 0

    run(scenario)


def test_a_grant_that_was_lost_is_asked_for_again_and_no_block_is_taken_twice(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        num_lost = 0

        def lose_grant(message: bytes) -> list[bytes]:
            nonlocal num_lost
            if isinstance(decode(message), Granted) and num_lost < 2:
                num_lost += 1
                ends.way.channel.break_streams()
                return []
            return [message]

        ends.way.channel.to_sender = lose_grant
        num_free = ends.target.num_free
        await committed_whole(ends)
        assert ends.way.channel.num_of(Reserve) == 3
        assert num_free - ends.target.num_free == len(ends.target.committed["t1"][0])
        assert ends.target.releases == []

    run(scenario)


def test_who_never_answers_is_asked_a_few_times(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        def never(message: bytes) -> list[bytes]:
            if isinstance(decode(message), Reserve):
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
            return [message]

        ends.way.channel.to_receiver = never
        await ended_with(ends, ends.ready_sender(), StreamLost)
        assert ends.way.channel.num_of(Reserve) == len(RECONNECT_DELAYS_S)
        await until(
            lambda: ends.target.num_free == len(ends.target.owners), "the receiver has given its blocks back"
        )

    run(scenario)


def test_a_receiver_that_started_anew_knows_nothing_of_it(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        def of_another_life(message: bytes) -> list[bytes]:
            if isinstance(decode(message), Resume):
                ends.way.receiver.abort("t1", "its process is gone")
                ends.target.incarnation += 1
            return [message]

        break_after(ends, lambda frame: isinstance(frame, Chunk))
        ends.way.channel.to_receiver, first = of_another_life, ends.way.channel.to_receiver

        def both(message: bytes) -> list[bytes]:
            first(message)
            return of_another_life(message)

        ends.way.channel.to_receiver = both
        message = await ended_with(ends, ends.ready_sender(), TransferEnded)
        assert "is not known here any more" in message
        assert "t1" not in ends.target.committed

    run(scenario)


def test_the_sender_knows_first_and_takes_over(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        running = asyncio.create_task(sender.run())
        sender.kv_ready(0, 1, 0, 4)
        await until(lambda: ends.target.num_writes > 0, "a chunk has arrived")
        # The receiver's end of the first stream hears nothing of it.
        sender._session.post(StreamBroke("so the sender thinks"))
        tell_rest(sender)
        report = await running
        assert report.num_resumes == 1

    run(scenario)


def tell_rest(sender: KvSender) -> None:
    """All that `kv_ready(0, 1, 0, 4)` has left."""
    sender.kv_ready(1, LAYOUT.num_layers, 0, 4)
    sender.kv_ready(0, LAYOUT.num_layers, 4, NUM_TOKENS)
    sender.prefill_finished(TOKEN_IDS)
