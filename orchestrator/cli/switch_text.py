"""What is printed of changes of phases, of the number of workers and of refusals, for people and as JSON. Pure."""

from typing import Any

from orchestrator.cli.transfer_text import counted, seconds
from orchestrator.control.role_switch import phase_text
from orchestrator.control.view import ScaleView, SwitchState, SwitchView
from protos import control_pb2 as pb
from workers.api import Phase, PhaseSet
from workers.wire import phases_from_pb


def switch_text(switch: SwitchView) -> str:
    """One line, of the state in which it is."""
    what = f"{switch.worker_id}: {phase_text(switch.before)} -> {phase_text(switch.phases)}"
    match switch.state:
        case SwitchState.UNDONE:
            return f"{what}: not done: {switch.reason}"
        case SwitchState.CHANGED | SwitchState.PROVEN:
            took = f" in {seconds(switch.change_s)}" if switch.change_s is not None else ""
            first = switch.first_step_s
            proof = f", first step after {seconds(first)}" if first is not None else ""
            return f"{what}: done{took}{proof}: {switch.reason}"
        case _:
            how = " by a new process" if switch.needs_new_process else ""
            return f"{what}: {switch.state}{how}: {switch.reason}"


def switch_json(switch: SwitchView) -> dict[str, Any]:
    """All of it."""
    return {
        "switch_id": switch.switch_id,
        "worker_id": switch.worker_id,
        "before": _names(switch.before),
        "phases": _names(switch.phases),
        "state": switch.state.value,
        "reason": switch.reason,
        "why": switch.why,
        "change_s": switch.change_s,
        "first_step_s": switch.first_step_s,
        "predicted": switch.predicted,
        "digest": switch.digest,
        "met_before": switch.met_before,
        "met_after": switch.met_after,
        "needs_new_process": switch.needs_new_process,
    }


def scale_text(scale: ScaleView) -> str:
    """One line, of the state in which it is."""
    return f"{scale.num_before} -> {scale.num_wanted} workers: {scale.state}: {scale.reason}"


def scale_json(scale: ScaleView) -> dict[str, Any]:
    """All of it."""
    return {
        "scale_id": scale.scale_id,
        "num_before": scale.num_before,
        "num_wanted": scale.num_wanted,
        "state": scale.state.value,
        "reason": scale.reason,
        "why": scale.why,
        "predicted": scale.predicted,
        "digest": scale.digest,
        "met_before": scale.met_before,
        "met_after": scale.met_after,
    }


def refusals_text(refusals: pb.Refusals) -> str:
    """One line: how many, why, and when one like them would be taken."""
    ttft = _range(refusals.least_ttft_s, refusals.most_ttft_s)
    retry = _range(refusals.least_retry_after_s, refusals.most_retry_after_s)
    within = f" in {seconds(refusals.lasted_s)}" if refusals.num > 1 else ""
    return (
        f"{counted(refusals.num, 'request')}{within}: predicted TTFT {ttft}, target {seconds(refusals.target_s)} (slo.ttftMs); "
        f"one like {'it' if refusals.num == 1 else 'them'} would be taken in about {retry} (gateway.admission)"
    )


def _range(least_s: float, most_s: float) -> str:
    least, most = seconds(least_s), seconds(most_s)
    return least if least == most else f"{least} to {most}"


def refusals_json(refusals: pb.Refusals) -> dict[str, Any]:
    """All of it."""
    return {
        "num_refused": refusals.num,
        "lasted_s": refusals.lasted_s,
        "target_s": refusals.target_s,
        "least_ttft_s": refusals.least_ttft_s,
        "most_ttft_s": refusals.most_ttft_s,
        "least_retry_after_s": refusals.least_retry_after_s,
        "most_retry_after_s": refusals.most_retry_after_s,
    }


def forecast_text(forecast: pb.SwitchForecast) -> str:
    """What a dry run found."""
    if forecast.problem:
        return f"it may not: {forecast.problem}"
    gives_up, gains = (phase_text(phases_from_pb(one)) for one in (forecast.gives_up, forecast.gains))
    parts = (gains and f"gains {gains}", gives_up and f"gives up {gives_up}")
    changes = ", ".join(text for text in parts if text)
    prompts = counted(forecast.num_prompts, "waiting prompt")
    sequences = counted(forecast.num_sequences, "sequence")
    how = "a new process takes its place, in" if forecast.needs_new_process else "in"
    took = f"{how} about {seconds(forecast.about_s)}"
    return f"it may: it {changes}; {took}; {prompts} would go to others, {sequences} would move with their KV"


def forecast_json(forecast: pb.SwitchForecast) -> dict[str, Any]:
    """All of it."""
    return {
        "gives_up": _names(phases_from_pb(forecast.gives_up)),
        "gains": _names(phases_from_pb(forecast.gains)),
        "num_prompts": forecast.num_prompts,
        "num_sequences": forecast.num_sequences,
        "problem": forecast.problem,
        "needs_new_process": forecast.needs_new_process,
        "about_s": forecast.about_s,
    }


def _names(phases: PhaseSet) -> list[str]:
    return [phase.value for phase in Phase if phase in phases]
