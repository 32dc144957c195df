"""How KV goes between two worker processes: by itself, by what is forced, and what is told of it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from tests.support.hf_reference import hf_greedy
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    WorkerClient,
    greedy_submit,
    handed_off,
    prompt,
    running_worker,
    worker_spec,
)
from tests.support.worker_process import ROOT, worker_processes
from workers.api import FailureCode, KvTransferred, WorkerSpec, WorkerStatus

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

NUM_TOKENS = 100
REQUEST_ID = f"r{NUM_TOKENS}"
#: Three layers, K and V, 2 KV heads of 16 dimensions, fp32.
NUM_BYTES = NUM_TOKENS * 3 * 2 * 2 * 16 * 4


HandedOff = tuple[list[int], KvTransferred, WorkerStatus]


async def hand_off(prefill: WorkerClient, decode_address: str) -> HandedOff:
    """The tokens of one request, and what the prefill worker says of its hand-off."""
    decode = WorkerClient(decode_address)
    to_prefill, to_decode = handed_off(greedy_submit(NUM_TOKENS), decode)
    await prefill.send(to_prefill)
    tokens = await decode.generate(to_decode)
    first = await prefill.wait_for_tokens(REQUEST_ID, 1)
    await decode.close()

    def sent() -> list[KvTransferred]:
        return [event for event in prefill.events if isinstance(event, KvTransferred)]

    await prefill.wait_for(lambda: bool(sent()), "the report of the transfer")
    # The engine tells of it as soon as its blocks are back, maybe before the transfer has counted itself.
    await prefill.wait_for_status(lambda status: status.transfers.num_sent > 0, "the transfer is counted")
    return first + tokens, sent()[0], await prefill.status()


def hand_off_from_here(model_path: Path, decode_address: str, **kv_transfer: Any) -> HandedOff:
    """The same from a prefill worker in this process, with these settings."""

    async def scenario() -> HandedOff:
        async with running_worker(sending_spec(model_path, **kv_transfer)) as prefill:
            return await hand_off(prefill, decode_address)

    return asyncio.run(scenario())


def sending_spec(model_path: Path, **kv_transfer: Any) -> WorkerSpec:
    """Of a prefill worker with these settings."""
    spec = worker_spec(model_path, PREFILL)
    return replace(spec, kv_transfer=replace(spec.kv_transfer, **kv_transfer))


@pytest.fixture(scope="module")
def grpc_decode(model_path: Path, cache_home: Path) -> Iterator[str]:
    """The address of a decode worker, a process of its own, that takes KV by gRPC alone."""
    arguments = [("--transport", "grpc")]
    with worker_processes(("decode-0", DECODE), model=model_path, arguments=arguments) as [decode]:
        yield decode.address


def test_workers_of_one_host_share_their_memory(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario(prefill_address: str, decode_address: str) -> HandedOff:
        prefill = WorkerClient(prefill_address)
        found = await hand_off(prefill, decode_address)
        await prefill.close()
        return found

    started = (("prefill-0", PREFILL), ("decode-0", DECODE))
    with worker_processes(*started, model=model_path) as (prefill, decode):
        tokens, report, status = asyncio.run(scenario(prefill.address, decode.address))
    assert tokens == hf_greedy(reference, prompt(NUM_TOKENS), 12)
    assert report.transport == "shm"
    assert report.transport_reason == "in_process: it is of another process"
    assert report.num_bytes == NUM_BYTES
    # Of each chunk a header with the blocks where it lies.
    assert report.num_wire_bytes < NUM_BYTES / 20
    [peer] = status.peers
    assert (peer.transport, peer.num_transfers, peer.num_bytes) == ("shm", 1, NUM_BYTES)
    assert peer.bytes_per_s > 0
    assert status.transfers.num_sent == 1
    assert status.leaked_blocks == 0


@pytest.mark.parametrize("num_streams", [1, 3])
def test_what_is_forced_is_taken(
    model_path: Path, reference: LlamaForCausalLM, grpc_decode: str, num_streams: int
) -> None:
    tokens, report, _status = hand_off_from_here(
        model_path, grpc_decode, transport=TransportChoice.GRPC, num_streams=num_streams
    )
    assert tokens == hf_greedy(reference, prompt(NUM_TOKENS), 12)
    assert (report.transport, report.transport_reason) == ("grpc", "kvTransfer.transport is grpc")
    assert report.num_wire_bytes > NUM_BYTES


def test_a_codec_makes_what_travels_smaller(model_path: Path, grpc_decode: str) -> None:
    _tokens, report, _status = hand_off_from_here(
        model_path, grpc_decode, transport=TransportChoice.GRPC, codec=CodecId.FP8
    )
    assert report.codec == "fp8"
    assert report.num_wire_bytes < NUM_BYTES / 2


def test_another_block_size_at_the_decode_worker_is_no_matter(
    model_path: Path, reference: LlamaForCausalLM
) -> None:
    arguments = [("--block-size", "24")]
    with worker_processes(("decode-0", DECODE), model=model_path, arguments=arguments) as [decode]:
        tokens, report, _status = hand_off_from_here(model_path, decode.address)
    assert tokens == hf_greedy(reference, prompt(NUM_TOKENS), 12)
    assert report.transport == "shm"


def test_a_way_that_the_other_worker_does_not_offer_is_refused_by_name(model_path: Path) -> None:
    async def scenario(decode_address: str) -> tuple[FailureCode, str]:
        spec, decode = sending_spec(model_path, transport=TransportChoice.GRPC), WorkerClient(decode_address)
        async with running_worker(spec) as prefill:
            to_prefill, _ = handed_off(greedy_submit(NUM_TOKENS), decode)
            await prefill.send(to_prefill)
            failure = await prefill.failure_of(REQUEST_ID)
            # The engine tells of it as soon as its blocks are back, maybe before the transfer has counted itself.
            await prefill.wait_for_status(
                lambda status: status.transfers.num_refused > 0, "the refusal is counted"
            )
            status = await prefill.status()
            assert status.transfers.num_refused == 1
            assert "kvTransfer.transport is shm" in status.peers[0].last_problem
        await decode.close()
        return failure

    arguments = [("--transport", "shm")]
    with worker_processes(("decode-0", DECODE), model=model_path, arguments=arguments) as [decode]:
        code, reason = asyncio.run(scenario(decode.address))
    assert code is FailureCode.TRANSFER
    assert "kvTransfer.transport is shm, which cannot be had" in reason


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_the_example_of_the_package_alone_runs(transport: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "03_kv_transfer.py"), "--transport", transport]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("what arrived is what was sent\n")
    assert f"by {'shm' if transport == 'auto' else 'grpc'}" in done.stdout
