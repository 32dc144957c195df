"""What a Submit must be like for an engine to take it, whatever else runs there. Pure."""

from kvtransfer.layout import blocks_needed
from workers.api import FailureCode, Phase, PhaseSet, Submit


def reason_to_refuse(
    submit: Submit, phases: PhaseSet, *, block_size: int, num_blocks: int, max_context_tokens: int
) -> tuple[FailureCode, str] | None:
    """Why a worker of these phases can never run it; None when it can.

    num_blocks: all that the pool has. max_context_tokens: the model's limit.
    """
    problem = _phase_problem(submit, phases)
    if problem is not None:
        return problem
    if len(submit.token_ids) == 0:
        return FailureCode.INVALID, "the prompt is empty"
    num_tokens = len(submit.token_ids) + submit.sampling.max_new_tokens
    if num_tokens > max_context_tokens:
        return (
            FailureCode.INVALID,
            f"{num_tokens} tokens with the output; the context holds {max_context_tokens}",
        )
    num_tokens_here = num_tokens if Phase.DECODE in submit.phases else len(submit.token_ids)
    need = blocks_needed(num_tokens_here, block_size)
    if need > num_blocks:
        return FailureCode.INVALID, f"needs {need} KV blocks; the pool has {num_blocks}"
    return None


def _phase_problem(submit: Submit, phases: PhaseSet) -> tuple[FailureCode, str] | None:
    wanted = submit.phases
    if not wanted or not wanted <= phases:
        return FailureCode.INTERNAL, f"asked for {phase_names(wanted)}; serves {phase_names(phases)}"
    is_whole = wanted >= {Phase.PREFILL, Phase.DECODE}
    if not wanted & {Phase.PREFILL, Phase.DECODE}:
        return FailureCode.INVALID, f"{phase_names(wanted)} yields no token; ask for prefill or decode"
    if is_whole and submit.handoff is not None:
        return FailureCode.INVALID, "prefill and decode on one worker take no hand-off"
    if not is_whole and submit.handoff is None:
        return FailureCode.INVALID, f"{phase_names(wanted)} alone needs a hand-off"
    return None


def phase_names(phases: PhaseSet) -> str:
    """For messages: `{decode, prefill}`."""
    return "{" + ", ".join(sorted(phases)) + "}"
