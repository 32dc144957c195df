"""What the transfers of a worker say to its engine, and the engine to them. Pure.

Commands and events of requests are in `workers.api`; these stay inside the process.
"""

from dataclasses import dataclass

from workers.api import Command, Event, KvEvent, RequestKey, TokensGenerated


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """A transfer asks for blocks for `max_tokens` tokens; answered once, at the latest at `deadline_s`."""

    transfer_id: str
    num_tokens: int
    max_tokens: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class CancelReservation:
    """Whoever asked is gone; an unanswered ReserveBlocks is forgotten."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """All KV has arrived and is verified; `token_ids` are what prefill sampled."""

    transfer_id: str
    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReleaseTransfer:
    """The transfer is done with these blocks, on the sending or the receiving side."""

    transfer_id: str
    block_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class TransferSent:
    """The sending side committed."""

    transfer_id: str
    num_bytes: int
    num_chunks: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The sending side gave up."""

    transfer_id: str
    reason: str


Message = (
    Command
    | ReserveBlocks
    | CancelReservation
    | CommitTransfer
    | ReleaseTransfer
    | TransferSent
    | TransferFailed
)


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """Answer to ReserveBlocks. The blocks come back by CommitTransfer or ReleaseTransfer alone."""

    transfer_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReservationRefused:
    """Answer to ReserveBlocks."""

    transfer_id: str
    reason: str
    is_retryable: bool


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Begin to send: prefill of the sequence starts with this step.

    block_ids hold the prompt, in order; from now on they return by ReleaseTransfer alone.
    """

    key: RequestKey
    transfer_id: str
    decode_address: str
    decode_incarnation: int
    block_ids: tuple[int, ...]
    num_tokens: int
    max_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class KvReady:
    """KV of these layers and logical blocks is computed and stays as it is."""

    transfer_id: str
    layer_lo: int
    layer_hi: int
    block_lo: int
    block_hi: int


@dataclass(frozen=True, slots=True)
class FinishTransfer:
    """Prefill has ended with these tokens; commit when all KV has arrived."""

    transfer_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndTransfer:
    """The request is over on this side: end the transfer, sending or receiving, and release its blocks."""

    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TokensDecoded:
    """One more token for each of these requests, none of which ends with it: TokensGenerated for many at once."""

    keys: tuple[RequestKey, ...]
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]

    def events(self) -> list[TokensGenerated]:
        """One event for each request."""
        each = zip(self.keys, self.token_ids, self.positions, strict=True)
        return [TokensGenerated(key, (token_id,), position) for key, token_id, position in each]


Output = (
    Event
    | KvEvent
    | TokensDecoded
    | BlocksReserved
    | ReservationRefused
    | StartTransfer
    | KvReady
    | FinishTransfer
    | EndTransfer
)
