"""From what NVML says of a GPU to whether a worker may go on with it. Pure.

Three words for a finding. `unhealthy`: the worker stops serving, and says why and what to do. `noted`: it goes on, and the status says so.
Nothing: all is as it should be.

Sources: NVIDIA XID catalogue, immediate actions for Hopper; NVML, row remapping and clocks event reasons.
"""

from dataclasses import dataclass
from enum import StrEnum

from workers.api import GpuStatus

#: At this and above a slowdown by heat is near.
HOT_C = 85


class Severity(StrEnum):
    """What a finding means for the worker."""

    UNHEALTHY = "unhealthy"
    NOTED = "noted"


@dataclass(frozen=True, slots=True)
class XidRule:
    """What an XID means, and what to do."""

    severity: Severity
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """problem: why the worker cannot go on, empty when it can. notes: what else is worth a line."""

    problem: str = ""
    notes: tuple[str, ...] = ()


_RESET = "drain this GPU, end its processes and reset it (nvidia-smi --gpu-reset), or restart the machine"
_RESTART = "the worker is to be started again; if it comes back, drain this GPU and reset it"
_SUPPORT = "drain this GPU; if it comes back after a reset, have it replaced"
#: The worker that did it fails its own step; for its neighbours on the GPU it means nothing.
_OF_A_PROGRAM = "nothing, unless this worker failed too: then its log has the step"

XIDS = {
    13: XidRule(Severity.NOTED, "a program computed what is not allowed", _OF_A_PROGRAM),
    31: XidRule(Severity.NOTED, "a program used memory that it does not have", _OF_A_PROGRAM),
    43: XidRule(Severity.NOTED, "a program was stopped after a fault of its own", _OF_A_PROGRAM),
    45: XidRule(Severity.NOTED, "a program that ended was cleared away", _OF_A_PROGRAM),
    48: XidRule(Severity.UNHEALTHY, "an uncorrectable error of memory", _RESET),
    62: XidRule(Severity.UNHEALTHY, "the power controller halted", _RESET),
    63: XidRule(Severity.NOTED, "a row of memory will be remapped", "reset the GPU when it is idle"),
    64: XidRule(Severity.UNHEALTHY, "a row of memory could not be remapped", _RESET),
    74: XidRule(Severity.UNHEALTHY, "an error of NVLink", _SUPPORT),
    79: XidRule(
        Severity.UNHEALTHY,
        "the GPU has fallen off the bus",
        "restart the machine; if it comes back, have the GPU replaced",
    ),
    92: XidRule(Severity.NOTED, "many corrected errors of memory", "have the GPU looked at when they go on"),
    94: XidRule(Severity.UNHEALTHY, "an uncorrectable error of memory that was contained", _RESTART),
    95: XidRule(Severity.UNHEALTHY, "an uncorrectable error of memory that was not contained", _RESET),
    109: XidRule(Severity.UNHEALTHY, "switching between programs took too long", _RESET),
    119: XidRule(Severity.UNHEALTHY, "the GPU's system processor does not answer", _RESET),
    120: XidRule(Severity.UNHEALTHY, "the GPU's system processor failed", _RESET),
    140: XidRule(Severity.UNHEALTHY, "an error of memory that was not recovered from", _RESET),
}
_OTHER_XID = XidRule(
    Severity.UNHEALTHY,
    "not in the table here",
    f"look it up in NVIDIA's XID catalogue, and until then {_RESET}",
)

#: Why clocks are low that are worth a line; a power cap under load is usual, and is only shown.
SLOWDOWNS = {
    "hw_slowdown": "the hardware halves its clocks: power or heat",
    "hw_thermal_slowdown": "the hardware slows down by heat: see to its cooling",
    "hw_power_brake": "the power supply has the GPU slow down",
    "sw_thermal_slowdown": "the driver slows down by heat: see to its cooling",
}


def health_of(now: GpuStatus, first: GpuStatus, xids: tuple[int, ...], lost: str = "") -> GpuHealth:
    """What a sample means. The first finding that is unhealthy is the problem.

    first: when the worker began, whose counts it is not to be blamed for. xids: since then. lost: why the GPU cannot be asked any more.
    """
    problems: list[str] = []
    notes: list[str] = []
    if lost:
        problems.append(f"the GPU is lost ({lost}); {XIDS[79].remedy}")
    for xid in dict.fromkeys(xids):
        rule = XIDS.get(xid, _OTHER_XID)
        text = f"XID {xid}, {rule.meaning}; {rule.remedy}"
        (problems if rule.severity is Severity.UNHEALTHY else notes).append(text)
    before, new = first.ecc_uncorrected or 0, (now.ecc_uncorrected or 0) - (first.ecc_uncorrected or 0)
    if new > 0:
        problems.append(f"{new} uncorrectable ECC errors since this worker began; {_RESTART}")
    elif before:
        notes.append(
            f"{before} uncorrectable ECC errors before this worker began; reset the GPU when it is idle"
        )
    if now.has_remap_failed:
        problems.append(f"a row of memory could not be remapped; {_RESET}, then have it replaced")
    if now.is_remap_pending:
        notes.append("a row of memory is remapped at the next reset; reset the GPU when it is idle")
    notes += [SLOWDOWNS[name] for name in now.throttle_reasons if name in SLOWDOWNS]
    if now.temperature_c is not None and now.temperature_c >= HOT_C:
        notes.append(f"{now.temperature_c} C; see to its cooling")
    return GpuHealth(problems[0] if problems else "", tuple(notes))
