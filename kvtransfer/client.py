"""Sends the KV of one sequence."""

import asyncio
from collections.abc import Sequence

from kvtransfer.config import KvTransferConfig
from kvtransfer.driver import Session
from kvtransfer.frames import Reserve
from kvtransfer.host import KvHost
from kvtransfer.kv_range import KvRange
from kvtransfer.sender import SenderMachine
from kvtransfer.session import GivenUp, KvReady, PrefillFinished, Started, StreamBroke, TransferReport
from kvtransfer.stream import MessageChannel


class KvSender:
    """One hand-off, from the first prefill step to the receiver's commit.

    Made in the loop when prefill begins, and told there what prefill does; it may be told before `run`
    begins. From now until `host.release` the blocks are this transfer's, and `host.release` is called
    exactly once: when the receiver has committed, or as soon as it is known that it will not.

    channel: to the receiver. block_ids: where the sequence's blocks lie in the pool here, in order, at
    least those of `num_tokens`. max_tokens: what the sequence may grow to at the receiver.
    peer_incarnation: the receiver's, as the caller knows it. timeout_s: for all of it, from now.
    """

    def __init__(
        self,
        host: KvHost,
        channel: MessageChannel,
        *,
        transfer_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        max_tokens: int,
        peer_incarnation: int,
        timeout_s: float,
        config: KvTransferConfig,
    ) -> None:
        request = Reserve(transfer_id, host.layout, num_tokens, max_tokens, peer_incarnation, timeout_s)
        machine = SenderMachine(
            request,
            tuple(block_ids),
            max_chunk_bytes=config.max_chunk_bytes,
            now_s=asyncio.get_running_loop().time(),
        )
        self._channel = channel
        self._session = Session(machine, host)

    def kv_ready(self, layer_lo: int, layer_hi: int, block_lo: int, block_hi: int) -> None:
        """The KV of these layers of these blocks of the sequence is computed and stays as it is.

        Each (layer, block) is to be named once. Ignored when the transfer is over.
        """
        self._session.post(KvReady(KvRange(layer_lo, layer_hi, block_lo, block_hi)))

    def prefill_finished(self, token_ids: Sequence[int]) -> None:
        """All KV was named, and prefill sampled these tokens: commit when it has arrived."""
        self._session.post(PrefillFinished(tuple(token_ids)))

    def abort(self, reason: str) -> None:
        """Give up. The blocks are released before this returns; `run` raises TransferAborted.

        A task that was cancelled before it entered `run` needs this too.
        """
        self._session.post(GivenUp(reason))

    async def run(self) -> TransferReport:
        """Until the receiver has committed. Cancelling it aborts the transfer.

        Raises:
            PhasewiseTransferError: it has not, or (StreamLost, LeaseExpired or DeadlineExceeded while
                `verified`) it is not known whether it has.
        """
        if self._session.outcome is None:
            try:
                stream = self._channel.open()
            except ConnectionError as error:
                self._session.post(StreamBroke(str(error)))
            else:
                self._session.post(Started())
                await self._session.run(stream, awaits_end=True)
        outcome = self._session.outcome
        assert outcome is not None
        if outcome.error is not None:
            raise outcome.error
        assert outcome.report is not None
        return outcome.report
