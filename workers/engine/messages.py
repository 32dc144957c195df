"""What the transfers of a worker say to its engine, and the engine to them. Pure.

Commands and events of requests are in `workers.api`; these stay inside the process.
"""

from dataclasses import dataclass

from kvtransfer.session import TransferReport
from workers.api import (
    Abort,
    Event,
    FailureCode,
    ImageTile,
    KvEvent,
    KvTransferred,
    Migrate,
    PrefixPeer,
    RequestKey,
    Submit,
    SubscribeKvEvents,
    TokensGenerated,
)
from workers.embeddings.kept import KeptEmbeddings


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """A transfer asks for blocks for `max_tokens` tokens; answered once, at the latest at `deadline_s`.

    peer, peer_incarnation: the worker that sends, for the ledger; empty and 0 when they are not known.
    """

    transfer_id: str
    num_tokens: int
    max_tokens: int
    deadline_s: float
    peer: str = ""
    peer_incarnation: int = 0


@dataclass(frozen=True, slots=True)
class CancelReservation:
    """Whoever asked is gone; an unanswered ReserveBlocks is forgotten."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """All KV has arrived and is verified; `token_ids` are those that follow on what the request here knows.

    token_digest: of the tokens whose KV it is (kvtransfer.digest); of a fetched prefix the hash of its last block.
    is_lossy: it came through a codec that changes it, or from a worker with other weights or KV in fewer bits.
    """

    transfer_id: str
    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    token_digest: bytes
    is_lossy: bool = False


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
    report: TransferReport

    def event(self, key: RequestKey) -> KvTransferred:
        """The same, as the gateway hears it."""
        report = self.report
        return KvTransferred(
            key,
            num_bytes=report.num_bytes,
            num_chunks=report.num_chunks,
            transfer_s=report.transfer_s,
            exposed_s=report.exposed_s,
            transport=report.transport,
            transport_reason=report.transport_reason,
            codec=report.codec.name.lower(),
            num_wire_bytes=report.num_wire_bytes,
            num_resent_chunks=report.num_resent_chunks,
            num_resumes=report.num_resumes,
            busy_s=report.busy_s,
        )


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The sending side gave up."""

    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class FindCached:
    """Another worker asks for the beginning of this chain of blocks; answered by CachedFound or ReservationRefused."""

    transfer_id: str
    block_hashes: tuple[bytes, ...]
    min_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixFetched:
    """FetchPrefix is over; `num_tokens` have come, 0 when none were worth it or to be had."""

    transfer_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ImagesGranted:
    """There is room for all tiles of an ImagesNeeded, and they will come. May be said more than once."""

    key: RequestKey
    #: That of the ImagesNeeded.
    asking: int


@dataclass(frozen=True, slots=True)
class ImageReady:
    """The embeddings of a tile that was asked for are in these blocks of the embedding pool, until ImagesReleased.

    All other tiles of the same ImagesNeeded have been granted.
    """

    key: RequestKey
    tile: int
    block_ids: tuple[int, ...]
    #: That of the ImagesNeeded which it answers.
    asking: int = 0
    #: Which of its embeddings there are; None: all.
    kept: KeptEmbeddings | None = None


@dataclass(frozen=True, slots=True)
class ImagesLost:
    """The embeddings of tiles that were asked for cannot be had: the request fails."""

    key: RequestKey
    code: FailureCode
    reason: str


Message = (
    Submit
    | Abort
    | Migrate
    | SubscribeKvEvents
    | ImagesGranted
    | ImageReady
    | ImagesLost
    | FindCached
    | PrefixFetched
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
    """Begin to send: prefill of the sequence starts with this step, or all its KV is there and it goes on elsewhere.

    block_ids hold `num_tokens` tokens, in order; from now on they return by ReleaseTransfer alone.
    """

    key: RequestKey
    transfer_id: str
    decode_address: str
    decode_incarnation: int
    block_ids: tuple[int, ...]
    num_tokens: int
    max_tokens: int
    timeout_s: float
    #: See kvtransfer.digest.
    token_digest: bytes


@dataclass(frozen=True, slots=True)
class KvReady:
    """KV of these layers of these tokens of the sequence is computed and stays as it is."""

    transfer_id: str
    layer_lo: int
    layer_hi: int
    token_lo: int
    token_hi: int


@dataclass(frozen=True, slots=True)
class FinishTransfer:
    """No more KV comes, and the other side has yet to hear of these tokens; commit when all KV has arrived."""

    transfer_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndTransfer:
    """The request is over on this side: end the transfer, sending or receiving, and release its blocks."""

    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class CachedFound:
    """Answer to FindCached. The blocks come back by ReleaseTransfer alone. block_hash: of the last one."""

    transfer_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    block_hash: bytes


@dataclass(frozen=True, slots=True)
class FetchPrefix:
    """A prompt waits for blocks that one of these workers may have; answered by PrefixFetched.

    block_hashes: of those that are not here, each the child of the one before it.
    """

    transfer_id: str
    peers: tuple[PrefixPeer, ...]
    block_hashes: tuple[bytes, ...]
    prefill_tokens_per_s: float
    timeout_s: float


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


@dataclass(frozen=True, slots=True)
class ImagesNeeded:
    """A sequence cannot be computed without the embeddings of these tiles of its `images`; answered by ImageReady.

    It asks for nothing else until ImagesReleased. tiles: (index in Submit.images, the tile).
    """

    key: RequestKey
    tiles: tuple[tuple[int, ImageTile], ...]
    cache_salt: str
    #: See ImageInputs.
    asking: int = 0


@dataclass(frozen=True, slots=True)
class ImagesReleased:
    """The sequence reads no embeddings any more, and waits for none; it may ask again."""

    key: RequestKey


Output = (
    Event
    | ImagesNeeded
    | ImagesReleased
    | KvEvent
    | TokensDecoded
    | BlocksReserved
    | ReservationRefused
    | StartTransfer
    | KvReady
    | FinishTransfer
    | EndTransfer
    | CachedFound
    | FetchPrefix
)
