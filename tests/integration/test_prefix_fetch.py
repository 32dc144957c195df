"""Beginnings of prompts that another worker has cached are fetched where that is predicted to be faster."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.worker_client import (
    PATIENCE_S,
    WorkerClient,
    prompt,
    running_worker,
    submit,
    worker_spec,
)
from workers import kv_fetching
from workers.api import PrefixPeer, TokensGenerated

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


@pytest.fixture
def cheap_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than any connection: as if that cost nothing."""
    monkeypatch.setattr(kv_fetching, "ASSUMED_OVERHEAD_S", 0.0)
    monkeypatch.setattr(kv_fetching, "ASSUMED_BYTES_PER_S", 1e15)
    monkeypatch.setattr(kv_fetching, "TIMEOUT_FRACTION", 1e6)


async def first_tokens(worker: WorkerClient, request_id: str, *peers: PrefixPeer) -> TokensGenerated:
    """What its prefill says of a prompt of 100 tokens."""
    request = replace(submit(prompt(100), request_id=request_id), prefix_peers=peers)
    await worker.generate(request)
    [first] = [
        event
        for event in worker.events
        if isinstance(event, TokensGenerated)
        and event.prefill_s is not None
        and event.key.request_id == request_id
    ]
    return first


@pytest.mark.usefixtures("cheap_ways")
def test_blocks_that_a_peer_has_are_not_computed(model_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path)) as has,
            running_worker(worker_spec(model_path)) as wants,
        ):
            there = await first_tokens(has, "r1")
            here = await first_tokens(wants, "r2", PrefixPeer(has.address, 1))
            # All whole blocks of 16 before the last token.
            assert (there.num_cached_tokens, here.num_cached_tokens) == (0, 96)
            assert here.token_ids == there.token_ids
            again = await first_tokens(wants, "r3", PrefixPeer(has.address, 1))
            assert again.num_cached_tokens >= 96
            for worker in (has, wants):
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


@pytest.mark.usefixtures("cheap_ways")
def test_peers_that_have_nothing_or_are_gone_cost_only_the_question(model_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path)) as empty,
            running_worker(worker_spec(model_path, block_size=32)) as other,
            running_worker(worker_spec(model_path)) as wants,
        ):
            peers = [PrefixPeer(one, 1) for one in ("127.0.0.1:1", empty.address, other.address)]
            first = await first_tokens(wants, "r1", *peers)
            assert first.num_cached_tokens == 0
            for worker in (empty, other, wants):
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


def test_nothing_is_asked_for_where_computing_is_faster(model_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path)) as has,
            running_worker(worker_spec(model_path)) as wants,
        ):
            await first_tokens(has, "r1")
            # By now it knows how fast it is.
            for i in range(20):
                await wants.generate(replace(submit(prompt(90), request_id=f"w{i}"), cache_salt=str(i)))
            first = await first_tokens(wants, "r2", PrefixPeer(has.address, 1))
            assert first.num_cached_tokens == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("cheap_ways")
def test_a_request_that_is_aborted_while_its_beginning_comes_leaves_nothing(model_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path)) as has,
            running_worker(worker_spec(model_path)) as wants,
        ):
            await first_tokens(has, "r1")
            request = replace(
                submit(prompt(100), request_id="r2"), prefix_peers=(PrefixPeer(has.address, 1),)
            )
            await wants.send(request)
            await wants.abort("r2")
            async with asyncio.timeout(PATIENCE_S):
                for worker in (has, wants):
                    await worker.assert_nothing_leaks()

    asyncio.run(scenario())
