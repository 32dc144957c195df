"""Sends the KV of one sequence, and fetches cached KV."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.counts import TransferCounts
from kvtransfer.driver import Session
from kvtransfer.frames import Attach, Fetch, Reserve
from kvtransfer.host import KvHost
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout, inexactness
from kvtransfer.lease import LeaseTable
from kvtransfer.pool import PoolOpener
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import SenderMachine
from kvtransfer.session import GivenUp, KvReady, PrefillFinished, Started, StreamBroke, TransferReport
from kvtransfer.stream import MessageChannel, MessageStream
from kvtransfer.transports.choice import offers_of
from kvtransfer.wire import encode

logger = logging.getLogger(__name__)


class KvSender:
    """One hand-off, from the first prefill step to the receiver's commit.

    Made in the loop when prefill begins, and told there what prefill does; it may be told before `run`
    begins. From now until `host.release` the blocks are this transfer's, and `host.release` is called
    exactly once: when the receiver has committed, or as soon as it is known that it will not.

    channel: to the receiver. block_ids: where the sequence's blocks lie in the pool here, in order, at
    least those of `num_tokens`. max_tokens: what the sequence may grow to at the receiver. token_digest: of the tokens
    whose KV it is, see digest.token_digest. peer_incarnation: the receiver's, as the caller knows it. timeout_s: for
    all of it, from now. part, num_parts: of a transfer that several ranks send. data_channels: connections for chunks
    that carry their payload; without any they go by `channel`.
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
        token_digest: bytes,
        peer_incarnation: int,
        timeout_s: float,
        config: KvTransferConfig,
        codec: CodecId = CodecId.NONE,
        part: int = 0,
        num_parts: int = 1,
        data_channels: Sequence[MessageChannel] = (),
    ) -> None:
        request = Reserve(
            transfer_id,
            host.pool.layout,
            num_tokens,
            max_tokens,
            peer_incarnation,
            timeout_s,
            token_digest=token_digest,
            offers=offers_of(host.pool.offers, config),
            codec=codec,
            part=part,
            num_parts=num_parts,
        )
        self._machine = SenderMachine(
            request,
            tuple(block_ids),
            max_chunk_bytes=config.max_chunk_bytes,
            resume_s=config.resume_s,
            now_s=asyncio.get_running_loop().time(),
        )
        self._request = request
        self._channel = channel
        self._data_channels = data_channels
        self._is_granted = asyncio.Event()
        self._session = Session(self._machine, host, block_ids=block_ids, on_event=self._note_grant)

    def kv_ready(self, layer_lo: int, layer_hi: int, token_lo: int, token_hi: int) -> None:
        """The KV of these layers of these tokens of the sequence is computed and stays as it is.

        Each (layer, token) is to be named once. Ignored when the transfer is over.
        """
        self._session.post(KvReady(KvRange(layer_lo, layer_hi, token_lo, token_hi)))

    def prefill_finished(self, token_ids: Sequence[int]) -> None:
        """All KV was named, and prefill sampled these tokens: commit when it has arrived."""
        self._session.post(PrefillFinished(tuple(token_ids)))

    def abort(self, reason: str) -> None:
        """Give up. The blocks are released before this returns; `run` raises TransferAborted.

        A task that was cancelled before it entered `run` needs this too.
        """
        self._session.post(GivenUp(reason))

    async def wait_granted(self) -> None:
        """Until the receiver has granted blocks, or the transfer is over. `run` must be running."""
        await self._is_granted.wait()

    async def run(self) -> TransferReport:
        """Until the receiver has committed. Cancelling it aborts the transfer.

        Raises:
            PhasewiseTransferError: it has not, or (StreamLost, LeaseExpired or DeadlineExceeded while
                `verified`) it is not known whether it has.
        """
        session = self._session
        try:
            while not session.is_ended:
                await self._use_stream()
                if not session.is_ended:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(session.reconnect_delay_s):
                            await session.wait_ended()
        finally:
            session.post(GivenUp("cancelled"))
        outcome = session.outcome
        assert outcome is not None
        if outcome.error is not None:
            raise outcome.error
        assert outcome.report is not None
        return outcome.report

    async def _use_stream(self) -> None:
        """Until the stream is lost or the transfer over."""
        try:
            stream = self._channel.open()
        except ConnectionError as error:
            self._session.post(StreamBroke(str(error)))
            return
        self._session.post(Started())
        spreading = asyncio.create_task(self._spread()) if self._data_channels else None
        try:
            await self._session.attach(stream, awaits_end=True)
        finally:
            if spreading is not None:
                spreading.cancel()
                await asyncio.gather(spreading, return_exceptions=True)

    async def _spread(self) -> None:
        """Let chunks leave by streams of their own, once there is a lease."""
        await self._is_granted.wait()
        granted = self._machine.granted
        if granted is None or granted.transport != "grpc":
            return
        attach = Attach(self._request.transfer_id, self._request.part, granted.lease_id, granted.incarnation)
        async with asyncio.TaskGroup() as group:
            for channel in self._data_channels:
                group.create_task(self._send_by(channel, attach))

    async def _send_by(self, channel: MessageChannel, attach: Attach) -> None:
        """Let chunks leave by this channel. One that fails is not used again by this transfer."""
        try:
            stream = channel.open()
            await stream.write(encode(attach))
        except ConnectionError as error:
            # Nothing was sent by it: the others do.
            logger.info("chunk_stream_unavailable transfer_id=%s reason=%s", attach.transfer_id, error)
            return
        watching = asyncio.create_task(self._watch(stream))
        try:
            await self._session.send_chunks(stream)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await stream.close()

    async def _watch(self, stream: MessageStream) -> None:
        """The receiver says nothing on a stream of chunks: a word, or an error, means that what was sent may be lost."""
        try:
            message = await stream.read()
        except ConnectionError as error:
            problem = str(error)
        else:
            if message is None:
                return
            problem = "the receiver does not take it"
        self._data_channels = ()
        self._session.stream_broke(f"a stream of chunks: {problem}")

    def _note_grant(self) -> None:
        if self._machine.granted is not None or self._machine.is_ended:
            self._is_granted.set()


async def fetch(
    host: KvHost,
    channel: MessageChannel,
    pools: PoolOpener,
    *,
    transfer_id: str,
    block_hashes: Sequence[bytes],
    min_tokens: int,
    timeout_s: float,
    config: KvTransferConfig,
    counts: TransferCounts,
    address: str = "",
) -> tuple[int, str, str]:
    """Get the longest beginning of this chain of blocks that the worker at the other end has.

    Returns how many tokens that is, and by which transport they came, and why not by a better one.

    The blocks are asked of `host.reserve` and given to `host.commit`, as with any transfer, with the last block's hash
    in place of a digest of tokens. Cancelling gives it up. counts: where what comes is counted. address: of this worker,
    as others know it.

    Raises:
        PhasewiseTransferError: it has fewer than `min_tokens`, or did not send them.
    """
    loop = asyncio.get_running_loop()
    request = Fetch(
        transfer_id, host.pool.layout, host.incarnation, tuple(block_hashes), min_tokens, timeout_s, address
    )
    machine = ReceiverMachine(
        host.pool.layout,
        host.incarnation,
        LeaseTable(),
        lease_s=min(config.lease_s, timeout_s),
        resume_s=0.0,
        max_in_flight=config.credits,
        now_s=loop.time(),
        problem_of=lambda answer: _not_asked_for(answer, request, host.pool.layout),
    )
    session = Session(machine, host, pools=pools)
    try:
        try:
            stream = channel.open()
            await stream.write(encode(request))
        except ConnectionError as error:
            session.post(StreamBroke(str(error)))
        else:
            await session.attach(stream, awaits_end=True)
    finally:
        session.post(GivenUp("cancelled"))
        counts.num_corrupt_chunks += session.num_corrupt_chunks
        counts.num_digest_mismatches += machine.num_digest_mismatches
        counts.num_bytes_received += machine.num_bytes_written
    outcome = session.outcome
    assert outcome is not None
    if outcome.error is not None:
        raise outcome.error
    counts.num_received += 1
    assert machine.request is not None
    return machine.request.num_tokens, machine.transport, machine.transport_reason


def _not_asked_for(answer: Reserve, asked: Fetch, layout: KvLayout) -> str | None:
    """Why this is no answer to a fetch; None when it is: whole blocks from the beginning of what was asked for."""
    size = answer.layout.block_size
    num_blocks = answer.num_tokens // size
    is_whole = answer.num_tokens == answer.max_tokens == num_blocks * size
    block_hashes = asked.block_hashes
    if answer.transfer_id != asked.transfer_id or answer.num_parts != 1:
        return "another transfer was fetched"
    if not is_whole or not 0 < num_blocks <= len(block_hashes) or answer.num_tokens < asked.min_tokens:
        return f"{answer.num_tokens} tokens are not what was fetched"
    if answer.token_digest != block_hashes[num_blocks - 1]:
        return "other tokens were fetched"
    if answer.codec is not CodecId.NONE:
        # It is kept under the tokens' hashes and lent to others: it has to be what was computed.
        return f"what was fetched comes packed by {answer.codec.name.lower()}"
    inexact = inexactness(answer.layout, layout)
    return f"what was fetched {inexact}" if inexact is not None else None
