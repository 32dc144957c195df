"""KV that is packed on its way: what arrives is what the codec makes of it, bit for bit."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtransfer.codecs.codec import CodecId, PageShape
from kvtransfer.codecs.codecs import codec as codec_of
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import ChunkRejected, HostFailed
from kvtransfer.frames import Chunk
from kvtransfer.layout import KvLayout
from kvtransfer.wire import CHUNK_HEADER_BYTES, decode
from tests.support.kvtransfer_ends import (
    CONFIG,
    Ends,
    Scenario,
    ended_with,
    kv_of,
    owned,
    received,
    run_whole,
)
from tests.support.kvtransfer_fakes import LAYOUT as SMALL_LAYOUT

LAYOUT = replace(SMALL_LAYOUT, dtype="float16", block_size=8, head_dim=64)
NUM_TOKENS = 61
CODECS = (CodecId.FP8, CodecId.INT4_HADAMARD, CodecId.GEAR, CodecId.GEAR_L)
#: A layer of all tokens is a chunk, and one page.
PAGED = replace(CONFIG, max_chunk_bytes=64 * LAYOUT.token_bytes)

each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name.lower())
each_payload_way = pytest.mark.parametrize("way", ["queues", "grpc", "grpc_3_streams"])


def run(way: str, scenario: Scenario, *, config: KvTransferConfig = PAGED, source: KvLayout = LAYOUT) -> None:
    run_whole(way, scenario, config=config, layout=LAYOUT, source_layouts=[source])


def unpacked(codec: CodecId, kv: torch.Tensor) -> torch.Tensor:
    """What is left of this KV, layer by layer."""
    packer, shape = codec_of(codec), PageShape(1, kv.shape[2], kv.shape[3], kv.shape[4])
    layers = []
    for layer in kv.split(1):
        packed = bytearray(packer.packed_bytes(shape))
        packer.pack(layer, memoryview(packed))
        layers.append(packer.unpack(memoryview(packed), shape))
    return torch.cat(layers)


@each_codec
@each_payload_way
@pytest.mark.parametrize("target_dtype", ["float16", "float32"])
def test_what_lies_in_the_target_is_what_the_codec_leaves(
    way: str, codec: CodecId, target_dtype: str
) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=NUM_TOKENS, codec=codec)
        sent = kv_of(ends.source, owned(ends.source, "t1"), NUM_TOKENS)
        report = await sender.run()
        assert torch.equal(received(ends, NUM_TOKENS), unpacked(codec, sent).to(getattr(torch, target_dtype)))
        assert report.codec is codec
        assert report.num_chunks == LAYOUT.num_layers
        assert report.num_bytes == sent.nbytes
        assert report.num_wire_bytes < 0.7 * report.num_bytes

    run_whole(
        way,
        scenario,
        config=PAGED,
        layout=replace(LAYOUT, dtype=target_dtype),
        source_layouts=[LAYOUT],
    )


@each_codec
@each_payload_way
def test_what_is_damaged_while_packed_is_sent_again(way: str, codec: CodecId) -> None:
    async def scenario(ends: Ends) -> None:
        damaged: set[int] = set()

        def damage_each_once(message: bytes) -> list[bytes]:
            frame = decode(message)
            if not isinstance(frame, Chunk) or frame.sequence_number in damaged:
                return [message]
            damaged.add(frame.sequence_number)
            place = CHUNK_HEADER_BYTES + len(frame.payload) // 2
            return [message[:place] + bytes([message[place] ^ 2]) + message[place + 1 :]]

        ends.way.channel.to_receiver = damage_each_once
        sender = ends.ready_sender(num_tokens=NUM_TOKENS, codec=codec)
        sent = kv_of(ends.source, owned(ends.source, "t1"), NUM_TOKENS)
        report = await sender.run()
        assert report.num_resent_chunks == LAYOUT.num_layers
        assert torch.equal(received(ends, NUM_TOKENS), unpacked(codec, sent).half())
        await ends.both_idle()
        assert ends.way.receiver.counts.num_corrupt_chunks == LAYOUT.num_layers

    run(way, scenario)


@each_payload_way
def test_what_is_always_damaged_while_packed_ends_it(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        def damage(message: bytes) -> list[bytes]:
            is_chunk = isinstance(decode(message), Chunk)
            return [message[:-1] + bytes([message[-1] ^ 2])] if is_chunk else [message]

        ends.way.channel.to_receiver = damage
        sender = ends.ready_sender(num_tokens=NUM_TOKENS, codec=CodecId.GEAR)
        await ended_with(ends, sender, ChunkRejected)
        assert not ends.target.committed

    run(way, scenario)


@pytest.mark.parametrize("way", ["in_process", "shm", "nixl"])
def test_what_is_read_in_place_is_not_packed(way: str) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=NUM_TOKENS, codec=CodecId.GEAR)
        sent = kv_of(ends.source, owned(ends.source, "t1"), NUM_TOKENS)
        report = await sender.run()
        assert report.codec is CodecId.NONE
        assert torch.equal(received(ends, NUM_TOKENS), sent)

    run(way, scenario)


@each_codec
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_dtype_of_the_source_is_packed(codec: CodecId, dtype: str) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.ready_sender(num_tokens=NUM_TOKENS, codec=codec)
        sent = kv_of(ends.source, owned(ends.source, "t1"), NUM_TOKENS)
        await sender.run()
        assert torch.equal(received(ends, NUM_TOKENS), unpacked(codec, sent).half())

    layout = replace(LAYOUT, dtype=dtype)
    config = replace(PAGED, max_chunk_bytes=64 * layout.token_bytes)
    run("queues", scenario, source=layout, config=config)


@each_codec
def test_kv_that_cannot_be_packed_ends_it_with_the_reason(codec: CodecId) -> None:
    async def scenario(ends: Ends) -> None:
        sender = ends.sender(num_tokens=NUM_TOKENS, codec=codec)
        ends.source.kv_cache[1, 0, owned(ends.source, "t1")[2], 3, 1, 7] = float("nan")
        sender.kv_ready(0, LAYOUT.num_layers, 0, NUM_TOKENS)
        sender.prefill_finished((42,))
        assert "NaN" in await ended_with(ends, sender, HostFailed)
        assert not ends.target.committed

    run("queues", scenario)


@pytest.mark.parametrize("codecs", [(CodecId.FP8, CodecId.NONE), (CodecId.NONE, CodecId.FP8)])
def test_one_part_that_was_packed_makes_the_whole_lossy(codecs: tuple[CodecId, CodecId]) -> None:
    async def scenario(ends: Ends) -> None:
        said: list[bool] = []
        commit = ends.target.commit

        def noted(transfer_id: str, *more: Any) -> None:
            said.append(ends.way.receiver.is_lossy(transfer_id))
            commit(transfer_id, *more)

        ends.target.commit = noted  # type: ignore[method-assign]
        hosts = (ends.source, *ends.more_sources)
        parts = enumerate(zip(hosts, codecs, strict=True))
        senders = [
            ends.ready_sender(source=host, part=part, num_parts=2, codec=codec)
            for part, (host, codec) in parts
        ]
        await asyncio.gather(*(sender.run() for sender in senders))
        assert said == [True]
        assert not ends.way.receiver.is_lossy("t1")

    ranks = [replace(LAYOUT, head_lo=head, head_hi=head + 1) for head in range(2)]
    run_whole("queues", scenario, config=PAGED, layout=LAYOUT, source_layouts=ranks)
