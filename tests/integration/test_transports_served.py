"""How KV goes between two worker processes: by itself, by what is forced, and what is told of it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.support.hf_reference import hf_greedy
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    WorkerClient,
    greedy_submit,
    handed_off,
    prompt,
)
from tests.support.worker_process import ROOT, worker_processes
from workers.api import FailureCode, KvTransferred, WorkerStatus

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

NUM_TOKENS = 100
REQUEST_ID = f"r{NUM_TOKENS}"
#: Three layers, K and V, 2 KV heads of 16 dimensions, fp32.
NUM_BYTES = NUM_TOKENS * 3 * 2 * 2 * 16 * 4


def hand_off(
    model_path: Path, prefill_arguments: Sequence[str] = (), decode_arguments: Sequence[str] = ()
) -> tuple[list[int], KvTransferred, WorkerStatus]:
    """The tokens of one request, and what the prefill worker says of its hand-off."""

    async def scenario(
        prefill_address: str, decode_address: str
    ) -> tuple[KvTransferred, list[int], WorkerStatus]:
        prefill, decode = WorkerClient(prefill_address), WorkerClient(decode_address)
        to_prefill, to_decode = handed_off(greedy_submit(NUM_TOKENS), decode)
        await prefill.send(to_prefill)
        tokens = await decode.generate(to_decode)
        first = prefill.tokens_of(REQUEST_ID)

        def sent() -> list[KvTransferred]:
            return [event for event in prefill.events if isinstance(event, KvTransferred)]

        await prefill.wait_for(lambda: bool(sent()), "the report of the transfer")
        status = await prefill.status()
        await prefill.close()
        await decode.close()
        return sent()[0], first + tokens, status

    with worker_processes(
        ("prefill-0", PREFILL),
        ("decode-0", DECODE),
        model=model_path,
        arguments=(prefill_arguments, decode_arguments),
    ) as (prefill, decode):
        report, tokens, status = asyncio.run(scenario(prefill.address, decode.address))
    return tokens, report, status


def test_workers_of_one_host_share_their_memory(model_path: Path, reference: LlamaForCausalLM) -> None:
    tokens, report, status = hand_off(model_path)
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


@pytest.mark.parametrize("num_streams", ["1", "3"])
def test_what_is_forced_is_taken(model_path: Path, reference: LlamaForCausalLM, num_streams: str) -> None:
    arguments = ("--transport", "grpc", "--streams", num_streams)
    tokens, report, _status = hand_off(model_path, arguments, arguments)
    assert tokens == hf_greedy(reference, prompt(NUM_TOKENS), 12)
    assert (report.transport, report.transport_reason) == ("grpc", "kvTransfer.transport is grpc")
    assert report.num_wire_bytes > NUM_BYTES


def test_a_codec_makes_what_travels_smaller(model_path: Path) -> None:
    arguments = ("--transport", "grpc", "--codec", "fp8")
    _tokens, report, _status = hand_off(model_path, arguments, arguments)
    assert report.codec == "fp8"
    assert report.num_wire_bytes < NUM_BYTES / 2


def test_another_block_size_at_the_decode_worker_is_no_matter(
    model_path: Path, reference: LlamaForCausalLM
) -> None:
    tokens, report, _status = hand_off(model_path, (), ("--block-size", "24"))
    assert tokens == hf_greedy(reference, prompt(NUM_TOKENS), 12)
    assert report.transport == "shm"


def test_a_way_that_the_other_worker_does_not_offer_is_refused_by_name(model_path: Path) -> None:
    async def scenario(prefill_address: str, decode_address: str) -> tuple[FailureCode, str]:
        prefill, decode = WorkerClient(prefill_address), WorkerClient(decode_address)
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
        await prefill.close()
        await decode.close()
        return failure

    with worker_processes(
        ("prefill-0", PREFILL),
        ("decode-0", DECODE),
        model=model_path,
        arguments=(("--transport", "grpc"), ("--transport", "shm")),
    ) as (prefill, decode):
        code, reason = asyncio.run(scenario(prefill.address, decode.address))
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
