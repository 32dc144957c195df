"""Who is meant: a worker, a request, one attempt at it."""

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One attempt at a request on this worker. A given-up attempt cannot speak for the next."""

    request_id: RequestId
    attempt: int
