"""Mooncake: where a prompt is prefilled, given who has how much of its beginning, and which requests are refused. Pure.

Source: Mooncake (FAST'25), its conductor (prefill by cached prefix and queue, decode by predicted TBT), its bound for reusing KV over a network; its
report (arXiv 2407.00079) for early rejection and early rejection by predicted load.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.api import WorkerId

#: Work of a layer for n tokens of a model of width d: PAIR_FLOPS * n^2 * d + TOKEN_FLOPS * n * d^2.
PAIR_FLOPS = 4
TOKEN_FLOPS = 22


@dataclass(frozen=True, slots=True)
class PrefillInstance:
    """What the conductor knows of one. queue_s: until it could begin. prefix_tokens: of the prompt's beginning, cached there."""

    worker_id: WorkerId
    queue_s: float
    prefix_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """Where, with how much of the prompt known, and from whom what it lacks of that is fetched: None computes instead."""

    worker_id: WorkerId
    ttft_s: float
    prefix_tokens: int
    fetched_from: WorkerId | None


def choose_prefill(
    instances: Sequence[PrefillInstance],
    num_tokens: int,
    *,
    balancing_threshold: float,
    prefill_s: Callable[[int, int], float],
    transfer_s: Callable[[WorkerId, WorkerId, int], float],
) -> PrefillChoice:
    """The instance with the least predicted TTFT; ties go to the one that comes first. instances: not empty.

    balancing_threshold: how many times more of the prompt than an instance the best one must have for it to fetch that; the paper has no value.
    As published the ratio alone decides so, even where computing would be faster. An instance with nothing fetches whatever there is. prefill_s: of
    (tokens of the prompt, of which known). transfer_s: from, to, of so many tokens' KV, only what is missing.
    """
    best = max(instances, key=lambda one: one.prefix_tokens)
    choices = []
    for one in instances:
        known, fetched_from, ttft_s = one.prefix_tokens, None, one.queue_s
        if best.prefix_tokens > balancing_threshold * known and best.prefix_tokens > known:
            known, fetched_from = best.prefix_tokens, best.worker_id
            ttft_s += transfer_s(best.worker_id, one.worker_id, best.prefix_tokens - one.prefix_tokens)
        choices.append(
            PrefillChoice(one.worker_id, ttft_s + prefill_s(num_tokens, known), known, fetched_from)
        )
    return min(choices, key=lambda choice: choice.ttft_s)


def early_refusal(prefill_load: float, decode_load: float) -> str | None:
    """Why a request is refused before prefill is spent on it: the larger load passes 1; None when neither does. Loads: predicted time / its target.

    With the decode load of the moment of arrival it swings: requests are let in while decode is idle, and all get there a prefill later. With
    that of `predicted_decode_load` less so.
    """
    phase, load = ("prefill", prefill_load) if prefill_load >= decode_load else ("decode", decode_load)
    return f"the load of {phase} is {load:.2f}" if load > 1.0 else None


def predicted_decodes(
    *, at_s: float, decode_s: float, decode_began_s: Sequence[float], prefill_ends_s: Sequence[float]
) -> int:
    """Requests that will decode at a time, if each decodes for decode_s from the end of its prefill on.

    at_s: when the prefill of the request that asks would end. decode_began_s: of those that decode now. prefill_ends_s: as predicted, of those that
    wait for prefill or are in it. The paper has one decode_s for all and says no value.
    """
    return sum(begin_s <= at_s < begin_s + decode_s for begin_s in (*decode_began_s, *prefill_ends_s))


def predicted_decode_load(
    num_decodes: int, num_instances: int, *, tbt_s: Callable[[float], float], target_s: float
) -> float:
    """Mean predicted TBT / its target, with the requests spread evenly. tbt_s: of so many requests on one instance. num_instances >= 1."""
    return tbt_s(num_decodes / num_instances) / target_s


def prefill_flops(num_tokens: int, *, num_layers: int, width: int) -> float:
    """Of a whole prompt. width: of the hidden state."""
    return float(num_layers * (PAIR_FLOPS * num_tokens**2 * width + TOKEN_FLOPS * num_tokens * width**2))


def least_reuse_bandwidth(
    prefix_tokens: int, *, flops_per_s: float, width: int, num_groups: int, element_bytes: int
) -> float:
    """Bytes a second from which on fetching the KV of a prefix is faster than computing it.

    num_groups: query heads to a KV head. element_bytes: of an element of KV.
    """
    kv_bytes = 2.0 * width * element_bytes / num_groups
    flops = PAIR_FLOPS * prefix_tokens * width + TOKEN_FLOPS * width**2
    return flops_per_s * kv_bytes / flops
