"""Whether a new request is taken, by its predicted TTFT. Pure."""

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
