"""Who is passed over where not all can be in time, what those that are too late get, and the tokens of tenants."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.prompt_order import (
    LATE_SHARE,
    MAX_IDLE_TENANTS,
    Due,
    LateTokens,
    Standing,
    TenantTokens,
    standings,
)


def is_in_time(prompts: list[Due], begin_s: float) -> bool:
    end_s = begin_s
    for one in sorted(prompts):
        end_s += one.left_s
        if end_s > one.deadline_s:
            return False
    return True


DUES = st.builds(Due, st.integers(0, 20).map(float), st.integers(1, 8).map(float), st.just(0.0))


@given(st.lists(DUES, max_size=8), st.integers(0, 5).map(float))
def test_no_choice_of_others_has_fewer_late_ones(prompts: list[Due], begin_s: float) -> None:
    """Beside all that there are."""
    prompts.sort(key=lambda one: one.key)
    found = standings(prompts, begin_s)
    kept = [one for one, kind in zip(prompts, found, strict=True) if kind is Standing.ON_TIME]
    assert is_in_time(kept, begin_s)
    assert not any(is_in_time(list(some), begin_s) for some in combinations(prompts, len(kept) + 1))
    for one, kind in zip(prompts, found, strict=True):
        assert (kind is Standing.LATE) == (begin_s + one.left_s > one.deadline_s)


@given(
    st.lists(st.builds(Due, st.floats(0, 20), st.floats(0, 8), st.floats(0, 100)), max_size=20),
    st.floats(0, 5),
)
def test_who_is_on_time_is_so_whatever_tenants_owe(prompts: list[Due], begin_s: float) -> None:
    prompts.sort(key=lambda one: one.key)
    end_s = begin_s
    for one, kind in zip(prompts, standings(prompts, begin_s), strict=True):
        if kind is Standing.ON_TIME:
            end_s += one.left_s
            assert end_s <= one.deadline_s + 1e-6


def test_who_owes_is_passed_over_before_who_takes_longer() -> None:
    owing, long = Due(3.0, 1.0, 10.0), Due(2.5, 2.0)
    last = Due(20.0, 1.0)
    assert standings([long, owing, last], 0.5) == [Standing.ON_TIME, Standing.PASSED_OVER, Standing.ON_TIME]


@given(steps=st.lists(st.integers(1, 500), min_size=1, max_size=300), most=st.integers(1, 3000))
def test_those_that_are_too_late_get_their_share(steps: list[int], most: int) -> None:
    """Beside others that always have something; num_left and steps in tokens."""
    late, given, total, num_left = LateTokens(), 0, 0, most
    late.is_anyone_late = True
    for size in steps:
        is_turn = late.is_enough_for(num_left)
        taken = num_left if is_turn else size
        late.charge(Standing.LATE if is_turn else Standing.ON_TIME, taken)
        given, total = given + taken * is_turn, total + taken * (not is_turn)
        assert given <= LATE_SHARE * total <= given + most + LATE_SHARE * 500


def test_where_nobody_is_too_late_nothing_is_owed() -> None:
    late = LateTokens()
    late.charge(Standing.ON_TIME, 10_000)
    assert not late.is_enough_for(10)
    late.is_anyone_late = True
    late.charge(Standing.ON_TIME, 10_000)
    assert late.is_enough_for(10)
    late.is_anyone_late = False
    late.charge(Standing.ON_TIME, 10_000)
    assert not late.is_enough_for(10)


def test_a_tenant_that_got_more_owes_it_by_weight() -> None:
    tokens = TenantTokens()
    tokens.are_waiting({"a", "b", "c"})
    tokens.charge("a", 100)
    tokens.charge("b", 100, 4.0)
    assert tokens.debts() == {"a": 100.0, "b": 25.0, "c": 0.0}


def test_a_tenant_that_comes_back_has_no_claim_on_what_it_did_not_use() -> None:
    tokens = TenantTokens()
    tokens.are_waiting({"idle", "busy"})
    tokens.are_waiting({"busy"})
    tokens.charge("busy", 1000)
    tokens.are_waiting({"idle", "busy"})
    assert tokens.debts() == {"idle": 0.0, "busy": 0.0}
    # What it got before it went is not forgotten.
    tokens.charge("busy", 500)
    tokens.are_waiting({"idle"})
    tokens.are_waiting({"idle", "busy"})
    assert tokens.debts() == {"idle": 0.0, "busy": 500.0}


def test_after_a_pause_nobody_owes_for_the_time_before() -> None:
    tokens = TenantTokens()
    tokens.are_waiting({"a"})
    tokens.charge("a", 1000)
    tokens.are_waiting(set())
    tokens.are_waiting({"a", "b"})
    assert tokens.debts() == {"a": 0.0, "b": 0.0}


@given(
    steps=st.lists(
        st.tuples(st.sets(st.sampled_from("abcd"), min_size=1), st.integers(0, 1000), st.floats(0.1, 10)),
        min_size=1,
        max_size=40,
    )
)
def test_somebody_who_waits_owes_nothing_and_only_what_was_computed_is_owed(
    steps: list[tuple[set[str], int, float]],
) -> None:
    tokens = TenantTokens()
    total = 0.0
    for waiting, num_tokens, weight in steps:
        tokens.are_waiting(waiting)
        tokens.charge(min(waiting), num_tokens, weight)
        total += num_tokens / weight
        debts = tokens.debts()
        assert debts.keys() == waiting
        assert min(debts.values()) == 0.0
        assert max(debts.values()) <= total * (1 + 1e-9)


def test_service_by_debt_is_shared_by_weight() -> None:
    tokens, given_to = TenantTokens(), {"a": 0, "b": 0}
    weights = {"a": 3.0, "b": 1.0}
    tokens.are_waiting(weights.keys())
    for _ in range(400):
        debts = tokens.debts()
        first = min(debts, key=lambda one: (debts[one], one))
        tokens.charge(first, 50, weights[first])
        given_to[first] += 50
    assert given_to["a"] / given_to["b"] == pytest.approx(3.0, rel=0.02)


def test_the_tenants_that_are_remembered_are_few() -> None:
    tokens = TenantTokens()
    for number in range(5 * MAX_IDLE_TENANTS):
        tokens.are_waiting({f"tenant-{number}"})
        tokens.charge(f"tenant-{number}", 10)
    assert len(tokens._virtual) <= MAX_IDLE_TENANTS + 1
