"""What is remembered of a sequence that went on at another worker. Pure."""

from dataclasses import dataclass

from workers.api import KvTransferred, WorkerId


@dataclass(slots=True)
class Migration:
    """attempt: of its request. at_s: when it was asked for, on the gateway's clock. num_tokens: that the client had then.

    pause_s: from the last token of the one worker to the first of the other; None until that. transfer: of its KV; None until it
    was reported.
    """

    attempt: int
    source: WorkerId
    target: WorkerId
    reason: str
    at_s: float
    num_tokens: int
    pause_s: float | None = None
    transfer: KvTransferred | None = None
