"""The table of layouts, and the choice among them."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workers.api import Phase
from workers.device.sm_layouts import SmGroups, SmLayout, choose, layout_table, shared_layout

#: As the driver splits one H100 of 132 SMs.
H100 = SmGroups(group_sms=8, num_groups=15, remainder_sms=12)
PREFILL_DECODE = (Phase.PREFILL, Phase.DECODE)
ALL = tuple(Phase)
GROUPS = st.builds(SmGroups, st.sampled_from([2, 4, 8]), st.integers(1, 24), st.integers(0, 15))
PHASES = st.sampled_from([PREFILL_DECODE, ALL, (Phase.ENCODE, Phase.DECODE), (Phase.ENCODE, Phase.PREFILL)])
SHARE = st.floats(0, 1)


def tables(groups: SmGroups, phases: tuple[Phase, ...], least: int, step: int) -> tuple[SmLayout, ...]:
    return layout_table(groups, phases, least_sms=least, step_groups=step)


def test_an_h100_for_prefill_and_decode() -> None:
    table = layout_table(H100, PREFILL_DECODE)
    counts = [(one.sm_count(Phase.DECODE), one.sm_count(Phase.PREFILL)) for one in table]
    assert counts == [(16, 116), (32, 100), (48, 84), (64, 68), (80, 52), (96, 36), (112, 20)]
    assert str(table[1]) == "decode 32, prefill 100 of 132 SMs"


def test_an_h100_for_three_phases() -> None:
    table = layout_table(H100, ALL, step_groups=4)
    counts = [tuple(part.num_sms for part in one.parts) for one in table]
    assert counts == [
        (16, 16, 100),
        (16, 48, 68),
        (16, 80, 36),
        (48, 16, 68),
        (48, 48, 36),
        (80, 16, 36),
    ]


@given(GROUPS, PHASES, st.integers(1, 32), st.integers(1, 4))
def test_parts_are_disjoint_large_enough_and_use_every_sm(
    groups: SmGroups, phases: tuple[Phase, ...], least: int, step: int
) -> None:
    for layout in tables(groups, phases, least, step):
        assert {part.phase for part in layout.parts} == set(phases)
        assert sum(part.num_sms for part in layout.parts) == groups.num_sms == layout.num_sms
        assert all(part.num_sms >= least for part in layout.parts)
        assert all(
            part.num_sms == part.num_groups * groups.group_sms + part.has_remainder * groups.remainder_sms
            for part in layout.parts
        )
        taken = [
            number
            for part in layout.parts
            for number in range(part.first_group, part.first_group + part.num_groups)
        ]
        assert sorted(taken) == list(range(groups.num_groups))
        assert sum(part.has_remainder for part in layout.parts) == (groups.remainder_sms > 0)
        assert sum(layout.sm_share(phase) for phase in Phase) == pytest.approx(1.0)


@given(GROUPS, PHASES, st.integers(1, 32), st.integers(1, 4))
def test_no_layout_is_there_twice_and_none_is_left_out(
    groups: SmGroups, phases: tuple[Phase, ...], least: int, step: int
) -> None:
    table = tables(groups, phases, least, step)
    sizes = [tuple(part.num_sms for part in one.parts) for one in table]
    assert sizes == sorted(set(sizes))
    if step == 1 and len(phases) == 2:
        fewest = -(-least // groups.group_sms)
        expected = [
            count
            for count in range(fewest, groups.num_groups + 1)
            if groups.num_sms - count * groups.group_sms >= least
        ]
        assert [one.parts[0].num_groups for one in table] == expected


def test_a_device_that_is_too_small_has_no_layout() -> None:
    assert layout_table(SmGroups(8, 3, 7), PREFILL_DECODE, least_sms=16) == ()


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="two or three"):
        layout_table(H100, (Phase.DECODE,))
    with pytest.raises(ValueError, match="1 at least"):
        layout_table(H100, PREFILL_DECODE, step_groups=0)


# The choice.


@given(GROUPS, SHARE, st.integers(1, 2))
def test_who_is_to_keep_its_share_has_it_where_any_layout_gives_it(
    groups: SmGroups, share: float, step: int
) -> None:
    table = tables(groups, PREFILL_DECODE, 1, step)
    assume(table)
    for keeps, other in (PREFILL_DECODE, PREFILL_DECODE[::-1]):
        found = choose(table, {keeps: share, other: 1 - share}, keeps=keeps).layout
        most = max(one.sm_share(keeps) for one in table)
        assert found.sm_share(keeps) >= min(share, most) - 1e-9
        # With two phases the nearest is the smallest that is enough.
        enough = [one.sm_share(keeps) for one in table if one.sm_share(keeps) >= share - 1e-9]
        if enough:
            assert found.sm_share(keeps) == min(enough)


@given(st.tuples(SHARE, SHARE, SHARE))
def test_of_three_phases_none_other_is_nearer(shares: tuple[float, float, float]) -> None:
    total = sum(shares)
    asked = {phase: share / max(total, 1.0) for phase, share in zip(ALL, shares, strict=True)}
    table = layout_table(H100, ALL, step_groups=1)
    found = choose(table, asked, keeps=Phase.DECODE).layout

    def distance(one: SmLayout) -> float:
        return sum(abs(one.sm_share(phase) - asked[phase]) for phase in ALL)

    enough = [one for one in table if one.sm_share(Phase.DECODE) >= asked[Phase.DECODE] - 1e-9]
    if enough:
        assert distance(found) <= min(map(distance, enough)) + 1e-6


def test_more_of_one_phase_never_gives_it_less() -> None:
    table = layout_table(H100, PREFILL_DECODE, step_groups=1)
    given_sms = [
        choose(
            table, {Phase.DECODE: share / 100, Phase.PREFILL: 1 - share / 100}, keeps=Phase.DECODE
        ).layout.sm_count(Phase.DECODE)
        for share in range(101)
    ]
    assert all(less <= more for less, more in pairwise(given_sms))


def test_shares_above_one_ask_for_the_shared_layout() -> None:
    shared = shared_layout(132, PREFILL_DECODE)
    table = [shared, *layout_table(H100, PREFILL_DECODE)]
    assert choose(table, {Phase.PREFILL: 1.0, Phase.DECODE: 1.0}, keeps=Phase.DECODE).layout is shared
    assert not choose(table, {Phase.PREFILL: 0.5, Phase.DECODE: 0.5}, keeps=Phase.DECODE).layout.is_shared
    with pytest.raises(ValueError, match="no disjoint layout"):
        choose([shared], {Phase.DECODE: 0.5}, keeps=Phase.DECODE)


def test_the_reason_says_when_nobody_can_have_that_much() -> None:
    choice = choose(layout_table(H100, PREFILL_DECODE), {Phase.PREFILL: 0.95}, keeps=Phase.PREFILL)
    assert choice.layout.sm_count(Phase.PREFILL) == 116
    assert choice.reason == "no layout has 0.95 for prefill; 0.88 is the most"
