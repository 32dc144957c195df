"""What a request machine asks of its gateway. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control.view import WorkerView
from workers.api import Command, FinishReason, TokenLogprobs


class FailureKind(StrEnum):
    """What the client is told; the gateway maps these to gRPC statuses."""

    INVALID = "invalid"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Send:
    """Give this command to that incarnation of a worker."""

    worker: WorkerView
    command: Command


@dataclass(frozen=True, slots=True)
class Deliver:
    """New tokens for the client; `first_index` counts generated tokens from 0. logprobs: one each, or none."""

    token_ids: tuple[int, ...]
    first_index: int
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class DeliverPrompt:
    """Logprobs of the next tokens of the prompt, for the client."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class DeliverDrafts:
    """All that a superposed decoding gives the client."""

    drafts: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WantRoute:
    """Give the machine a route when there is one (`routed`)."""

    reason: str


@dataclass(frozen=True, slots=True)
class WantEncoders:
    """Give the machine encode workers for what its `encodes` wants (`encoders_chosen`)."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the client that the request ended without all its tokens."""

    kind: FailureKind
    reason: str


Action = Send | Deliver | DeliverPrompt | DeliverDrafts | WantRoute | WantEncoders | Fail
