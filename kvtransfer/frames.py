"""What the two ends of a transfer say to each other. Pure; `wire` turns it into bytes and back.

Field meanings and units: protos/kvtransfer.proto.
"""

from dataclasses import dataclass
from enum import IntEnum

from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout


class Codec(IntEnum):
    """How the payload of a chunk is encoded."""

    NONE = 0


@dataclass(frozen=True, slots=True)
class Reserve:
    """Sender: asks for blocks. The first frame of a stream."""

    transfer_id: str
    layout: KvLayout
    #: Tokens whose KV will be sent, >= 1.
    num_tokens: int
    #: Tokens the sequence may grow to at the receiver, >= num_tokens.
    max_tokens: int
    #: The receiver's incarnation as the sender knows it.
    incarnation: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Sender: keeps the lease while nothing else is sent. Answered by Granted."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sender: the KV of one range. Where its blocks lie in a pool is each side's own matter."""

    lease_id: int
    incarnation: int
    sequence_number: int
    kv_range: KvRange
    codec: Codec
    #: Ordered [layer, K then V, block, token, kv head, head_dim].
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Finish:
    """Sender: chunks 0..num_chunks-1 are all there are, and all on their way."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Sender: the blocks are the receiver's. token_ids: what prefill sampled."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Sender: gives the transfer up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Granted:
    """Receiver: the blocks are yours under this lease; also the answer to Renew."""

    lease_id: int
    incarnation: int
    #: Chunks that may be unacknowledged at any time, >= 1.
    credits: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """Receiver: no blocks for you. retryable: whether the same may be granted later."""

    reason: str
    retryable: bool


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


SenderFrame = Reserve | Renew | Chunk | Finish | Commit | Abort
ReceiverFrame = Granted | Refused | Ack | Nack | Verified | Committed | Ended
Frame = SenderFrame | ReceiverFrame
