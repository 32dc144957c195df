"""How the SMs of a device are divided among phases: the table of layouts, and which of them suits a request. Pure.

A driver splits the SMs of a device into groups of equal size and a remainder. A part of a layout is some groups, and for one
phase the remainder too. How many groups there are depends on which SMs of a chip work: an H100 of 132 SMs gives 15 of 8 and a
remainder of 12, since groups lie within a GPC.

Source: CUDA driver API, cuDevSmResourceSplitByCount and cuDevResourceGenerateDesc: parts of several groups must come from one split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from workers.api import Phase

#: Parts below this made cuBLAS fail once on an H100.
LEAST_SMS = 16
#: The last one that a device has takes the remainder: its products are large, so that odd SMs do no harm there.
_ORDER = (Phase.ENCODE, Phase.DECODE, Phase.PREFILL)


@dataclass(frozen=True, slots=True)
class SmGroups:
    """What one split of a device gave: so many groups of `group_sms` SMs, and `remainder_sms` more."""

    group_sms: int
    num_groups: int
    remainder_sms: int

    @property
    def num_sms(self) -> int:
        """Of the device."""
        return self.group_sms * self.num_groups + self.remainder_sms


@dataclass(frozen=True, slots=True)
class SmPart:
    """SMs of one phase: groups [first_group, first_group + num_groups), and the remainder where `has_remainder`."""

    phase: Phase
    first_group: int
    num_groups: int
    has_remainder: bool
    num_sms: int


@dataclass(frozen=True, slots=True)
class SmLayout:
    """One part for each phase. Disjoint; or each has all SMs, and the hardware divides them as work comes (`is_shared`)."""

    parts: tuple[SmPart, ...]
    num_sms: int
    is_shared: bool = False

    def sm_count(self, phase: Phase) -> int:
        """Of this phase; 0 when it has no part."""
        return next((part.num_sms for part in self.parts if part.phase is phase), 0)

    def sm_share(self, phase: Phase) -> float:
        """The same as a fraction of the device."""
        return self.sm_count(phase) / self.num_sms

    def __str__(self) -> str:
        counts = ", ".join(f"{part.phase} {part.num_sms}" for part in self.parts)
        return f"{counts} of {self.num_sms} SMs{', shared' if self.is_shared else ''}"


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, and why this one."""

    layout: SmLayout
    reason: str


def shared_layout(num_sms: int, phases: Sequence[Phase]) -> SmLayout:
    """Every phase on all SMs."""
    parts = tuple(SmPart(phase, 0, 0, False, num_sms) for phase in _ORDER if phase in phases)
    return SmLayout(parts, num_sms, is_shared=True)


def layout_table(
    groups: SmGroups, phases: Sequence[Phase], *, least_sms: int = LEAST_SMS, step_groups: int = 2
) -> tuple[SmLayout, ...]:
    """Every disjoint layout of two or three phases in which each has `least_sms` SMs at least, ascending by the first phases.

    All SMs are used. step_groups: parts but the last differ by so many groups, counted from the least that is enough.
    Empty when the device has too few SMs. Raises ValueError for one phase, or arguments below 1.
    """
    ordered = [phase for phase in _ORDER if phase in phases]
    if len(ordered) < 2:
        raise ValueError(f"phases: {len(ordered)} of them; a device is divided among two or three")
    if least_sms < 1 or step_groups < 1:
        raise ValueError(f"least_sms is {least_sms} and step_groups {step_groups}; both are 1 at least")
    return tuple(
        _layout(groups, ordered, counts)
        for counts in _counts(groups, len(ordered) - 1, least_sms, step_groups)
    )


def choose(layouts: Sequence[SmLayout], shares: Mapping[Phase, float], *, keeps: Phase) -> Choice:
    """The layout that is nearest to the shares among those in which `keeps` has no less than it asks for.

    shares: fractions of the device, 0 to 1; together above 1 they ask for SMs in common, which a shared layout has. Nearest: the sum
    of differences, ties to the first of the table. Where no part of `keeps` is large enough it gets the largest there is.
    Raises ValueError when there is no layout, or none of the kind that is asked for.
    """
    wants_shared = sum(shares.values()) > 1.0 + 1e-9
    fit = [one for one in layouts if one.is_shared is wants_shared]
    if not fit:
        kind = "shared" if wants_shared else "disjoint"
        raise ValueError(f"no {kind} layout is there for shares {_shares_text(shares)}")
    asked = shares.get(keeps, 0.0)
    enough = [one for one in fit if one.sm_share(keeps) >= asked - 1e-9]
    if enough:
        found = min(enough, key=lambda one: _distance(one, shares))
        return Choice(found, f"nearest to {_shares_text(shares)} with enough for {keeps}")
    found = max(fit, key=lambda one: (one.sm_share(keeps), -_distance(one, shares)))
    return Choice(found, f"no layout has {asked:.2f} for {keeps}; {found.sm_share(keeps):.2f} is the most")


def _counts(
    groups: SmGroups, num_parts: int, least_sms: int, step_groups: int, used: int = 0
) -> Iterator[tuple[int, ...]]:
    """Groups of each part but the last, such that the last has enough with what is left."""
    if num_parts == 0:
        if (groups.num_groups - used) * groups.group_sms + groups.remainder_sms >= least_sms:
            yield ()
        return
    fewest = -(-least_sms // groups.group_sms)
    for count in range(fewest, groups.num_groups - used + 1, step_groups):
        for rest in _counts(groups, num_parts - 1, least_sms, step_groups, used + count):
            yield (count, *rest)


def _layout(groups: SmGroups, phases: Sequence[Phase], counts: tuple[int, ...]) -> SmLayout:
    parts, first = [], 0
    for phase, count in zip(phases, counts, strict=False):
        parts.append(SmPart(phase, first, count, False, count * groups.group_sms))
        first += count
    left = groups.num_groups - first
    num_sms = left * groups.group_sms + groups.remainder_sms
    parts.append(SmPart(phases[-1], first, left, groups.remainder_sms > 0, num_sms))
    return SmLayout(tuple(parts), groups.num_sms)


def _distance(layout: SmLayout, shares: Mapping[Phase, float]) -> float:
    # Of layouts that differ by rounding alone the first is taken.
    return round(sum(abs(layout.sm_share(phase) - share) for phase, share in shares.items()), 9)


def _shares_text(shares: Mapping[Phase, float]) -> str:
    return ", ".join(f"{phase} {share:.2f}" for phase, share in shares.items())
