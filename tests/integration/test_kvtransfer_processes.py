"""Transfers between two processes of which one is killed, stopped or full: the other one ends in time, and is whole."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import numpy as np
import psutil
import pytest

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import (
    DeadlineExceeded,
    LeaseExpired,
    PhasewiseTransferError,
    StreamLost,
    TransferEnded,
    TransferRefused,
)
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.layout import KvLayout
from kvtransfer.server import KvTransferServer, add_kvtransfer_service
from kvtransfer.session import TransferReport, TransferState
from kvtransfer.shared_memory import FILE_NAME
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost
from tests.support.kvtransfer_process import (
    INCARNATION,
    OTHER,
    EndOptions,
    EndProcess,
    content_of_sender,
    receiver_process,
    sender_process,
)
from tests.support.waiting import until, until_in_thread

CONFIG = KvTransferConfig(
    lease_s=1.0, resume_s=0.3, max_chunk_bytes=LAYOUT.token_bytes * LAYOUT.block_size, credits=3
)
NUM_BLOCKS = 16
NUM_TOKENS = 11
OPTIONS = EndOptions(LAYOUT, NUM_BLOCKS, CONFIG, num_tokens=NUM_TOKENS)
#: Of what is to succeed, however slow the machine is.
PATIENT = replace(OPTIONS, config=replace(CONFIG, lease_s=20.0))
#: Of what is killed. All chunks may be on their way at once, so that a sender can say all to a receiver that does not
#: answer; the lease is so long that only the broken stream can be what ends a transfer.
AHEAD = replace(OPTIONS, config=replace(CONFIG, lease_s=20.0, credits=16))
#: Payload in chunks, and read in place.
TRANSPORTS = ("grpc", "shm")
#: A sequence of 48 MiB, so that it is seen when all of it is held at once.
LARGE = KvLayout("d1", "float32", 16, 8, 4, 64, "rope")
LARGE_TOKENS = 3072
LARGE_CONFIG = replace(CONFIG, max_chunk_bytes=2**20)


@dataclass
class Sending:
    """A sender in this process."""

    host: FakeKvHost
    sender: KvSender
    running: "asyncio.Task[TransferReport]"

    @property
    def state(self) -> TransferState:
        return self.sender._machine.state

    @property
    def num_in_flight(self) -> int:
        return self.sender._machine._chunks.num_in_flight

    @property
    def is_all_said(self) -> bool:
        """Finish and Commit have been sent."""
        return self.sender._machine._was_finish_sent

    async def ended_with(self, *errors: type[PhasewiseTransferError]) -> str:
        """Its message; all blocks are back."""
        with pytest.raises(errors) as caught:
            await self.running
        assert self.host.num_free == len(self.host.owners)
        return str(caught.value)


@asynccontextmanager
async def sending_to(
    address: str, options: EndOptions, transport: str, incarnation: int = INCARNATION
) -> AsyncIterator[Sending]:
    """A transfer that has been begun."""
    is_shared = transport == "shm"
    host = FakeKvHost(options.layout, num_blocks=options.num_blocks, is_shared=is_shared)
    host.watched.hides_from = ("in_process", "nixl")
    block_ids = host.take("t1", options.num_tokens)
    host.fill(block_ids, seed=1)
    own = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=own) as channel:
        sender = KvSender(
            host,
            GrpcChannel(channel),
            transfer_id="t1",
            block_ids=block_ids,
            num_tokens=options.num_tokens,
            max_tokens=options.num_tokens,
            token_digest=b"",
            peer_incarnation=incarnation,
            timeout_s=options.timeout_s,
            config=options.config,
        )
        running = asyncio.create_task(sender.run())
        try:
            yield Sending(host, sender, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    host.close()


@asynccontextmanager
async def receiving(options: EndOptions) -> AsyncIterator[tuple[FakeKvHost, KvTransferServer, str]]:
    """A receiver in this process, whole at its end."""
    host = FakeKvHost(options.layout, num_blocks=options.num_blocks, incarnation=INCARNATION)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    receiver = add_kvtransfer_service(server, host, options.config)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield host, receiver, f"127.0.0.1:{port}"
        await until(lambda: receiver.num_transfers == 0, "the receiver has ended its transfers")
        receiver.check_invariants()
        host.check_all_returned()
    finally:
        await server.stop(None)


def bounded(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it; nothing of it takes longer than this, however slow the machine is."""

    async def whole() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(whole())


@contextmanager
def stopped(end: EndProcess) -> Iterator[None]:
    """It does nothing meanwhile, and says nothing of it."""
    end.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        end.signal(signal.SIGCONT)


def some_ready(sending: Sending) -> None:
    sending.sender.kv_ready(0, 1, 0, LAYOUT.block_size)


def rest_ready(sending: Sending) -> None:
    layout, num_tokens = sending.host.layout, sending.sender._request.num_tokens
    sending.sender.kv_ready(1, layout.num_layers, 0, layout.block_size)
    sending.sender.kv_ready(0, layout.num_layers, layout.block_size, num_tokens)
    sending.sender.prefill_finished((42,))


def whole_again(end: EndProcess) -> bool:
    """Of a process: no block is a transfer's, no transfer lives."""
    state = end.tell("state")
    return state["num_free"] == state["num_blocks"] and not state.get("num_transfers")


# Between two that live.


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_transfer_between_two_processes_commits(transport: str) -> None:
    async def scenario() -> None:
        names = set(os.listdir("/dev/shm"))
        options = replace(PATIENT, is_shared=transport == "shm")
        async with receiving(PATIENT) as (host, receiver, address):
            with sender_process(replace(options, address=address)) as end:
                end.tell("ask")
                end.tell("all")
                await until(lambda: "t1" in host.committed, "it has committed")
                assert await end.outcome() == f"committed by {transport}"
                assert whole_again(end)
                received = host.content(host.committed["t1"][0], NUM_TOKENS)
                assert np.array_equal(received, content_of_sender(options))
                # What it lies in has no name that somebody would have to remove, and does not need /dev/shm.
                new = set(os.listdir("/dev/shm")) - names
                assert not [name for name in new if FILE_NAME in name]
            host.end_sequence("t1")
            assert receiver.counts.num_received == 1

    bounded(scenario)


# The receiver is killed.


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("when", ["requested", "reserved", "receiving", "all is said"])
def test_a_receiver_that_is_killed_ends_the_sender(when: str, transport: str) -> None:
    async def scenario() -> None:
        with receiver_process(AHEAD) as end:
            if when == "requested":
                end.tell("hold")
            async with sending_to(end.address, AHEAD, transport) as sending:
                await _bring_to(when, sending, end)
                assert sending.is_all_said == (when == "all is said")
                state = sending.state
                end.kill()
                message = await sending.ended_with(StreamLost)
                assert f"while {state}" in message or "while suspended" in message

    bounded(scenario)


async def _bring_to(when: str, sending: Sending, end: EndProcess) -> None:
    expected = {
        "requested": TransferState.REQUESTED,
        "reserved": TransferState.RESERVED,
        "receiving": TransferState.RECEIVING,
        "all is said": TransferState.RECEIVING,
    }[when]
    if when not in ("requested", "reserved"):
        await sending.sender.wait_granted()
        some_ready(sending)
        await until(lambda: sending.sender._machine._chunks.busy_s > 0, "a chunk was acknowledged")
    if when == "all is said":
        # It takes the Commit into its buffers, and nobody knows whether it would have committed.
        end.signal(signal.SIGSTOP)
        rest_ready(sending)
        await until(lambda: sending.is_all_said, "Finish and Commit are sent")
    await until(lambda: sending.state is expected, f"the sender is {expected}")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_that_was_started_anew_says_so_to_a_suspended_sender(transport: str) -> None:
    options = replace(AHEAD, config=replace(AHEAD.config, resume_s=20.0))

    async def scenario() -> None:
        with receiver_process(options) as end:
            async with sending_to(end.address, options, transport) as sending:
                await _bring_to("receiving", sending, end)
                end.kill()
                await until(lambda: sending.state is TransferState.SUSPENDED, "the sender is suspended")
                anew = replace(options, address=end.address, incarnation=INCARNATION + 1)
                with receiver_process(anew) as after:
                    message = await sending.ended_with(TransferEnded)
                    assert f"incarnation {INCARNATION} is not known here any more" in message
                    assert whole_again(after)

    bounded(scenario)


# The sender is killed.


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("when", ["requested", "reserved", "receiving"])
def test_a_sender_that_is_killed_ends_the_receiver(when: str, transport: str) -> None:
    async def scenario() -> None:
        options = replace(AHEAD, is_shared=transport == "shm")
        async with receiving(AHEAD) as (host, receiver, address):
            held = host.take(OTHER, NUM_BLOCKS * LAYOUT.block_size) if when == "requested" else ()
            with sender_process(replace(options, address=address)) as end:
                end.tell("ask")
                if when == "requested":
                    await until(lambda: host.num_waiting == 1, "it waits for blocks")
                else:
                    await until(lambda: receiver.num_leases == 1, "it has a lease")
                if when == "receiving":
                    end.tell("some")
                    await until(lambda: host.num_writes > 0, "a chunk has come")
                end.kill()
                await until(lambda: receiver.num_transfers == 0, "the receiver has ended it")
            assert host.num_waiting == 0
            assert receiver.counts.num_expired == 0, "it was the lease that ended it"
            if held:
                host.release(OTHER, held, "the test is over")
            assert host.num_free == NUM_BLOCKS
            assert receiver._pools._pools.num_open == 0  # type: ignore[attr-defined]

    bounded(scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sender_that_is_killed_when_all_is_said_leaves_all_or_nothing(transport: str) -> None:
    async def scenario() -> None:
        options = replace(AHEAD, is_shared=transport == "shm")
        async with receiving(AHEAD) as (host, receiver, address):
            with sender_process(replace(options, address=address)) as end:
                end.tell("ask")
                await until(lambda: receiver.num_leases == 1, "it has a lease")
                end.tell("all")
                # The loop stands meanwhile, so the receiver has handled nothing of it.
                until_in_thread(lambda: end.tell("state")["is_all_said"], "Finish and Commit are sent")
                end.kill()
                assert not host.committed
                await until(lambda: receiver.num_transfers == 0, "the receiver has ended it")
            # How much of it had left the dead process is open. What it shared stands as long as it is mapped.
            if "t1" in host.committed:
                received = host.content(host.committed["t1"][0], NUM_TOKENS)
                assert np.array_equal(received, content_of_sender(options))
                host.end_sequence("t1")
            assert host.num_free == NUM_BLOCKS
            assert receiver._pools._pools.num_open == 0  # type: ignore[attr-defined]

    bounded(scenario)


# One stalls.


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_that_stalls_bounds_time_and_memory(transport: str) -> None:
    options = EndOptions(LARGE, 200, LARGE_CONFIG, num_tokens=LARGE_TOKENS)

    async def scenario() -> None:
        with receiver_process(options) as end:
            async with sending_to(end.address, options, transport) as sending:
                await sending.sender.wait_granted()
                process, most, most_in_flight = psutil.Process(), 0, 0
                before = process.memory_info().rss
                with stopped(end):
                    # Layer by layer: more chunks than credits also where they are read in place.
                    for layer in range(LARGE.num_layers):
                        sending.sender.kv_ready(layer, layer + 1, 0, LARGE_TOKENS)
                    sending.sender.prefill_finished((42,))
                    while not sending.running.done():
                        most_in_flight = max(most_in_flight, sending.num_in_flight)
                        most = max(most, process.memory_info().rss - before)
                        await asyncio.sleep(0.02)
                    await sending.ended_with(LeaseExpired)
                assert most_in_flight == CONFIG.credits
                # Three chunks of 1 MiB, some copies of them in gRPC; of what is read in place, nothing.
                assert most < 24 * 2**20
            await until(lambda: whole_again(end), "the receiver has its blocks back")

    bounded(scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sender_that_stalls_loses_its_lease(transport: str) -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, is_shared=transport == "shm")
        async with receiving(OPTIONS) as (host, receiver, address):
            with sender_process(replace(options, address=address)) as end:
                end.tell("ask")
                end.tell("some")
                await until(lambda: host.num_writes > 0, "a chunk has come")
                with stopped(end):
                    await until(lambda: receiver.num_leases == 0, "its lease is over")
                    assert host.num_free == NUM_BLOCKS
                    assert receiver.counts.num_expired == 1
                # Which clock it looks at first is open.
                assert (await end.outcome()).startswith(("TransferEnded: ", "LeaseExpired: "))
                assert whole_again(end)

    bounded(scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pause_within_the_lease_harms_nothing(transport: str) -> None:
    async def scenario() -> None:
        with receiver_process(PATIENT) as end:
            async with sending_to(end.address, PATIENT, transport) as sending:
                await sending.sender.wait_granted()
                with stopped(end):
                    some_ready(sending)
                    rest_ready(sending)
                    await until(lambda: sending.num_in_flight == CONFIG.credits, "its credits are used up")
                report = await sending.running
                assert report.transport == transport
                assert end.tell("state")["committed"] == ["t1"]

    bounded(scenario)


# It is refused.


def test_a_full_pool_is_said_in_time() -> None:
    options = replace(PATIENT, timeout_s=0.5)

    async def scenario() -> None:
        with receiver_process(options) as end:
            end.tell("hold")
            async with sending_to(end.address, options, "grpc") as sending:
                # Which side's clock is first is open; both know the time.
                await sending.ended_with(DeadlineExceeded, TransferRefused, TransferEnded)
            end.tell("let go")
            await until(lambda: whole_again(end), "the receiver waits for nothing any more")
            async with sending_to(end.address, replace(options, timeout_s=20.0), "grpc") as sending:
                some_ready(sending)
                rest_ready(sending)
                await sending.running

    bounded(scenario)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_digest": "another"}, "model_digest is 'd1' at the sender and 'another' at the receiver"),
        ({"position_encoding": "rope:theta=1"}, "position_encoding is"),
    ],
)
def test_a_wrong_model_at_the_other_side_is_refused_with_the_reason(
    change: dict[str, str], reason: str
) -> None:
    async def scenario() -> None:
        layout = replace(LAYOUT, **change)  # type: ignore[arg-type]
        with receiver_process(replace(OPTIONS, layout=layout)) as end:
            async with sending_to(end.address, OPTIONS, "shm") as sending:
                assert reason in await sending.ended_with(TransferRefused)
            assert whole_again(end)

    bounded(scenario)


def test_another_process_at_the_same_address_is_not_taken_for_the_one_meant() -> None:
    async def scenario() -> None:
        with receiver_process(OPTIONS) as end:
            async with sending_to(end.address, OPTIONS, "shm", incarnation=INCARNATION - 1) as sending:
                message = await sending.ended_with(TransferRefused)
                assert f"this is incarnation {INCARNATION}, not {INCARNATION - 1}" in message

    bounded(scenario)


def test_the_pool_of_a_sender_is_no_file() -> None:
    with sender_process(replace(OPTIONS, is_shared=True, address="127.0.0.1:1")) as end:
        assert end.process.pid is not None
        links = set()
        for one in Path(f"/proc/{end.process.pid}/fd").iterdir():
            # It may be closed meanwhile.
            with suppress(FileNotFoundError):
                links.add(os.readlink(one))
        assert {link for link in links if FILE_NAME in link} == {f"/memfd:{FILE_NAME} (deleted)"}
