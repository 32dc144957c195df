"""One end of KV transfers in a process of its own, for tests that kill it or stop it.

The process answers commands over a pipe, one at a time. Processes are forked from one that has everything loaded.
"""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig
from kvtransfer.digest import token_digest
from kvtransfer.errors import PhasewiseTransferError
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.layout import KvLayout
from kvtransfer.server import add_kvtransfer_service
from phasewise_kernels.kv_copy.op import has_kernel
from tests.support.kvtransfer_fakes import FakeKvHost

INCARNATION = 6
SEED = 1
OTHER = "other"
# In the process that all others are forked from, so that none has to load it.
has_kernel()
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

Answer = Callable[[str], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class EndOptions:
    """What one end is like.

    address: of a sender, its receiver's; of a receiver, where it is to listen, "" for a free port. num_tokens: of a
    sender, what it sends. incarnation: of a receiver.
    """

    layout: KvLayout
    num_blocks: int
    config: KvTransferConfig
    is_shared: bool = False
    address: str = ""
    num_tokens: int = 0
    timeout_s: float = 30.0
    incarnation: int = INCARNATION


@dataclass(frozen=True, slots=True)
class EndProcess:
    """The process. address: of a receiver."""

    process: BaseProcess
    pipe: Connection
    address: str

    def tell(self, command: str) -> Any:
        """What it answers; it must not be stopped."""
        self.pipe.send(command)
        assert self.pipe.poll(30), f"no answer to {command!r}"
        return self.pipe.recv()

    async def outcome(self) -> str:
        """How a sender's transfer ended. The loop goes on meanwhile: the answer may depend on what it still has to send."""
        outcome: str = await asyncio.to_thread(self.tell, "wait")
        return outcome

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join()

    def signal(self, number: signal.Signals) -> None:
        """For example SIGSTOP."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@contextmanager
def receiver_process(options: EndOptions) -> Iterator[EndProcess]:
    """Serves; killed at the end if it still lives.

    Commands: "hold" takes all free blocks, "let go" gives them back, "state" answers what `_state` returns.
    """
    with _process(_receive, options) as end:
        yield end


@contextmanager
def sender_process(options: EndOptions) -> Iterator[EndProcess]:
    """Sends one transfer, "t1". Killed at the end if it still lives.

    Commands: "ask" begins it, "some" has one layer of the first block ready, "rest" all else, "all" everything,
    "state" as above and whether all was said, "wait" answers how the transfer ended.
    """
    with _process(_send, options) as end:
        yield end


def content_of_sender(options: EndOptions) -> NDArray[np.uint8]:
    """What a sender process sends, as `FakeKvHost.content` has it."""
    host = FakeKvHost(options.layout, num_blocks=options.num_blocks)
    block_ids = host.take("t1", options.num_tokens)
    host.fill(block_ids, SEED)
    return host.content(block_ids, options.num_tokens)


@contextmanager
def _process(main: Callable[[Connection, EndOptions], None], options: EndOptions) -> Iterator[EndProcess]:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=main, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the process did not start"
        yield EndProcess(process, ours, ours.recv())
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _state(host: FakeKvHost, **more: object) -> dict[str, object]:
    return {"num_free": host.num_free, "num_blocks": len(host.owners), **more}


async def _answer_all(pipe: Connection, answer: Answer) -> None:
    with suppress(EOFError):
        while True:
            command = await asyncio.to_thread(pipe.recv)
            pipe.send(await answer(command))


def _receive(pipe: Connection, options: EndOptions) -> None:
    asyncio.run(_receive_in_loop(pipe, options))


async def _receive_in_loop(pipe: Connection, options: EndOptions) -> None:
    host = FakeKvHost(options.layout, num_blocks=options.num_blocks, incarnation=options.incarnation)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    receiving = add_kvtransfer_service(server, host, options.config)
    port = server.add_insecure_port(options.address or "127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    held: tuple[int, ...] = ()

    async def answer(command: str) -> object:
        nonlocal held
        match command:
            case "hold":
                held = host.take(OTHER, host.num_free * options.layout.block_size)
            case "let go":
                host.release(OTHER, held, "the test says so")
            case "state":
                return _state(
                    host,
                    committed=sorted(host.committed),
                    num_leases=receiving.num_leases,
                    num_transfers=receiving.num_transfers,
                )
        return None

    await _answer_all(pipe, answer)
    await server.stop(None)


def _send(pipe: Connection, options: EndOptions) -> None:
    asyncio.run(_send_in_loop(pipe, options))


async def _send_in_loop(pipe: Connection, options: EndOptions) -> None:
    host = FakeKvHost(options.layout, num_blocks=options.num_blocks, is_shared=options.is_shared)
    host.watched.hides_from = ("in_process", "nixl")
    running: asyncio.Task[str] | None = None
    sender: KvSender | None = None
    num_layers, num_tokens = options.layout.num_layers, options.num_tokens

    async with grpc.aio.insecure_channel(options.address, options=GRPC_OPTIONS) as channel:
        pipe.send("")

        async def answer(command: str) -> object:
            nonlocal running, sender
            match command:
                case "ask":
                    sender = _sender(host, GrpcChannel(channel), options)
                    running = asyncio.create_task(_outcome(sender))
                case "some":
                    assert sender is not None
                    sender.kv_ready(0, 1, 0, options.layout.block_size)
                case "rest" | "all":
                    assert sender is not None
                    first = options.layout.block_size if command == "rest" else 0
                    if first:
                        sender.kv_ready(1, num_layers, 0, first)
                    sender.kv_ready(0, num_layers, first, num_tokens)
                    sender.prefill_finished((42,))
                case "state":
                    return _state(host, is_all_said=sender is not None and sender._machine._was_finish_sent)
                case "wait":
                    assert running is not None
                    return await running
            return None

        await _answer_all(pipe, answer)


def _sender(host: FakeKvHost, channel: GrpcChannel, options: EndOptions) -> KvSender:
    block_ids = host.take("t1", options.num_tokens)
    host.fill(block_ids, SEED)
    return KvSender(
        host,
        channel,
        transfer_id="t1",
        block_ids=block_ids,
        num_tokens=options.num_tokens,
        max_tokens=options.num_tokens,
        token_digest=token_digest(range(options.num_tokens)),
        peer_incarnation=INCARNATION,
        timeout_s=options.timeout_s,
        config=options.config,
    )


async def _outcome(sender: KvSender) -> str:
    try:
        report = await sender.run()
    except PhasewiseTransferError as error:
        return f"{type(error).__name__}: {error}"
    return f"committed by {report.transport}"
