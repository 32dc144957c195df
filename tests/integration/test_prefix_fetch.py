"""Beginnings of prompts that another worker has cached are fetched where that is predicted to be faster."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from tests.support.worker_client import (
    BLOCK_BYTES,
    DECODE,
    PATIENCE_S,
    PREFILL,
    WorkerClient,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers import kv_fetching
from workers.api import PrefixPeer, TokensGenerated, WeightDtype, WorkerSpec

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


@pytest.fixture
def cheap_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than any connection: as if that cost nothing."""
    monkeypatch.setattr(kv_fetching, "ASSUMED_OVERHEAD_S", 0.0)
    monkeypatch.setattr(kv_fetching, "ASSUMED_BYTES_PER_S", 1e15)
    monkeypatch.setattr(kv_fetching, "ASSUMED_HOST_BYTES_PER_S", 1e15)
    monkeypatch.setattr(kv_fetching, "ROUND_TRIPS", 0.0)
    monkeypatch.setattr(kv_fetching, "TIMEOUT_FRACTION", 1e6)
    monkeypatch.setattr(kv_fetching, "MIN_LOOK_S", PATIENCE_S)
    monkeypatch.setattr(kv_fetching, "MAX_LOOK_S", PATIENCE_S)


async def first_tokens(
    worker: WorkerClient, request_id: str, *peers: PrefixPeer, num_prompt: int = 100, seed: int = 0
) -> TokensGenerated:
    """What its prefill says of a prompt."""
    request = replace(submit(prompt(num_prompt, seed), request_id=request_id), prefix_peers=peers)
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
            assert here.num_fetched_tokens == 96
            assert here.prefix_fetch_s > 0
            status = await wants.status()
            assert status.step_costs is not None
            assert status.step_costs.device.name == "cpu"
            reuse = status.reuse
            assert (reuse.num_prefixes_asked, reuse.num_prefixes_fetched, reuse.num_fetched_tokens) == (
                1,
                1,
                96,
            )
            assert reuse.fetch_s > 0
            assert reuse.num_cached_tokens == 96
            again = await first_tokens(wants, "r3", PrefixPeer(has.address, 1))
            assert again.num_cached_tokens >= 96
            for worker in (has, wants):
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


@pytest.mark.usefixtures("cheap_ways")
def test_of_several_peers_the_one_that_has_most_sends_it(model_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path)) as little,
            running_worker(worker_spec(model_path)) as much,
            running_worker(worker_spec(model_path)) as wants,
        ):
            await first_tokens(little, "r1", num_prompt=50)
            await first_tokens(much, "r2")
            first = await first_tokens(wants, "r3", *(PrefixPeer(one.address, 1) for one in (little, much)))
            assert first.num_fetched_tokens == 96
            [peer] = (await wants.status()).peers
            assert peer.address == much.address
            for worker in (little, much, wants):
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


@pytest.mark.usefixtures("cheap_ways")
def test_blocks_in_a_peer_s_host_memory_are_found_and_fetched(model_path: Path) -> None:
    async def scenario() -> None:
        # Room for one prompt of 100 tokens and what it generates.
        small = worker_spec(model_path, kv_cache_bytes=8 * BLOCK_BYTES, host_cache_bytes=2**20)
        async with running_worker(small) as has, running_worker(worker_spec(model_path)) as wants:
            there = await first_tokens(has, "r1")
            await first_tokens(has, "other", seed=1)
            reuse = (await has.status()).reuse
            assert reuse.num_host_saved >= 5
            assert reuse.num_host_hits == 0
            here = await first_tokens(wants, "r2", PrefixPeer(has.address, 1))
            assert (here.num_fetched_tokens, here.token_ids) == (96, there.token_ids)
            assert (await has.status()).reuse.num_host_hits >= 5
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
            reuse = (await wants.status()).reuse
            assert (reuse.num_prefixes_asked, reuse.num_prefixes_fetched, reuse.num_prefixes_refused) == (
                1,
                0,
                0,
            )
            for worker in (empty, other, wants):
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


def test_nothing_is_asked_for_where_computing_is_faster(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far above what any prompt takes on a busy machine.
    monkeypatch.setattr(kv_fetching, "ASSUMED_OVERHEAD_S", PATIENCE_S)

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
            reuse = (await wants.status()).reuse
            assert (reuse.num_prefixes_fetched, reuse.num_prefixes_refused) == (0, 1)

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


def packing(spec: WorkerSpec) -> WorkerSpec:
    """The same in a deployment that packs KV on its way."""
    return replace(
        spec, kv_transfer=replace(spec.kv_transfer, transport=TransportChoice.GRPC, codec=CodecId.FP8)
    )


def with_rounded_weights(spec: WorkerSpec) -> WorkerSpec:
    """The same with weights in fewer bits."""
    return replace(spec, engine=replace(spec.engine, weight_dtype=WeightDtype.INT8))


@pytest.mark.usefixtures("cheap_ways")
def test_a_prefix_is_fetched_as_it_was_computed_where_hand_offs_are_packed(model_path: Path) -> None:
    async def scenario() -> None:
        spec = packing(worker_spec(model_path))
        async with running_worker(spec) as has, running_worker(spec) as wants, running_worker(spec) as third:
            there = await first_tokens(has, "r1")
            for i, (worker, peer) in enumerate(((wants, has), (third, wants))):
                here = await first_tokens(worker, f"w{i}", PrefixPeer(peer.address, 1))
                assert (here.num_fetched_tokens, here.token_ids) == (96, there.token_ids)
                for one in (worker, peer):
                    await one.assert_nothing_leaks()

    asyncio.run(scenario())


@pytest.mark.usefixtures("cheap_ways")
def test_a_prefix_of_other_weights_is_computed_anew(model_path: Path) -> None:
    async def scenario() -> None:
        spec = worker_spec(model_path)
        async with (
            running_worker(with_rounded_weights(spec)) as has,
            running_worker(spec) as wants,
            running_worker(spec) as alone,
        ):
            await first_tokens(has, "r1")
            here = await first_tokens(wants, "r2", PrefixPeer(has.address, 1))
            assert here.num_fetched_tokens == 0
            assert here.token_ids == (await first_tokens(alone, "r2")).token_ids
            for one in (has, wants):
                await one.assert_nothing_leaks()

    asyncio.run(scenario())


@pytest.mark.parametrize(("change", "num_lent"), [(replace, 96), (packing, 0), (with_rounded_weights, 0)])
@pytest.mark.usefixtures("cheap_ways")
def test_a_hand_off_that_is_not_what_would_be_computed_is_lent_to_nobody(
    model_path: Path, change: Callable[[WorkerSpec], WorkerSpec], num_lent: int
) -> None:
    async def scenario() -> None:
        prefill_spec = change(worker_spec(model_path, PREFILL))
        decode_spec = worker_spec(model_path, DECODE)
        async with (
            running_pair(prefill_spec, decode_spec) as (prefill, decode),
            running_worker(worker_spec(model_path)) as wants,
        ):
            to_prefill, to_decode = handed_off(submit(prompt(100)), decode)
            await decode.send(to_decode)
            await prefill.send(to_prefill)
            await decode.wait_for_tokens("r1", 7)
            await decode.assert_nothing_leaks()
            first = await first_tokens(wants, "r2", PrefixPeer(decode.address, 1))
            assert first.num_fetched_tokens == num_lent

    asyncio.run(scenario())
