"""Workers whose caches differ: in block size, in dtype, in the KV heads of their ranks. The same KV arrives."""

import asyncio
from dataclasses import replace
from itertools import product

import pytest
import torch

from kvtransfer.client import KvSender
from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import (
    DeadlineExceeded,
    TransferAborted,
    TransferEnded,
    TransferRefused,
)
from kvtransfer.frames import Chunk, Reserve, Verified
from kvtransfer.layout import DTYPE_BITS, KvLayout
from kvtransfer.wire import decode
from phasewise_kernels.block_copy.reference import convert
from tests.support.kv_dtypes import PLAIN_DTYPES
from tests.support.kvtransfer_ends import (
    CONFIG,
    NUM_TOKENS,
    TOKEN_IDS,
    Ends,
    Run,
    ends_between,
    kv_of,
    owned,
    received,
    run_whole,
    tell_all,
)
from tests.support.kvtransfer_fakes import LAYOUT
from tests.support.waiting import until

MAX_FP8 = 448.0
#: Four KV heads, which ranks share.
WIDE = replace(LAYOUT, num_kv_heads=4)
#: KV with its payload over a network, and pulled from memory.
LAYOUT_32 = replace(LAYOUT, head_dim=32)
TWO_WAYS = ("queues", "shm")


def rank(layout: KvLayout, lo: int, hi: int) -> KvLayout:
    """Of the rank that holds these heads."""
    return replace(layout, head_lo=lo, head_hi=hi)


def sent_kv(ends: Ends, num_tokens: int = NUM_TOKENS, owner: str = "t1") -> torch.Tensor:
    """All heads of what the ranks of the sending worker hold: [layer, K/V, token, head, head_dim]."""
    hosts = (ends.source, *ends.more_sources)
    return torch.cat([kv_of(host, owned(host, owner), num_tokens) for host in hosts], dim=3)


def converted(kv: torch.Tensor, dtype: str) -> torch.Tensor:
    """As it is to arrive, in fp32 to be compared."""
    to = getattr(torch, dtype)
    if to is torch.float8_e4m3fn and kv.dtype is not to:
        kv = kv.float().clamp(-MAX_FP8, MAX_FP8).to(to)
    return kv.to(to).float()


def check_received(ends: Ends, sent: torch.Tensor, num_tokens: int = NUM_TOKENS) -> None:
    got = received(ends, num_tokens)
    assert torch.equal(got.float(), converted(sent, ends.target.layout.dtype))


@pytest.mark.parametrize(("source_size", "target_size"), [(4, 6), (6, 4), (16, 64), (64, 16), (1, 5)])
@pytest.mark.parametrize("num_tokens", [1, 23, 64])
def test_block_sizes_may_differ(run: Run, source_size: int, target_size: int, num_tokens: int) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=num_tokens)
        sent = sent_kv(ends, num_tokens)
        await sender.run()
        check_received(ends, sent, num_tokens)

    run(
        scenario,
        source_layouts=[replace(LAYOUT, block_size=source_size)],
        layout=replace(LAYOUT, block_size=target_size),
        num_target_blocks=80,
    )


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize(("source_dtype", "target_dtype"), [*product(PLAIN_DTYPES, PLAIN_DTYPES)])
def test_dtypes_may_differ(way: str, source_dtype: str, target_dtype: str) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender()
        block_ids = owned(ends.source, "t1")
        # Beyond what the narrower ones hold exactly, and for fp8 at all.
        wide = torch.randn(ends.source.kv_cache[:, :, block_ids].shape) * 300
        ends.source.kv_cache[:, :, block_ids] = converted(wide, source_dtype).to(ends.source.kv_cache.dtype)
        sent = sent_kv(ends)
        tell_all(sender)
        report = await sender.run()
        assert report.num_bytes == sent.numel() * DTYPE_BITS[source_dtype] // 8
        check_received(ends, sent)

    run_whole(
        way,
        scenario,
        source_layouts=[replace(LAYOUT, dtype=source_dtype, block_size=4)],
        layout=replace(LAYOUT, dtype=target_dtype, block_size=6),
    )


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize(
    ("source_dtype", "target_dtype", "codec"),
    [
        ("int4", "int4", CodecId.NONE),
        ("int4", "bfloat16", CodecId.NONE),
        ("bfloat16", "int4", CodecId.NONE),
        ("bfloat16", "int4", CodecId.FP8),
        ("float8_e4m3fn", "int4", CodecId.NONE),
    ],
)
def test_rows_in_four_bits_are_packed_and_unpacked_where_they_arrive(
    way: str, source_dtype: str, target_dtype: str, codec: CodecId
) -> None:
    """What a codec packed is packed again."""

    async def scenario(ends: Ends) -> None:
        sender = ends.sender(codec=codec)
        block_ids = owned(ends.source, "t1")
        wide = torch.randn(*ends.source.kv_cache[:, :, block_ids].shape[:-1], LAYOUT_32.head_dim)
        ends.source.kv_cache[:, :, block_ids] = convert(wide, ends.source.kv_cache.dtype)
        sent = sent_kv(ends)
        tell_all(sender)
        report = await sender.run()
        got = received(ends)
        if report.codec is CodecId.NONE:
            expected = convert(sent, got.dtype)
            assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        else:
            values, wanted = (convert(one, torch.float32) for one in (got, sent))
            assert (values - wanted).norm() < 0.2 * wanted.norm()

    run_whole(
        way,
        scenario,
        source_layouts=[replace(LAYOUT_32, dtype=source_dtype, block_size=4)],
        layout=replace(LAYOUT_32, dtype=target_dtype, block_size=6),
    )


# Ranks.


def test_two_ranks_send_to_one(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        senders = ends.parts()
        sent = sent_kv(ends)
        reports = await asyncio.gather(*(sender.run() for sender in senders))
        check_received(ends, sent)
        assert [report.num_bytes for report in reports] == [sent.nbytes // 2] * 2
        assert ends.target.committed["t1"][1] == TOKEN_IDS
        ends.check_all_back()

    run(scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_of_different_widths_blocks_and_dtypes_in_any_order(way: str, order: tuple[int, ...]) -> None:
    async def scenario(ends: Ends) -> None:
        senders = ends.parts()
        sent = sent_kv(ends)
        async with asyncio.TaskGroup() as group:
            for number, part in enumerate(order):
                group.create_task(senders[part].run())
                await until(
                    lambda number=number: ends.way.channel.num_of(Reserve) == number + 1,  # type: ignore[misc]
                    "this part has asked",
                )
        check_received(ends, sent)

    run_whole(
        way,
        scenario,
        source_layouts=[rank(WIDE, 0, 1), rank(WIDE, 1, 2), rank(WIDE, 2, 4)],
        layout=replace(WIDE, block_size=6, dtype="bfloat16"),
    )


def test_one_rank_sends_to_two(run: Run, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["run"]

    async def scenario(ends: Ends) -> None:
        others = ends_between(kind, [ends.source], CONFIG, rank(WIDE, 2, 4), 16)
        async with others as second:
            senders = [ends.ready_sender("t1"), second.ready_sender("t2")]
            # The transfers are of one sequence: the same KV in both.
            ends.source.kv_cache[:, :, owned(ends.source, "t2")] = ends.source.kv_cache[
                :, :, owned(ends.source, "t1")
            ]
            sent = sent_kv(ends)
            reports = await asyncio.gather(*(sender.run() for sender in senders))
            assert torch.equal(received(ends), sent[:, :, :, :2])
            assert torch.equal(received(second, transfer_id="t2"), sent[:, :, :, 2:])
            assert [report.num_bytes for report in reports] == [sent.nbytes // 2] * 2

    run(scenario, source_layouts=[WIDE], layout=rank(WIDE, 0, 2))


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("target_heads", [(0, 2), (2, 4)])
def test_four_ranks_send_to_two(way: str, target_heads: tuple[int, int]) -> None:
    async def scenario(ends: Ends) -> None:
        senders = ends.parts()
        sent = sent_kv(ends)
        await asyncio.gather(*(sender.run() for sender in senders))
        assert torch.equal(received(ends), sent)

    lo = target_heads[0]
    run_whole(
        way,
        scenario,
        # Of the four, the two whose heads this rank has.
        source_layouts=[rank(WIDE, lo, lo + 1), rank(WIDE, lo + 1, lo + 2)],
        layout=rank(WIDE, *target_heads),
    )


@pytest.mark.parametrize("way", TWO_WAYS)
def test_four_ranks_send_to_two_all_at_once(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        others = ends_between(way, hosts[2:], CONFIG, rank(WIDE, 2, 4), 16)
        async with others as second:
            first = replace(ends, more_sources=hosts[1:2])
            # Each receiving rank has a transfer of its own, of two parts.
            senders = [*first.parts("t1"), *second.parts("t2")]
            sent = [sent_kv(first), sent_kv(second, owner="t2")]
            await asyncio.gather(*(sender.run() for sender in senders))
            assert torch.equal(received(first), sent[0])
            assert torch.equal(received(second, transfer_id="t2"), sent[1])
            assert first.target.committed["t1"][1] == second.target.committed["t2"][1] == TOKEN_IDS
            for one in (first, second):
                one.check_all_back()
                assert len(one.way.receiver._join) == 0

    layouts = [rank(WIDE, head, head + 1) for head in range(4)]
    run_whole(way, scenario, source_layouts=layouts, layout=rank(WIDE, 0, 2))


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_that_never_comes_ends_the_others_in_time(way: str, part: int) -> None:
    async def scenario(ends: Ends) -> None:
        senders = ends.parts(timeout_s=0.3)
        senders.pop(1 - part).abort("its rank is gone")
        # Which side's clock is first is open.
        with pytest.raises((DeadlineExceeded, TransferRefused, TransferEnded)):
            await senders[0].run()
        ends.check_all_back()
        await ends.both_idle()
        # Nothing was asked of the host before all were there.
        assert ends.target.releases == []
        assert len(ends.way.receiver._join) == 0

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize(
    "heads", [((0, 2), (1, 4)), ((0, 2), (3, 4)), ((0, 2), (0, 2)), ((1, 2), (2, 4)), ((0, 4), (0, 4))]
)
def test_parts_that_overlap_or_leave_a_gap_are_refused(
    way: str, heads: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    async def scenario(ends: Ends) -> None:
        results = await asyncio.gather(*(one.run() for one in ends.parts()), return_exceptions=True)
        assert all(isinstance(result, TransferRefused) for result in results), results
        assert all("the parts bring KV heads" in str(result) for result in results)
        assert not any(result.retryable for result in results)  # type: ignore[union-attr]
        assert ends.target.num_writes == 0
        ends.check_all_back()

    run_whole(way, scenario, source_layouts=[rank(WIDE, *one) for one in heads], layout=WIDE)


def test_one_part_that_fails_ends_all_and_the_blocks_come_back_once(run: Run) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        senders = [ends.sender(source=host, part=part, num_parts=3) for part, host in enumerate(hosts)]
        running = [asyncio.create_task(sender.run()) for sender in senders]
        for sender in senders:
            sender.kv_ready(0, 1, 0, 4)
        await until(lambda: ends.target.num_writes >= 3, "each part has brought something")
        senders[1].abort("its rank has failed")
        results = await asyncio.gather(*running, return_exceptions=True)
        assert [type(result) for result in results] == [TransferEnded, TransferAborted, TransferEnded]
        assert "part 1 of 3 failed" in str(results[0])
        assert "its rank has failed" in str(results[0])
        await ends.both_idle()
        assert len(ends.target.releases) == 1
        ends.check_all_back()

    run(
        scenario,
        source_layouts=[rank(WIDE, 0, 1), rank(WIDE, 1, 2), rank(WIDE, 2, 4)],
        layout=WIDE,
    )


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_part_that_fails_while_blocks_are_waited_for_ends_all(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        held = ends.target.take("other", LAYOUT.block_size * 16)
        senders = ends.parts()
        running = [asyncio.create_task(sender.run()) for sender in senders]
        await until(lambda: ends.target.num_waiting == 1, "all parts have come, and wait for blocks")
        senders[0].abort("its rank has failed")
        results = await asyncio.gather(*running, return_exceptions=True)
        assert [type(result) for result in results] == [TransferAborted, TransferEnded]
        await until(lambda: ends.target.num_waiting == 0, "the reservation is withdrawn")
        ends.target.release("other", held, "the test is over")
        await ends.both_idle()
        assert len(ends.way.receiver._join) == 0

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


def test_a_part_that_asks_again_after_the_others_failed_with_it_is_told_at_once() -> None:
    async def scenario(ends: Ends) -> None:
        held = ends.target.take("other", LAYOUT.block_size * 16)
        running = [asyncio.create_task(sender.run()) for sender in ends.parts()]
        await until(lambda: ends.target.num_waiting == 1, "all parts have come, and wait for blocks")
        ends.way.channel.streams[0].break_()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert [type(result) for result in results] == [TransferRefused, TransferEnded]
        assert "part 0 of 2 failed" in str(results[0])
        assert all(result.retryable for result in results)  # type: ignore[union-attr]
        ends.target.release("other", held, "the test is over")
        await ends.both_idle()
        assert len(ends.way.receiver._join) == 0

    run_whole("queues", scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_part_that_is_whole_waits_for_the_others_and_fails_with_them(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        first = ends.ready_sender(source=hosts[0], num_parts=2)
        second = ends.sender(source=hosts[1], part=1, num_parts=2)
        running = [asyncio.create_task(sender.run()) for sender in (first, second)]
        await until(lambda: ends.way.channel.num_of(Verified) == 1, "the first is whole")
        assert not running[0].done()
        second.abort("its rank has failed")
        results = await asyncio.gather(*running, return_exceptions=True)
        assert [type(result) for result in results] == [TransferEnded, TransferAborted]
        assert "part 1 of 2 failed" in str(results[0])
        await ends.both_idle()
        assert "t1" not in ends.target.committed
        assert len(ends.target.releases) == 1
        # The same transfer may be tried again.
        await asyncio.gather(*(sender.run() for sender in ends.parts()))
        assert "t1" in ends.target.committed

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_parts_that_are_of_different_transfers_are_refused(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        senders = [
            ends.ready_sender(source=host, part=part, num_parts=2, num_tokens=5 + part)
            for part, host in enumerate(hosts)
        ]
        # Both at once, and not when their time is over.
        results = await asyncio.gather(*(one.run() for one in senders), return_exceptions=True)
        assert all("do not agree" in str(result) for result in results), results
        assert all(isinstance(result, TransferRefused) for result in results), results
        assert not any(result.retryable for result in results)  # type: ignore[union-attr]
        ends.check_all_back()

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_part_that_is_refused_ends_the_others_whether_they_have_come_or_not(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)

        def of(part: int, incarnation: int | None = None) -> KvSender:
            return ends.ready_sender(
                source=hosts[part], part=part, num_parts=3, num_tokens=5, incarnation=incarnation
            )

        first = asyncio.create_task(of(0).run())
        await until(lambda: len(ends.way.receiver._join) == 1, "the first waits for the others")
        for late in (of(1, incarnation=5), of(2)):
            with pytest.raises(TransferRefused, match="this is incarnation 6, not 5"):
                await late.run()
        with pytest.raises(TransferRefused, match=r"part 1 of 3 failed: .* this is incarnation 6, not 5"):
            await first
        await ends.both_idle()
        assert len(ends.way.receiver._join) == 0
        assert ends.target.releases == []

    layouts = [rank(WIDE, 0, 1), rank(WIDE, 1, 2), rank(WIDE, 2, 4)]
    run_whole(way, scenario, source_layouts=layouts, layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_parts_that_end_in_other_tokens_are_not_committed(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        senders = [ends.sender(source=host, part=part, num_parts=2) for part, host in enumerate(hosts)]
        for number, sender in enumerate(senders):
            sender.kv_ready(0, LAYOUT.num_layers, 0, NUM_TOKENS)
            sender.prefill_finished((number,))
        results = await asyncio.gather(*(one.run() for one in senders), return_exceptions=True)
        assert all(isinstance(result, TransferEnded) for result in results), results
        assert all("it ends in other tokens than part" in str(result) for result in results)
        await ends.both_idle()
        assert not ends.target.committed
        assert len(ends.target.releases) == 1

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_part_that_is_whole_commits_though_its_stream_broke_meanwhile(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        hosts = (ends.source, *ends.more_sources)
        first = ends.ready_sender(source=hosts[0], num_parts=2)
        second = ends.sender(source=hosts[1], part=1, num_parts=2)
        sent = sent_kv(ends)
        running = [asyncio.create_task(sender.run()) for sender in (first, second)]
        await until(lambda: ends.way.channel.num_of(Verified) == 1, "the first is whole")
        ends.way.channel.break_streams()
        tell_all(second)
        await asyncio.gather(*running)
        check_received(ends, sent)

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2), rank(WIDE, 2, 4)], layout=WIDE)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_chunk_of_heads_that_were_not_asked_for_is_never_written(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        seen: list[tuple[int, int]] = []

        def watch(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Chunk):
                seen.append(frame.heads)
            return [message]

        ends.way.channel.to_receiver = watch
        await ends.ready_sender().run()
        assert set(seen) == {(1, 3)}

    run_whole(way, scenario, source_layouts=[WIDE], layout=rank(WIDE, 1, 3))


# What cannot be reconciled.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_digest": "d2"}, "model_digest is 'd1' at the sender and 'd2' at the receiver"),
        ({"num_layers": 4}, "num_layers is 3 at the sender and 4 at the receiver"),
        ({"num_kv_heads": 4}, "num_kv_heads is 2 at the sender and 4 at the receiver"),
        ({"position_encoding": "rope:theta=500000"}, "position_encoding is 'rope:theta=10000' at the sender"),
    ],
)
def test_another_model_is_refused_with_the_reason(run: Run, change: dict[str, object], reason: str) -> None:
    async def scenario(ends: Ends) -> None:
        with pytest.raises(TransferRefused) as caught:
            await ends.ready_sender().run()
        assert reason in str(caught.value)
        assert not caught.value.retryable
        assert ends.target.num_writes == 0
        ends.check_all_back()

    run(scenario, layout=replace(LAYOUT, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_one_rank_alone_cannot_fill_a_whole_cache(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        with pytest.raises(TransferRefused, match=r"the sender has KV heads \[0, 2\] of \[0, 4\]"):
            await ends.ready_sender().run()

    run_whole(way, scenario, source_layouts=[rank(WIDE, 0, 2)], layout=WIDE)
