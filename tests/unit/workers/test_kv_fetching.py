"""Who is asked for a prefix, for how long, and what is counted."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest
import torch

from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import LATE_S, PeerCounts
from kvtransfer.errors import DigestMismatch
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.transports.choice import TransportOpener
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from tests.support.waiting import until
from workers import kv_fetching
from workers.api import PrefixPeer
from workers.engine.messages import FetchPrefix, Message, PrefixFetched
from workers.kv_channels import PeerChannels
from workers.kv_fetching import KvFetching
from workers.kv_host import EngineKvHost

LAYOUT = KvLayout(
    "d",
    "float32",
    block_size=4,
    num_layers=2,
    num_kv_heads=1,
    head_dim=2,
    position_encoding="",
    weight_dtype="float32",
)
HASHES = tuple(bytes([i]) * 16 for i in range(10))


class Peer(pb_grpc.WorkerServiceServicer):
    """Has so many of any blocks. Or it never answers."""

    def __init__(
        self,
        num_blocks: int,
        *,
        link_bytes_per_s: float = 0.0,
        is_silent: bool = False,
        kv_dtype: str = "float32",
        weight_dtype: str = "float32",
    ) -> None:
        self.num_blocks = num_blocks
        self.kv_dtype = kv_dtype
        self.weight_dtype = weight_dtype
        self.link_bytes_per_s = link_bytes_per_s
        self.is_silent = is_silent
        self.asked: list[pb.FindPrefixRequest] = []
        self.was_given_up = asyncio.Event()
        self.address = ""

    async def FindPrefix(self, request: pb.FindPrefixRequest, _context: Any) -> pb.FindPrefixResponse:  # noqa: N802
        self.asked.append(request)
        if self.is_silent:
            try:
                await asyncio.Event().wait()
            finally:
                self.was_given_up.set()
        return pb.FindPrefixResponse(
            num_blocks=self.num_blocks,
            link_bytes_per_s=self.link_bytes_per_s,
            kv_dtype=self.kv_dtype,
            weight_dtype=self.weight_dtype,
        )


class Fetching:
    """A KvFetching whose fetches are only noted."""

    def __init__(self) -> None:
        self.posted: list[Message] = []
        self.fetched: list[dict[str, Any]] = []
        #: What a fetch brings, or raises.
        self.result: tuple[int, str, str] | Exception = (40, "grpc", "")
        self.rates = PeerCounts()
        pool = HostPool(torch.zeros(2, 2, 6, 4, 1, 2), LAYOUT)
        config = KvTransferConfig()
        host = EngineKvHost(pool, 3, self.posted.append, config)
        self.channels = PeerChannels(4)
        self.fetching = KvFetching(
            host,
            self.channels,
            self.rates,
            TransportOpener(config.transport),
            self.posted.append,
            config,
            address="me:1",
        )

    async def fetch(
        self, _host: object, _channel: object, _pools: object, **what: Any
    ) -> tuple[int, str, str]:
        self.fetched.append(what)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def ask(self, peers: Sequence[Peer], *, prefill_tokens_per_s: float = 1.0) -> int:
        """Tokens that came."""
        sources = tuple(PrefixPeer(peer.address, 1) for peer in peers)
        self.posted.clear()
        self.fetching.start(FetchPrefix("t", sources, HASHES, prefill_tokens_per_s, 60.0))
        await until(lambda: bool(self.posted), "the end of the fetch")
        [ended] = self.posted
        assert isinstance(ended, PrefixFetched)
        return ended.num_tokens


def run(
    monkeypatch: pytest.MonkeyPatch, peers: Sequence[Peer], scenario: Callable[[Fetching], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            for peer in peers:
                peer.was_given_up = asyncio.Event()
                server = grpc.aio.server()
                pb_grpc.add_WorkerServiceServicer_to_server(peer, server)
                peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
                await server.start()
                stack.push_async_callback(server.stop, None)
            fetching = Fetching()
            monkeypatch.setattr(kv_fetching, "fetch", fetching.fetch)
            await scenario(fetching)
            await fetching.fetching.close("the test has ended")
            await fetching.channels.close()

    asyncio.run(main())


def test_all_are_asked_and_one_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    little, much, nothing = peers = [Peer(3), Peer(10), Peer(0)]

    async def scenario(it: Fetching) -> None:
        assert await it.ask(peers) == 40
        assert [len(peer.asked) for peer in peers] == [1, 1, 1]
        assert tuple(nothing.asked[0].block_hashes) == HASHES
        assert little.asked[0].address == "me:1"
        [fetched] = it.fetched
        assert fetched["block_hashes"] == HASHES
        counts = it.fetching.counts
        assert (counts.num_asked, counts.num_fetched, counts.num_tokens, counts.num_refused) == (1, 1, 40, 0)

    run(monkeypatch, peers, scenario)
    assert much.num_blocks == 10


@pytest.mark.parametrize(
    "near",
    [
        {"weight_dtype": "fp8"},
        {"kv_dtype": "float8_e4m3fn"},
        {"kv_dtype": "of a later version"},
        {"kv_dtype": ""},
    ],
)
def test_one_whose_kv_is_not_what_is_computed_here_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, near: dict[str, str]
) -> None:
    more, exact = peers = [Peer(10, **near), Peer(5)]

    async def scenario(it: Fetching) -> None:
        assert await it.ask([more]) == 0
        assert it.fetched == []
        assert await it.ask(peers) == 40
        [fetched] = it.fetched
        assert fetched["min_tokens"] <= 5 * LAYOUT.block_size

    run(monkeypatch, peers, scenario)
    assert len(exact.asked) == 1


def test_one_that_does_not_answer_is_given_up_and_another_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, has = peers = [Peer(10, is_silent=True), Peer(5)]

    async def scenario(it: Fetching) -> None:
        assert await it.ask(peers) == 40
        assert len(it.fetched) == 1
        await silent.was_given_up.wait()

    run(monkeypatch, peers, scenario)
    assert len(has.asked) == 1


def test_what_its_sender_knows_of_the_way_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 tokens of 32 bytes: 40 s to compute, 51 s by the way.
    slow = Peer(10, link_bytes_per_s=25.0)

    async def scenario(it: Fetching) -> None:
        assert await it.ask([slow]) == 0
        assert it.fetched == []
        counts = it.fetching.counts
        assert (counts.num_asked, counts.num_fetched, counts.num_refused) == (1, 0, 1)

    run(monkeypatch, [slow], scenario)


def test_nobody_is_asked_where_computing_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(10)

    async def scenario(it: Fetching) -> None:
        assert await it.ask([peer], prefill_tokens_per_s=1e7) == 0
        assert (it.fetching.counts.num_asked, it.fetching.counts.num_refused) == (0, 1)

    run(monkeypatch, [peer], scenario)
    assert peer.asked == []


def test_what_nobody_has_was_asked_for_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(0)

    async def scenario(it: Fetching) -> None:
        assert await it.ask([peer]) == 0
        assert (it.fetching.counts.num_asked, it.fetching.counts.num_refused) == (1, 0)

    run(monkeypatch, [peer], scenario)


def test_a_wrong_digest_is_told_and_the_prompt_computed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer(10)

    async def scenario(it: Fetching) -> None:
        it.result = DigestMismatch("t", 2)
        assert await it.ask([peer]) == 0
        assert it.fetching.counts.num_fetched == 0

    run(monkeypatch, [peer], scenario)
    [said] = [one for one in caplog.records if one.name == "workers.kv_fetching"]
    assert said.levelname == "WARNING"


def test_a_fetch_that_comes_too_late_speaks_against_the_next_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = Peer(10, link_bytes_per_s=1e9)

    async def scenario(it: Fetching) -> None:
        now_s = asyncio.get_running_loop().time
        it.result = TimeoutError()
        assert await it.ask([peer]) == 0
        assert it.rates.fetch_bound(peer.address, now_s()) < math.inf
        # 40 tokens of 32 bytes in half of the 40 s in which they are computed: the next may take all of them.
        it.rates.note_late(peer.address, num_bytes=40 * 32, elapsed_s=20.0, now_s=now_s())
        it.result = (40, "grpc", "")
        assert await it.ask([peer]) == 0
        assert len(it.fetched) == 1
        assert it.rates.fetch_bound(peer.address, now_s() + LATE_S) == math.inf

    run(monkeypatch, [peer], scenario)
