"""Whether a new request is taken, by its predicted TTFT. Pure."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control.router import Predicted
from orchestrator.errors import TooLate


class Admission(StrEnum):
    """Which new requests are taken, as long as there is room for them."""

    #: All.
    OFF = "off"
    #: Those that are predicted to have their first token in time.
    PREDICTED = "predicted"


def refusal(predicted: Predicted | None, waited_s: float, target_s: float) -> TooLate | None:
    """Why it is not taken; None when it is.

    predicted: on the best route; None is not known, and it is taken. waited_s: since it arrived. target_s: of its TTFT.
    One that nothing waits before is taken, however late: it would be as late at any other time, and long prompts would never be
    served. The earliest time at which it would be taken is when so much of the wait is over as it is too late, or all of it.
    """
    if predicted is None:
        return None
    ttft_s = waited_s + predicted.ttft_s
    if ttft_s <= target_s or predicted.wait_s <= 0.0:
        return None
    return TooLate(ttft_s, target_s, min(ttft_s - target_s, predicted.wait_s))


#: Refusals of so many seconds are told of together: there may be thousands a second.
TOGETHER_S = 10.0
MAX_REMEMBERED = 1000


@dataclass(slots=True)
class Refusals:
    """Those of a span of time, with what was predicted for them: the least and the most. All in seconds.

    retry_after_s: until one like it would be taken, as `TooLate` has it.
    """

    first_at_s: float
    last_at_s: float
    target_s: float
    ttft_s: tuple[float, float]
    retry_after_s: tuple[float, float]
    num: int = 1


class RefusalLog:
    """How many were refused, and the last MAX_REMEMBERED spans in which some were."""

    def __init__(self) -> None:
        self.num = 0
        self._spans: deque[Refusals] = deque(maxlen=MAX_REMEMBERED)

    def __iter__(self) -> Iterator[Refusals]:
        return iter(self._spans)

    def add(self, now_s: float, problem: TooLate) -> None:
        """One more. now_s does not go back."""
        self.num += 1
        ttft_s, retry_s = problem.predicted_s, problem.retry_after_s
        last = self._spans[-1] if self._spans else None
        if last is None or now_s >= last.first_at_s + TOGETHER_S:
            self._spans.append(Refusals(now_s, now_s, problem.target_s, (ttft_s, ttft_s), (retry_s, retry_s)))
            return
        last.num += 1
        last.last_at_s = now_s
        last.ttft_s = min(last.ttft_s[0], ttft_s), max(last.ttft_s[1], ttft_s)
        last.retry_after_s = min(last.retry_after_s[0], retry_s), max(last.retry_after_s[1], retry_s)
