"""Mooncake: the conductor's choice at the edges of its ratio, refusals, and what its bound says of reusing KV."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.policies.mooncake import (
    PrefillChoice,
    PrefillInstance,
    choose_prefill,
    early_refusal,
    least_reuse_bandwidth,
    predicted_decode_load,
    predicted_decodes,
    prefill_flops,
)
from workers.api import WorkerId


def instance(name: str, queue_s: float, prefix_tokens: int) -> PrefillInstance:
    return PrefillInstance(WorkerId(name), queue_s, prefix_tokens)


def choose(
    *instances: PrefillInstance, threshold: float = 2.0, transfer_token_s: float = 1e-4
) -> PrefillChoice:
    """A prompt of 1,000 tokens at a millisecond each, or a tenth of that to fetch one."""
    return choose_prefill(
        instances,
        1000,
        balancing_threshold=threshold,
        prefill_s=lambda num, known: (num - known) * 1e-3,
        transfer_s=lambda source, target, num: num * transfer_token_s,
    )


# The conductor.


def test_the_prompt_goes_where_its_beginning_is() -> None:
    found = choose(instance("a", 0.0, 0), instance("b", 0.05, 800))
    # On `a` it would take 0.08 s to fetch and 0.2 s to compute.
    assert found == PrefillChoice(WorkerId("b"), pytest.approx(0.25), 800, None)


def test_behind_a_long_queue_the_beginning_is_fetched_elsewhere() -> None:
    found = choose(instance("a", 0.0, 0), instance("b", 0.5, 800))
    assert found == PrefillChoice(WorkerId("a"), pytest.approx(0.28), 800, WorkerId("b"))


@pytest.mark.parametrize(
    ("own", "known", "is_fetched"), [(0, 800, True), (399, 800, True), (400, 400, False), (800, 800, False)]
)
def test_only_what_passes_the_threshold_is_fetched(own: int, known: int, is_fetched: bool) -> None:
    found = choose(instance("a", 0.0, own), instance("b", 9.0, 800))
    assert (found.worker_id, found.prefix_tokens) == (WorkerId("a"), known)
    assert (found.fetched_from is not None) == is_fetched
    # Of what is missing alone.
    transfer_s = 1e-4 * (800 - own) if is_fetched else 0.0
    assert found.ttft_s == pytest.approx(transfer_s + 1e-3 * (1000 - known))


def test_where_nobody_has_anything_the_shortest_queue_computes_it() -> None:
    assert choose(instance("a", 0.2, 0), instance("b", 0.1, 0)) == PrefillChoice(
        WorkerId("b"), pytest.approx(1.1), 0, None
    )


def test_nobody_fetches_from_itself_or_from_an_equal_whatever_the_threshold() -> None:
    found = choose(instance("a", 0.0, 500), instance("b", 0.1, 500), threshold=0.5)
    assert found.fetched_from is None


def test_as_published_the_ratio_decides_even_where_computing_is_faster() -> None:
    found = choose(instance("a", 0.0, 0), instance("b", 9.0, 800), transfer_token_s=5e-3)
    assert (found.fetched_from, found.ttft_s) == (WorkerId("b"), pytest.approx(4.2))


queues = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1000)), min_size=1, max_size=6)


@given(queues, st.floats(1, 10))
def test_no_instance_would_have_been_faster_by_computing_what_it_lacks_after_a_free_transfer(
    queue: list[tuple[float, int]], threshold: float
) -> None:
    instances = [instance(str(i), *one) for i, one in enumerate(queue)]
    found = choose(*instances, threshold=threshold, transfer_token_s=0.0)
    best = max(prefix for _, prefix in queue)
    assert found.ttft_s >= min(wait_s for wait_s, _ in queue) + 1e-3 * (1000 - best) - 1e-9
    assert found.ttft_s <= min(wait_s + 1e-3 * (1000 - prefix) for wait_s, prefix in queue) + 1e-9


# Refusals.


def test_early_refusal_looks_at_the_larger_load() -> None:
    assert early_refusal(1.0, 1.0) is None
    assert early_refusal(0.2, 1.25) == "the load of decode is 1.25"
    assert early_refusal(1.5, 1.25) == "the load of prefill is 1.50"


def test_golden_who_decodes_at_the_horizon() -> None:
    # Each decodes for 10 s. Of three that decode one has ended by 8; of three in prefill one is not there yet.
    found = predicted_decodes(
        at_s=8.0, decode_s=10.0, decode_began_s=[-3.0, -2.0, 1.0], prefill_ends_s=[2.0, 8.0, 9.0]
    )
    assert found == 3
    load = predicted_decode_load(found, 2, tbt_s=lambda num: 0.02 + 0.01 * num, target_s=0.1)
    assert load == pytest.approx(0.35)


def test_a_prediction_sees_the_requests_that_the_moment_does_not() -> None:
    # A burst: forty prompts are in prefill and none decodes.
    prefill_ends_s = [0.1 * i for i in range(1, 41)]

    def load(at_s: float) -> float:
        num = predicted_decodes(at_s=at_s, decode_s=20.0, decode_began_s=[], prefill_ends_s=prefill_ends_s)
        return predicted_decode_load(num, 1, tbt_s=lambda num: 0.005 * num, target_s=0.1)

    assert early_refusal(0.5, load(0.0)) is None
    assert early_refusal(0.5, load(4.0)) is not None
    # And that they will have ended.
    assert early_refusal(0.5, load(30.0)) is None


# Reuse.


def test_golden_bandwidth_from_which_on_reuse_pays() -> None:
    # Llama-3-70B, 8,192 tokens, on 8 A800 of 312 TFLOP/s.
    llama = {"width": 8192, "num_groups": 8, "element_bytes": 2}
    assert least_reuse_bandwidth(8192, flops_per_s=8 * 312e12, **llama) == pytest.approx(5.86e9, rel=1e-3)


@given(num=st.integers(1, 100_000), width=st.sampled_from([576, 4096, 8192]))
def test_it_is_where_computing_and_fetching_take_as_long(num: int, width: int) -> None:
    bandwidth = least_reuse_bandwidth(num, flops_per_s=1e15, width=width, num_groups=4, element_bytes=2)
    computing_s = prefill_flops(num, num_layers=7, width=width) / 1e15
    kv_bytes = num * 7 * 2 * (width / 4) * 2
    assert kv_bytes / bandwidth == pytest.approx(computing_s)
    # A longer prefix pays on a slower network.
    assert bandwidth >= least_reuse_bandwidth(
        num + 1, flops_per_s=1e15, width=width, num_groups=4, element_bytes=2
    )
