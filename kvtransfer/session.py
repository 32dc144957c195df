"""What the sender's and the receiver's machine have in common: states, events, actions, one step. Pure.

A machine is a table (state, event) -> handler. `handle(event, now_s)` looks the handler up, which notes
the actions to perform and returns the next state. Frames of the other side are events too. Two rules
hold in every state and are therefore not in the tables:

- what a deadline ends, it ends before the event is looked at;
- an event without a row breaks the protocol: the transfer is aborted, with the reason. In a state that
  is final nothing happens any more.

The tables: `sender.TABLE`, `receiver.TABLE`. A picture of both: docs/kvtransfer.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import PhasewiseTransferError
from kvtransfer.frames import Chunk, Frame, Reserve
from kvtransfer.kv_range import KvRange


class TransferState(StrEnum):
    """Where a transfer stands, as one side sees it."""

    #: Nothing was said yet.
    NEW = "new"
    #: Blocks are asked for.
    REQUESTED = "requested"
    #: There is a lease on them.
    RESERVED = "reserved"
    #: Chunks are on their way.
    RECEIVING = "receiving"
    #: All of them are in the receiver's cache, whole.
    VERIFIED = "verified"
    #: The stream broke; the lease lives on for a while, in which the sender may come back.
    SUSPENDED = "suspended"
    #: Receiver, final: the blocks belong to the sequence.
    COMMITTED = "committed"
    #: Sender, final: the receiver committed, and the blocks here are back.
    RELEASED = "released"
    #: Final: a deadline passed.
    EXPIRED = "expired"
    #: Final: one side gave up.
    ABORTED = "aborted"


FINAL = frozenset(
    {TransferState.COMMITTED, TransferState.RELEASED, TransferState.EXPIRED, TransferState.ABORTED}
)
#: The states before those, in order.
LIVE = tuple(state for state in TransferState if state not in FINAL)


# Events that are not frames.


@dataclass(frozen=True, slots=True)
class Started:
    """Sender: the stream is there."""


@dataclass(frozen=True, slots=True)
class KvReady:
    """Sender: the KV of this range is computed and stays as it is. Each (layer, block) once."""

    kv_range: KvRange


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """Sender: all KV is ready, and prefill sampled these tokens."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Sender: the chunk was read from the pool and is about to leave. num_bytes: as they travel."""

    sequence_number: int
    checksum: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkWritten:
    """Receiver: the chunk is in its blocks, and is what was sent."""

    sequence_number: int


@dataclass(frozen=True, slots=True)
class ChunkDamaged:
    """Receiver: what came, or what was copied, is not what was sent."""

    sequence_number: int
    reason: str


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """Receiver: answer to ReserveBlocks. The blocks are the transfer's until it releases or commits them.

    transport: how the sender's pool can be read from here, or "grpc"; transport_reason: why not by a better way.
    """

    block_ids: tuple[int, ...]
    transport: str = "grpc"
    transport_reason: str = ""


@dataclass(frozen=True, slots=True)
class ReservationDenied:
    """Receiver: answer to ReserveBlocks."""

    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class FrameDamaged:
    """What came is whole, and makes no sense. sequence_number: of the chunk whose payload cannot be unpacked.

    Of a frame that is not whole nothing can be believed: it breaks the stream.
    """

    error: PhasewiseTransferError
    sequence_number: int | None = None


@dataclass(frozen=True, slots=True)
class StreamBroke:
    """Nothing can be sent or received any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class HostBroke:
    """Reading or writing the cache here raised."""

    problem: str


@dataclass(frozen=True, slots=True)
class PartsWhole:
    """Receiver: every part of the transfer is verified, and is to be committed. Nothing can hinder it any more."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """This side does not want the transfer any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`next_deadline_s` was reached."""


# Actions.


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send this control frame."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Sender: read this range, by these heads, and send it as a chunk. Answered by ChunkRead."""

    lease_id: int
    incarnation: int
    sequence_number: int
    kv_range: KvRange
    heads: tuple[int, int]
    codec: CodecId
    #: "grpc" carries the payload; with any other the receiver copies it from the pool here.
    transport: str


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Sender: open another stream after so long; answered by Started, or StreamBroke again."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """Receiver: ask the host for blocks; answered by BlocksReserved or ReservationDenied."""

    request: Reserve


@dataclass(frozen=True, slots=True)
class CancelReservation:
    """Receiver: do not wait for the host any more; it keeps, or takes back, what it had for us."""

    reason: str


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Receiver: put the chunk into these blocks, which hold the sequence from its first token on.

    Answered by ChunkWritten or ChunkDamaged. dtype: of the payload.
    """

    chunk: Chunk
    block_ids: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class CommitBlocks:
    """Receiver: the blocks are the sequence's from now on."""

    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    #: See digest.token_digest: of the tokens whose KV this is.
    token_digest: bytes


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """Give the transfer's blocks back to the pool."""

    block_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a transfer that committed has moved, and how long it took."""

    #: KV, each byte counted once.
    num_bytes: int
    #: The same as it travelled: packed, with headers, and with what was sent again; headers alone of what is read in place.
    num_wire_bytes: int
    num_chunks: int
    #: First chunk handed to the transport to commit, in seconds.
    transfer_s: float
    #: The part of it in which chunks were on their way.
    busy_s: float
    #: The part of it after prefill had finished.
    exposed_s: float
    #: How it was sent, and why not by a better way.
    transport: str
    transport_reason: str
    codec: CodecId
    num_resent_chunks: int
    num_resumes: int


@dataclass(frozen=True, slots=True)
class End:
    """The machine is in a final state. Nothing follows. error: why, unless it went well."""

    error: PhasewiseTransferError | None
    #: Of a sender whose transfer committed.
    report: TransferReport | None = None


Action = (
    SendFrame
    | SendChunk
    | Reconnect
    | ReserveBlocks
    | CancelReservation
    | WriteChunk
    | CommitBlocks
    | ReleaseBlocks
    | End
)

#: (state, type of the event) -> handler(machine, event, now_s) -> next state.
Table = Mapping[tuple[TransferState, type], Callable[[Any, Any, float], TransferState]]


class Machine(ABC):
    """One step of a table. Knows no role."""

    def __init__(self, table: Table) -> None:
        self.state = TransferState.NEW
        self._table = table
        self._actions: list[Action] = []

    @property
    def is_ended(self) -> bool:
        """True in a final state."""
        return self.state in FINAL

    @property
    @abstractmethod
    def transfer_id(self) -> str:
        """As the sender named it; empty before the receiver has heard it."""

    @property
    @abstractmethod
    def next_deadline_s(self) -> float:
        """When `TimePassed` is due; infinite when there is nothing to wait for."""

    def wants(self, _chunk: Chunk) -> bool:
        """Whether it is worth the work to unpack this chunk: it will be written if it is whole."""
        return False

    @property
    def num_in_flight(self) -> int:
        """Of a sender: chunks that are to be sent now, or were and are not acknowledged."""
        return 0

    def handle(self, event: object, now_s: float) -> list[Action]:
        """What to do about this event, in order. Empty when the machine has ended."""
        if not self.is_ended:
            self.state = self._step(event, now_s)
        actions, self._actions = self._actions, []
        return actions

    def _step(self, event: object, now_s: float) -> TransferState:
        late = self._end_if_late(event, now_s)
        if late is not None:
            return late
        handler = self._table.get((self.state, type(event)))
        if handler is None:
            return self._unexpected(event)
        return handler(self, event, now_s)

    @abstractmethod
    def _end_if_late(self, event: object, now_s: float) -> TransferState | None:
        """End what a deadline ends; None when none has passed."""

    @abstractmethod
    def _unexpected(self, event: object) -> TransferState:
        """End because the table has no row for this event."""

    def _stay(self, _event: object, _now_s: float) -> TransferState:
        """Handler of what may come and changes nothing."""
        return self.state

    def _do(self, *actions: Action) -> None:
        self._actions.extend(actions)
