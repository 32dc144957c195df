"""The parts of a request's life that a worker can serve."""

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """A part of a request's life that a worker can serve."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


PhaseSet = frozenset[Phase]


@dataclass(frozen=True, slots=True)
class PhasesRefused:
    """Why a worker did not take other phases.

    is_busy: requests there need what it would give up. needs_new_process: for want of other weights, or of memory for pictures.
    """

    reason: str
    is_busy: bool = False
    needs_new_process: bool = False
