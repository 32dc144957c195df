"""The KV that leaves this worker: one KvSender for each hand-off, over one channel for each receiver."""

import asyncio
import logging
from collections.abc import Callable

from kvtransfer.client import KvSender
from kvtransfer.codecs.choice import choose_codec
from kvtransfer.codecs.codec import CodecId
from kvtransfer.codecs.measure import MeasuredRates
from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import PeerCounts, TransferCounts
from kvtransfer.errors import (
    DeadlineExceeded,
    LeaseExpired,
    PhasewiseTransferError,
    StreamLost,
    TransferRefused,
)
from kvtransfer.grpc_stream import GrpcChannel
from kvtransfer.host import KvHost
from kvtransfer.layout import INT4
from kvtransfer.session import TransferReport
from workers.engine.messages import (
    FinishTransfer,
    KvReady,
    Message,
    StartTransfer,
    TransferFailed,
    TransferSent,
)
from workers.kv_channels import Peer, PeerChannels

logger = logging.getLogger(__name__)

#: What is chosen from when the manifest leaves the codec to us: those that hardly change what is generated.
AUTO_CODECS = (CodecId.FP8, CodecId.INT4_HADAMARD)


class KvSending:
    """All transfers that send from here. Made and used in the loop.

    post: hands a message to the engine. Every `start` ends in one TransferSent or TransferFailed.
    """

    def __init__(
        self,
        host: KvHost,
        channels: PeerChannels,
        post: Callable[[Message], None],
        config: KvTransferConfig,
    ) -> None:
        self._host = host
        self._channels = channels
        self._post = post
        self._config = config
        self.counts = TransferCounts()
        self.peers = PeerCounts()
        self._rates = MeasuredRates(AUTO_CODECS)
        self._senders: dict[str, KvSender] = {}
        #: Bounded by the sequences that the engine prefills and hands off.
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed_reason: str | None = None

    def start(self, start: StartTransfer) -> None:
        """Begin a transfer. It may be told of its KV at once."""
        peer = self._channels.take(start.decode_address)
        sender = KvSender(
            self._host,
            GrpcChannel(peer.channel),
            transfer_id=start.transfer_id,
            block_ids=start.block_ids,
            num_tokens=start.num_tokens,
            max_tokens=start.max_tokens,
            token_digest=start.token_digest,
            peer_incarnation=start.decode_incarnation,
            timeout_s=start.timeout_s,
            config=self._config,
            codec=self._codec(start),
            data_channels=[GrpcChannel(channel) for channel in peer.data_channels],
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
            sender.kv_ready(ready.layer_lo, ready.layer_hi, ready.token_lo, ready.token_hi)

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

    def _codec(self, start: StartTransfer) -> CodecId:
        """How this transfer's chunks are packed, if they have to travel."""
        layout = self._host.pool.layout
        if layout.dtype == INT4:
            # It is packed already.
            return CodecId.NONE
        if self._config.codec is not None:
            return self._config.codec
        num_bytes = start.num_tokens * layout.num_layers * layout.token_bytes
        codec, reason = choose_codec(
            AUTO_CODECS,
            num_bytes=num_bytes,
            link_bytes_per_s=self.peers.link_bytes_per_s(start.decode_address),
            rates=self._rates.known(layout),
            chunk_bytes=self._config.max_chunk_bytes,
        )
        logger.debug(
            "codec_chosen transfer_id=%s codec=%s reason=%s", start.transfer_id, codec.name.lower(), reason
        )
        return codec

    async def _run(self, sender: KvSender, peer: Peer, transfer_id: str) -> None:
        is_lost = False
        message: Message
        report = None
        problem = ""
        try:
            report = await sender.run()
        except PhasewiseTransferError as error:
            is_lost = isinstance(error, StreamLost)
            problem = str(error)
            logger.info("transfer_failed transfer_id=%s peer=%s reason=%s", transfer_id, peer.address, error)
            self.counts.num_expired += isinstance(error, (LeaseExpired, DeadlineExceeded))
            self.counts.num_refused += isinstance(error, TransferRefused)
            message = TransferFailed(transfer_id, problem)
        except Exception as error:
            logger.exception("transfer_broke transfer_id=%s peer=%s", transfer_id, peer.address)
            problem = f"the transfer broke: {error}"
            sender.abort(problem)
            message = TransferFailed(transfer_id, problem)
        else:
            message = TransferSent(transfer_id, report)
        self._note(peer.address, report, problem)
        if self._senders.get(transfer_id) is sender:
            del self._senders[transfer_id]
        self._post(message)
        await self._channels.give_back(peer, is_lost=is_lost)

    def _note(self, address: str, report: TransferReport | None, problem: str) -> None:
        if report is not None:
            self.counts.num_sent += 1
            self.counts.num_bytes_sent += report.num_bytes
            self.counts.num_resent_chunks += report.num_resent_chunks
        self.peers.note(
            address,
            is_sending=True,
            transport=report.transport if report is not None else "",
            reason=report.transport_reason if report is not None else "",
            codec=report.codec.name.lower() if report is not None else "",
            num_bytes=report.num_bytes if report is not None else 0,
            num_wire_bytes=report.num_wire_bytes if report is not None else 0,
            busy_s=report.busy_s if report is not None else 0.0,
            problem=problem,
        )
