"""Is a Submit something that this worker can make sense of? Pure.

The engine refuses what it has no room for; here is refused what would mean nothing, or break something.
"""

import math

from workers.api import MAX_SALT_CHARS, Handoff, Phase, PhaseSet, Submit
from workers.sampling_check import sampling_problem

MAX_ID_CHARS = 256


def submit_problem(submit: Submit, vocab_size: int) -> str | None:
    """What is wrong, beginning with the field's name; None when nothing is."""
    if not 0 < len(submit.key.request_id) <= MAX_ID_CHARS:
        return f"request_id: has {len(submit.key.request_id)} characters; 1 to {MAX_ID_CHARS} are allowed"
    if not submit.phases:
        return "phases: is empty; name prefill, decode or both"
    if not submit.token_ids:
        return "token_ids: is empty; a prompt has at least one token"
    lowest, highest = min(submit.token_ids), max(submit.token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        return f"token_ids: {wrong} is not in the vocabulary; allowed are 0 to {vocab_size - 1}"
    if not (math.isfinite(submit.timeout_s) and submit.timeout_s > 0):
        return f"timeout_s: is {submit.timeout_s:g}; a finite number of seconds above 0 is needed"
    if not 0 <= submit.num_delivered < len(submit.token_ids):
        allowed = f"0 to {len(submit.token_ids) - 1}, since one token at least is the prompt's"
        return f"num_delivered: is {submit.num_delivered}; allowed: {allowed}"
    if len(submit.cache_salt) > MAX_SALT_CHARS:
        return f"cache_salt: has {len(submit.cache_salt)} characters; at most {MAX_SALT_CHARS} are allowed"
    problem = sampling_problem(submit.sampling, vocab_size)
    if problem is not None:
        return f"sampling.{problem.field}: is {problem.value}; allowed: {problem.allowed}"
    return _handoff_problem(submit.handoff, submit.phases)


def _handoff_problem(handoff: Handoff | None, phases: PhaseSet) -> str | None:
    is_split = len(phases & {Phase.PREFILL, Phase.DECODE}) == 1
    if handoff is None:
        return "handoff: is missing; one of prefill and decode alone needs it" if is_split else None
    if not is_split:
        return "handoff: is set, but prefill and decode are both asked of this worker"
    if not 0 < len(handoff.transfer_id) <= MAX_ID_CHARS:
        return (
            f"handoff.transfer_id: has {len(handoff.transfer_id)} characters; 1 to {MAX_ID_CHARS} are allowed"
        )
    if Phase.PREFILL in phases and not _is_address(handoff.decode_address):
        return f"handoff.decode_address: {handoff.decode_address!r} is not host:port"
    return None


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
