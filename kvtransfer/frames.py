"""What the two ends of a transfer say to each other. Pure; `wire` turns it into bytes and back.

Field meanings and units: protos/kvtransfer.proto.
"""

from dataclasses import dataclass

from kvtransfer.codecs.codec import CodecId
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.pool import PoolOffer

#: Of a chunk that is copied from where it lies.
NO_PAYLOAD = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Reserve:
    """Sender: asks for blocks. The first frame of a stream."""

    transfer_id: str
    #: Of the sender's pool.
    layout: KvLayout
    #: Tokens whose KV will be sent, >= 1.
    num_tokens: int
    #: Tokens the sequence may grow to at the receiver, >= num_tokens.
    max_tokens: int
    #: The receiver's incarnation as the sender knows it.
    incarnation: int
    timeout_s: float
    #: See digest.token_digest.
    token_digest: bytes = b""
    #: How the receiver may read the sender's pool by itself, the best way first.
    offers: tuple[PoolOffer, ...] = ()
    #: How payloads are packed when they are sent in chunks.
    codec: CodecId = CodecId.NONE
    #: Which of the `num_parts` senders of one transfer this is: ranks that hold different heads.
    part: int = 0
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class Resume:
    """Sender: goes on with a transfer whose stream broke. The first frame of a new stream."""

    transfer_id: str
    part: int
    lease_id: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Attach:
    """Sender: chunks of this transfer will come on this stream too. The first frame of such a stream."""

    transfer_id: str
    part: int
    lease_id: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Receiver: asks a worker for cached KV, which then becomes the sender on this stream. Its first frame.

    layout, incarnation: of the one that asks. block_hashes: of the blocks that it has not, each the child of the one
    before it. min_tokens: fewer are not worth it. address: of the one that asks, as other workers know it.
    """

    transfer_id: str
    layout: KvLayout
    incarnation: int
    block_hashes: tuple[bytes, ...]
    min_tokens: int
    timeout_s: float
    address: str = ""


@dataclass(frozen=True, slots=True)
class Renew:
    """Sender: keeps the lease while nothing else is sent. Answered by Granted."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sender: the KV of one range.

    checksum: of the payload as it travels; with source_block_ids, of what lies there.
    """

    lease_id: int
    incarnation: int
    sequence_number: int
    kv_range: KvRange
    #: KV heads of the model, [lo, hi).
    heads: tuple[int, int]
    codec: CodecId
    checksum: int
    #: Ordered [layer, K then V, token, head, head_dim], then packed by the codec. Empty with source_block_ids.
    payload: memoryview = NO_PAYLOAD
    #: Where the tokens lie in the sender's pool, from which the receiver copies them.
    source_block_ids: tuple[int, ...] = ()
    #: Place of the first token in the first of these blocks.
    source_first_token: int = 0

    @property
    def is_in_place(self) -> bool:
        """The receiver copies it from the sender's pool."""
        return bool(self.source_block_ids)


@dataclass(frozen=True, slots=True)
class Announce:
    """Sender: this chunk, which is copied in place, will follow as soon as its checksum is known.

    What it names is ready: it may be copied now, and is looked at by nobody before the chunk itself has come and fits.
    """

    #: Its checksum is 0.
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Finish:
    """Sender: chunks 0..num_chunks-1 are all there are, and all on their way. digest: see digest.transfer_digest."""

    num_chunks: int
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Commit:
    """Sender: the blocks are the receiver's. token_ids: what prefill sampled; none of fetched KV."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Sender: gives the transfer up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Granted:
    """Receiver: the blocks are yours under this lease; also the answer to Renew.

    transport: how KV is to be sent, one of the offers or "grpc"; transport_reason says why not by a better one.
    heads: KV heads of the model that this receiver takes, [lo, hi).
    """

    lease_id: int
    incarnation: int
    #: Chunks that may be unacknowledged at any time, >= 1.
    credits: int
    lease_s: float
    transport: str = "grpc"
    transport_reason: str = ""
    heads: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Refused:
    """Receiver: no blocks for you. retryable: whether the same may be granted later."""

    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Resumed:
    """Receiver: has all chunks before `first_missing`, and these beyond it."""

    first_missing: int
    received: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """Receiver: this chunk is in the cache; gives one credit back."""

    sequence_number: int


@dataclass(frozen=True, slots=True)
class Nack:
    """Receiver: this chunk did not arrive whole, send it again."""

    sequence_number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Receiver: every byte has arrived and is as it was sent."""


@dataclass(frozen=True, slots=True)
class Committed:
    """Receiver: the blocks belong to the sequence now."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Receiver: gives the lease up."""

    reason: str


SenderFrame = Reserve | Resume | Renew | Chunk | Finish | Commit | Abort
ReceiverFrame = Granted | Refused | Resumed | Ack | Nack | Verified | Committed | Ended
#: Attach and Fetch begin streams, Announce only saves time: they are no events of a machine.
Frame = SenderFrame | ReceiverFrame | Attach | Fetch | Announce
