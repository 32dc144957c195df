"""`--faults` of `phasewise simulate`: read, and told of in the report and its JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.bench.records import RequestRecord
from orchestrator.cli.transfer_text import counted, seconds
from orchestrator.control.declared import DeclaredWorker
from orchestrator.manifest.faults import FaultSection, load_faults
from orchestrator.plot.simulated import FaultMark
from orchestrator.sim.faults import Fault, FaultKind, FaultOutcome
from orchestrator.sim.simulation import SimResult
from workers.api import WorkerId


def read_faults(path: Path, workers: Sequence[DeclaredWorker], duration_s: float) -> tuple[Fault, ...]:
    """Those of the file, by their time. Raises ManifestError."""
    sections = load_faults(path, [one.worker_id for one in workers], duration_s)
    return tuple(sorted(map(_fault, sections), key=lambda fault: fault.at_s))


def _fault(section: FaultSection) -> Fault:
    return Fault(
        section.at_s,
        FaultKind(section.kind),
        WorkerId(section.worker or ""),
        section.duration_s or 0.0,
        section.factor or 1.0,
        section.rate or 0.0,
    )


def num_happened(outcomes: Sequence[FaultOutcome]) -> int:
    """Of all faults, those that broke something."""
    return sum(not one.why_not for one in outcomes)


def faults_line(result: SimResult) -> str:
    """How many there were, and what they cost."""
    num = num_happened(result.faults)
    happened = f"{num}" if num == len(result.faults) else f"{num} of {len(result.faults)}"
    num_again = sum(_is_tried_again(record) for record in result.load.records)
    return (
        f"faults     {happened} happened: {counted(num_again, 'finished request')} tried more than once, "
        f"{counted(result.num_lost, 'message')} lost"
    )


def _is_tried_again(record: RequestRecord) -> bool:
    return record.gateway is not None and record.gateway.attempts > 1


def fault_text(outcome: FaultOutcome) -> str:
    """One line."""
    fault = outcome.fault
    of = f" of {fault.worker_id}" if fault.worker_id else ""
    end = f": did not happen: {outcome.why_not}" if outcome.why_not else _end(outcome)
    return f"fault {fault.kind}{of}{_size(fault)}{end}"


def _size(fault: Fault) -> str:
    times = f", {fault.factor:g} times" if fault.kind is FaultKind.SLOW else ""
    share = f", {100 * fault.rate:.3g}% of messages" if fault.rate else ""
    is_timed = fault.kind not in (FaultKind.CRASH, FaultKind.CONTROLLER_CRASH)
    return times + share + (f", for {seconds(fault.duration_s)}" if is_timed else "")


def _end(outcome: FaultOutcome) -> str:
    fault, over_at_s = outcome.fault, outcome.over_at_s
    after = "" if over_at_s is None else f" after {seconds(over_at_s - fault.at_s)}"
    match fault.kind:
        case FaultKind.CRASH:
            return f": serves again{after}" if after else ": did not serve again before the end"
        case FaultKind.CONTROLLER_CRASH:
            return f": another one{after}" if after else ": no other one before the end"
        case _ if over_at_s is None:
            return ": not over at the end"
        case _:
            is_cut_short = over_at_s < fault.at_s + fault.duration_s
            return f": its process ended{after}" if is_cut_short else ""


def fault_mark(outcome: FaultOutcome) -> FaultMark:
    """Of one that happened, on a picture."""
    fault = outcome.fault
    is_down = fault.kind in (FaultKind.CRASH, FaultKind.CONTROLLER_CRASH)
    return FaultMark(fault.worker_id or None, fault.at_s, outcome.over_at_s, is_down)


def fault_json(outcome: FaultOutcome) -> dict[str, Any]:
    """All of it; times are in seconds since arrivals began."""
    fault, over_at_s = outcome.fault, outcome.over_at_s
    return {
        "at_s": fault.at_s,
        "kind": fault.kind.value,
        "worker_id": fault.worker_id or None,
        "duration_s": fault.duration_s or None,
        "factor": fault.factor if fault.kind is FaultKind.SLOW else None,
        "rate": fault.rate or None,
        "why_not": outcome.why_not,
        "over_at_s": None if over_at_s is None else round(over_at_s, 6),
    }
