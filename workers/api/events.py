"""What a worker answers: the events of requests, and those of its prefix cache."""

from dataclasses import dataclass
from enum import StrEnum

from workers.api.keys import RequestKey


class FinishReason(StrEnum):
    """Why a sequence ended: a stop token or the end of its grammar, or its length limit."""

    STOP = "stop"
    LENGTH = "length"


class FailureCode(StrEnum):
    """Whose fault a failed request is; `is_retryable` says whether another worker may do better."""

    INVALID = "invalid"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    TRANSFER = "transfer"
    INTERNAL = "internal"

    @property
    def is_retryable(self) -> bool:
        """True for what another worker, or the same one later, may do better."""
        return self in (FailureCode.OVERLOADED, FailureCode.TRANSFER, FailureCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class ImagesWanted:
    """The embeddings of these tiles are not here, and there is room for them now: they are to be encoded.

    tiles: indices in the request's `images`, ascending. Those of `images` that are never wanted are cached, or are
    being encoded for another request. Tiles may be wanted later, or again when what was sent is lost.
    """

    key: RequestKey
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImagesEncoded:
    """An Encode is done: its embeddings are at the prefill worker, or not needed there any more. The last event of its key.

    num_cached: tiles whose embeddings were here already. queue_s: until its first tile was looked at. decode_s: of the
    file. encode_s: its share of the batches that its tiles were in, by patches. transfer_s: from the end of that until
    they had arrived; 0 for a prefill worker that is this one.
    """

    key: RequestKey
    num_tiles: int
    num_cached: int
    num_embeddings: int
    num_bytes: int
    queue_s: float
    decode_s: float
    encode_s: float
    transfer_s: float
    transport: str = ""


@dataclass(frozen=True, slots=True)
class ImagesReduced:
    """What the reduction of a request's pictures left of them; just before its first token.

    num_planned: tokens of the prompt that stood for embeddings. num_encoded: those that were there after merging.
    num_kept: those whose KV is kept. prefill_share: computing the prompt took so much of the multiplications that all its
    tokens would have taken, an estimate. is_too_long: the prompt was, for the filter, and was computed without it.
    """

    key: RequestKey
    num_planned: int
    num_encoded: int
    num_kept: int
    prefill_share: float
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The first prefill step of the request is about to run, `queue_s` after its Submit.

    order_reason: why it did not begin in the order of arrival; empty when it did.
    """

    key: RequestKey
    queue_s: float
    order_reason: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithm of the probability that the model itself gives a token, before any option of sampling.

    rank: 1 for the likeliest token. top: the likeliest tokens with theirs, likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt's tokens from `first_position` on, in order; position 0 has none."""

    key: RequestKey
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class DraftsGenerated:
    """All drafts of a superposed decoding, likeliest first, each with its logprob under the mixed model.

    The only tokens that such a request gets; it ends with them.
    """

    key: RequestKey
    drafts: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DecodingReport:
    """What a decoding method cost; comes before the last token.

    num_rows: rows of the model's decode steps that this request took, a step of one token being one row.
    num_steps: decode steps that the request took part in. num_tokens: tokens that came out of them.
    """

    key: RequestKey
    num_steps: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens; `first_position` counts from the start of the sequence, prompt included."""

    key: RequestKey
    token_ids: tuple[int, ...]
    first_position: int
    finish_reason: FinishReason | None = None
    #: First prefill step to first token; with the first token of the prefill worker only.
    prefill_s: float | None = None
    #: One for each token, when the request asked for them.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Tokens of the prompt whose KV was cached; with the first token of the prefill worker only.
    num_cached_tokens: int = 0
    #: Further tokens whose KV was taken from another context, computed again or not; with the same token only.
    num_reused_tokens: int = 0
    #: Of the cached ones, those that another worker sent for this prompt, and how long it waited for that, whether or not
    #: anything came; with the same token only.
    num_fetched_tokens: int = 0
    prefix_fetch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KvTransferred:
    """The hand-off committed. `exposed_s` is the part of `transfer_s` after prefill had ended.

    num_bytes: of the KV as it lies in the pools. num_wire_bytes: what was moved for it, encoded.
    num_resumes: times that the transfer went on over a new stream. transport, transport_reason, codec: how it
    went and why; empty when the worker does not tell.
    """

    key: RequestKey
    num_bytes: int
    num_chunks: int
    transfer_s: float
    exposed_s: float
    transport: str = ""
    transport_reason: str = ""
    codec: str = ""
    num_wire_bytes: int = 0
    #: Chunks that were sent again, since they came damaged or not at all.
    num_resent_chunks: int = 0
    num_resumes: int = 0
    #: The part of transfer_s in which chunks were on their way: it gives the rate.
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended here without all its tokens."""

    key: RequestKey
    code: FailureCode
    reason: str


Event = (
    ImagesWanted
    | ImagesEncoded
    | ImagesReduced
    | PrefillStarted
    | PromptScored
    | TokensGenerated
    | DraftsGenerated
    | DecodingReport
    | KvTransferred
    | RequestFailed
)


def is_last(event: Event) -> bool:
    """Nothing follows for this request."""
    match event:
        case RequestFailed() | KvTransferred() | DraftsGenerated() | ImagesEncoded():
            return True
        case TokensGenerated():
            return event.finish_reason is not None
        case _:
            return False


@dataclass(frozen=True, slots=True)
class KvBlocksStored:
    """These blocks can be found by their hashes from now on, each the child of the one before it.

    parent: hash of the block before the first; where a prompt begins, that of model, tokenizer and cache salt.
    is_known: they were there before somebody asked to be told, and are told to those alone who have just asked.
    """

    parent: bytes
    hashes: tuple[bytes, ...]
    is_known: bool = False


@dataclass(frozen=True, slots=True)
class KvBlocksRemoved:
    """These blocks are no longer cached."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KvEventsLost:
    """More happened than could be told: what was told before is void. Nothing more is until SubscribeKvEvents comes again."""


KvEvent = KvBlocksStored | KvBlocksRemoved | KvEventsLost
