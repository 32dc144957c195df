"""A stream that breaks at any message of a transfer, whichever it is: the transfer goes on, or ends with an error."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import StreamLost
from kvtransfer.frames import Ack, Attach, Chunk, Frame, Resume, Resumed
from kvtransfer.wire import decode
from tests.support.kvtransfer_ends import (
    CONFIG,
    NUM_BLOCKS,
    NUM_TOKENS,
    Ends,
    Run,
    kv_of,
    owned,
    received,
    run_whole,
    tell_all,
)
from tests.support.kvtransfer_fakes import LAYOUT
from tests.support.waiting import until

NUM_CHUNKS = NUM_BLOCKS * LAYOUT.num_layers
#: Of a transfer that nothing disturbs: each chunk and its Ack; Reserve, Granted, Finish, Commit, Verified, Committed.
MIN_MESSAGES = 2 * NUM_CHUNKS + 6
#: And Attach on three streams.
MAX_MESSAGES = MIN_MESSAGES + 3
#: Longer than any of these tests takes to open a stream.
PATIENT = replace(CONFIG, resume_s=10.0)


def on_frames(ends: Ends, do: Callable[[Frame], bool]) -> None:
    """`do` sees each frame and says whether it arrives."""

    def hook(message: bytes) -> list[bytes]:
        return [message] if do(decode(message)) else []

    ends.way.channel.to_receiver = ends.way.channel.to_sender = hook


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("number", range(MAX_MESSAGES))
def test_after_any_message_it_goes_on_and_sends_nothing_twice(run: Run, number: int, is_lost: bool) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        passed: list[Frame] = []
        #: What the receiver said that it has, and what was sent nevertheless.
        has: set[int] = set()
        sent_again: list[int] = []

        def break_at(frame: Frame) -> bool:
            is_last = len(passed) == number
            if is_last:
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
            passed.append(frame)
            if is_last and is_lost:
                return False
            if isinstance(frame, Resumed):
                has.update(range(frame.first_missing), frame.received)
            if isinstance(frame, Chunk) and frame.sequence_number in has:
                sent_again.append(frame.sequence_number)
            return True

        on_frames(ends, break_at)
        report = await sender.run()
        # Else the last of the messages were fewer, and nothing broke.
        assert len(passed) > number or len(passed) >= MIN_MESSAGES
        assert report.num_chunks == NUM_CHUNKS
        assert not sent_again
        assert torch.equal(received(ends), sent)
        assert report.num_bytes == sent.nbytes

    run(scenario, config=PATIENT)


@pytest.mark.parametrize("kind", [Resume, Resumed])
@pytest.mark.parametrize("is_lost", [False, True])
def test_the_stream_that_resumes_may_break_too(run: Run, kind: type, is_lost: bool) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        broken: set[type] = set()

        def break_once_at_each(frame: Frame) -> bool:
            is_first_chunk = isinstance(frame, Chunk) and Chunk not in broken
            if is_first_chunk or (isinstance(frame, kind) and kind not in broken):
                broken.add(type(frame))
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
                return isinstance(frame, Chunk) or not is_lost
            return True

        on_frames(ends, break_once_at_each)
        report = await sender.run()
        assert broken == {Chunk, kind}
        assert torch.equal(received(ends), sent)
        assert ends.way.channel.num_of(Resume) >= 2
        assert report.num_resumes >= 1

    run(scenario, config=PATIENT)


def test_a_stream_of_chunks_alone_may_break() -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.way.channel.num_of(Attach) == 3, "there are three streams for chunks")
        sender.kv_ready(0, 1, 0, 4)
        await until(lambda: ends.way.channel.num_of(Ack) == 1, "one has brought a chunk")
        # The first one is for control.
        ends.way.channel.streams[1].break_()
        sender.kv_ready(1, LAYOUT.num_layers, 0, 4)
        sender.kv_ready(0, LAYOUT.num_layers, 4, NUM_TOKENS)
        sender.prefill_finished((42,))
        await running
        assert torch.equal(received(ends), sent)

    run_whole("grpc_3_streams", scenario, config=PATIENT)


def test_a_chunk_that_comes_late_by_another_stream_of_before_is_not_written_twice(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender()
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        first: list[bytes] = []
        late: list[bytes] = []

        def double(message: bytes) -> list[bytes]:
            is_chunk = isinstance(decode(message), Chunk)
            if is_chunk and not first:
                first.append(message)
                late.append(message)
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
            elif is_chunk and late and ends.way.channel.num_of(Resume) > 0:
                return [late.pop(), message]
            return [message]

        ends.way.channel.to_receiver = double
        await sender.run()
        assert not late
        assert torch.equal(received(ends), sent)

    run(scenario, config=PATIENT)


def test_many_transfers_survive_one_network_that_fails(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        senders = [ends.sender(f"t{i}", num_tokens=5, num_more=1) for i in range(6)]
        running = [asyncio.create_task(sender.run()) for sender in senders]
        await until(lambda: ends.way.receiver.num_leases == 6, "each has a lease")
        await asyncio.gather(*(sender.wait_granted() for sender in senders))
        ends.way.channel.break_streams()
        for sender in senders:
            tell_all(sender, 5)
        reports = await asyncio.gather(*running)
        assert [report.num_resumes for report in reports] == [1] * 6
        assert len(ends.target.committed) == 6

    run(scenario, config=PATIENT)


def test_what_stays_broken_has_the_same_end_on_both_sides(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        sender.kv_ready(0, 1, 0, 4)
        running = asyncio.create_task(sender.run())
        await until(lambda: ends.way.channel.num_of(Ack) == 1, "a chunk has arrived")
        on_frames(ends, lambda frame: not isinstance(frame, Resume))
        ends.way.channel.break_streams()
        with pytest.raises(StreamLost, match="the stream broke while receiving"):
            await running
        await until(lambda: bool(ends.target.releases), "the receiver gives its blocks back")
        for host in (ends.source, ends.target):
            [(transfer_id, _, reason)] = host.releases
            assert transfer_id == "t1"
            assert "the stream broke while receiving" in reason
        assert ends.way.receiver.num_leases == 0

    run(scenario, config=replace(CONFIG, resume_s=0.2))


@pytest.mark.parametrize("number", range(0, NUM_CHUNKS, 4))
def test_the_parts_of_one_transfer_resume_each_by_itself(run: Run, number: int) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        parts = [ends.sender(source=host, part=part, num_parts=2) for part, host in enumerate(hosts)]
        sent = torch.cat([kv_of(host, owned(host, "t1")) for host in hosts], dim=3)
        is_broken = False

        def break_once(frame: Frame) -> bool:
            nonlocal is_broken
            if not is_broken and isinstance(frame, Chunk) and frame.sequence_number == number:
                is_broken = True
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
            return True

        # A part whose lease is not known yet would end.
        running = [asyncio.create_task(part.run()) for part in parts]
        await asyncio.gather(*(part.wait_granted() for part in parts))
        on_frames(ends, break_once)
        for part in parts:
            tell_all(part)
        reports = await asyncio.gather(*running)
        assert is_broken
        assert max(report.num_resumes for report in reports) >= 1
        assert torch.equal(received(ends), sent)
        ends.check_all_back()

    halves = [replace(LAYOUT, head_lo=lo, head_hi=lo + 1) for lo in range(2)]
    small = replace(PATIENT, max_chunk_bytes=CONFIG.max_chunk_bytes // 2)
    run(scenario, config=small, source_layouts=halves)


@pytest.mark.parametrize("way", ["queues", "grpc", "grpc_3_streams"])
@pytest.mark.parametrize("number", range(0, NUM_CHUNKS, 2))
def test_packed_chunks_go_on_where_they_were(way: str, number: int) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(codec=CodecId.FP8)
        sent = kv_of(ends.source, owned(ends.source, "t1"))
        is_broken = False

        def break_once(frame: Frame) -> bool:
            nonlocal is_broken
            if not is_broken and isinstance(frame, Chunk) and frame.sequence_number == number:
                is_broken = True
                # The next chunk is being packed, the one before unpacked.
                asyncio.get_running_loop().call_soon(ends.way.channel.break_streams)
            return True

        on_frames(ends, break_once)
        report = await sender.run()
        assert (report.num_resumes >= 1, report.num_chunks) == (True, NUM_CHUNKS)
        torch.testing.assert_close(received(ends), sent, rtol=0.1, atol=0.05)

    wide = replace(LAYOUT, head_dim=8)
    config = replace(PATIENT, max_chunk_bytes=wide.token_bytes * wide.block_size)
    run_whole(way, scenario, config=config, layout=wide, source_layouts=[wide])
