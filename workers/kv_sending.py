"""The KV that leaves this worker: one KvSender for each hand-off, over one channel for each receiver."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import PhasewiseTransferError, StreamLost
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.host import KvHost
from workers.engine.messages import (
    FinishTransfer,
    KvReady,
    Message,
    StartTransfer,
    TransferFailed,
    TransferSent,
)

logger = logging.getLogger(__name__)

#: Channels kept while no transfer uses them; beyond that the one that is idle longest is closed.
MAX_IDLE_CHANNELS = 32
#: A connection of its own: one that failed must not make the next channel wait out its back-off.
#: Addresses are the cluster's own: no proxy.
CHANNEL_OPTIONS = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


@dataclass(eq=False, slots=True)
class _Peer:
    """A receiver's address and the channel to it."""

    address: str
    channel: grpc.aio.Channel
    num_users: int = 0


class _PeerChannels:
    """Channels by address. Those in use are bounded by the transfers, the idle ones by a number."""

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        #: The one whose last use is longest ago comes first.
        self._peers: dict[str, _Peer] = {}

    def take(self, address: str) -> _Peer:
        """The channel to this address, until `give_back`."""
        peer = self._peers.pop(address, None)
        if peer is None:
            peer = _Peer(address, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
        self._peers[address] = peer
        peer.num_users += 1
        return peer

    async def give_back(self, peer: _Peer, *, is_lost: bool) -> None:
        """is_lost: the connection broke; the next transfer to this address gets another channel."""
        peer.num_users -= 1
        if is_lost and self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        idle = [known for known in self._peers.values() if known.num_users == 0]
        to_close = idle[: max(0, len(idle) - self._max_idle)]
        for surplus in to_close:
            del self._peers[surplus.address]
        if peer.num_users == 0 and self._peers.get(peer.address) is not peer and peer not in to_close:
            to_close.append(peer)
        for closing in to_close:
            await closing.channel.close()

    async def close(self) -> None:
        """All of them; no transfer runs any more."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.channel.close()


class KvSending:
    """All transfers that send from here. Made and used in the loop.

    post: hands a message to the engine. Every `start` ends in one TransferSent or TransferFailed.
    """

    def __init__(self, host: KvHost, post: Callable[[Message], None], config: KvTransferConfig) -> None:
        self._host = host
        self._post = post
        self._config = config
        self._peers = _PeerChannels(MAX_IDLE_CHANNELS)
        self._senders: dict[str, KvSender] = {}
        #: Bounded by the sequences that the engine prefills and hands off.
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed_reason: str | None = None

    def start(self, start: StartTransfer) -> None:
        """Begin a transfer. It may be told of its KV at once."""
        peer = self._peers.take(start.decode_address)
        sender = KvSender(
            self._host,
            GrpcChannel(peer.channel),
            transfer_id=start.transfer_id,
            block_ids=start.block_ids,
            num_tokens=start.num_tokens,
            max_tokens=start.max_tokens,
            peer_incarnation=start.decode_incarnation,
            timeout_s=start.timeout_s,
            config=self._config,
        )
        self._senders[start.transfer_id] = sender
        if self._closed_reason is not None:
            sender.abort(self._closed_reason)
        task = asyncio.create_task(self._run(sender, peer, start.transfer_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kv_ready(self, ready: KvReady) -> None:
        """More can be sent. Nothing happens when the transfer is over."""
        sender = self._senders.get(ready.transfer_id)
        if sender is not None:
            sender.kv_ready(ready.layer_lo, ready.layer_hi, ready.block_lo, ready.block_hi)

    def finish(self, finish: FinishTransfer) -> None:
        """Prefill has ended. Nothing happens when the transfer is over."""
        sender = self._senders.get(finish.transfer_id)
        if sender is not None:
            sender.prefill_finished(finish.token_ids)

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give this transfer up. Nothing happens when there is none."""
        sender = self._senders.get(transfer_id)
        if sender is not None:
            sender.abort(reason)

    async def close(self, reason: str) -> None:
        """Give up every transfer, and each that is started from now on; returns when none is left."""
        self._closed_reason = reason
        for sender in list(self._senders.values()):
            sender.abort(reason)
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._peers.close()

    async def _run(self, sender: KvSender, peer: _Peer, transfer_id: str) -> None:
        is_lost = False
        message: Message
        try:
            report = await sender.run()
        except PhasewiseTransferError as error:
            is_lost = isinstance(error, StreamLost)
            logger.info("transfer_failed transfer_id=%s peer=%s reason=%s", transfer_id, peer.address, error)
            message = TransferFailed(transfer_id, str(error))
        except Exception as error:
            logger.exception("transfer_broke transfer_id=%s peer=%s", transfer_id, peer.address)
            sender.abort(f"it broke: {error}")
            message = TransferFailed(transfer_id, f"the transfer broke: {error}")
        else:
            message = TransferSent(
                transfer_id, report.num_bytes, report.num_chunks, report.transfer_s, report.exposed_s
            )
        if self._senders.get(transfer_id) is sender:
            del self._senders[transfer_id]
        self._post(message)
        await self._peers.give_back(peer, is_lost=is_lost)
