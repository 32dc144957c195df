"""The shapes and settings that a manifest can express and a worker runs, in families. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations, product

from workers import limits
from workers.api import EngineConfig, Phase, PhaseSet, PrefillOrder

E, P, D = (frozenset({phase}) for phase in Phase)


class Family(StrEnum):
    """aggregated: all workers serve all phases. disaggregated: each serves one. mixed: what lies between."""

    AGGREGATED = "aggregated"
    DISAGGREGATED = "disaggregated"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers serve which phases, one or more of each group."""

    groups: tuple[tuple[PhaseSet, int], ...]

    @property
    def workers(self) -> tuple[PhaseSet, ...]:
        """The phases of each."""
        return tuple(phases for phases, num in self.groups for _ in range(num))

    def __str__(self) -> str:
        return " + ".join(f"{num} x {phases_text(phases)}" for phases, num in self.groups)


@dataclass(frozen=True, slots=True)
class Knobs:
    """Of every worker's engine: keys of the manifest."""

    token_budget: int
    max_running_sequences: int
    prefill_order: PrefillOrder

    def engine(self, kv_cache_bytes: int) -> EngineConfig:
        """What a worker is started with."""
        return EngineConfig(
            kv_cache_bytes=kv_cache_bytes,
            token_budget=self.token_budget,
            max_running_sequences=self.max_running_sequences,
            prefill_order=self.prefill_order,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of a search."""

    shape: Shape
    knobs: Knobs


@dataclass(frozen=True, slots=True)
class Grid:
    """All candidates of a family: each shape with each of the knobs. layouts: the phases of the groups of a shape."""

    num_devices: int
    layouts: tuple[tuple[PhaseSet, ...], ...]
    token_budgets: tuple[int, ...]
    batch_limits: tuple[int, ...]
    orders: tuple[PrefillOrder, ...]

    def candidates(self) -> list[Candidate]:
        """In a fixed order."""
        return [Candidate(shape, knobs) for shape in self._shapes() for knobs in self._knobs()]

    def are_neighbours(self, one: Candidate, other: Candidate) -> bool:
        """One worker is moved to other phases, or one of the knobs by a step."""
        mine, theirs = dict(one.shape.groups), dict(other.shape.groups)
        num_moved = sum(max(0, num - theirs.get(phases, 0)) for phases, num in mine.items())
        return num_moved + self._knob_steps(one.knobs, other.knobs) == 1

    def _knob_steps(self, one: Knobs, other: Knobs) -> int:
        budgets, limits = self.token_budgets.index, self.batch_limits.index
        return (
            abs(budgets(one.token_budget) - budgets(other.token_budget))
            + abs(limits(one.max_running_sequences) - limits(other.max_running_sequences))
            + (one.prefill_order is not other.prefill_order)
        )

    def _shapes(self) -> Iterator[Shape]:
        for layout in self.layouts:
            for cuts in combinations(range(1, self.num_devices), len(layout) - 1):
                ends = (0, *cuts, self.num_devices)
                yield Shape(tuple((phases, ends[i + 1] - ends[i]) for i, phases in enumerate(layout)))

    def _knobs(self) -> Iterator[Knobs]:
        for budget, limit, order in product(self.token_budgets, self.batch_limits, self.orders):
            if is_allowed(budget, limit):
                yield Knobs(budget, limit, order)


def phases_text(phases: PhaseSet) -> str:
    """As `prefill+decode`, in the order of a request."""
    return "+".join(phase for phase in Phase if phase in phases)


def is_allowed(token_budget: int, max_running_sequences: int) -> bool:
    """A manifest may have both."""
    return token_budget >= limits.min_token_budget(max_running_sequences, EngineConfig().block_size)


def grids(num_devices: int, *, has_images: bool, is_quick: bool) -> dict[Family, Grid]:
    """Of all families; one that needs more devices has no candidates. is_quick: fewer settings."""
    return {family: _grid(num_devices, _layouts(family, has_images), is_quick) for family in Family}


def _grid(num_devices: int, layouts: Sequence[tuple[PhaseSet, ...]], is_quick: bool) -> Grid:
    if is_quick:
        return Grid(num_devices, tuple(layouts), (512, 2048), (256,), (PrefillOrder.FCFS,))
    return Grid(num_devices, tuple(layouts), (512, 1024, 2048, 4096), (64, 128, 256), tuple(PrefillOrder))


def _layouts(family: Family, has_images: bool) -> Sequence[tuple[PhaseSet, ...]]:
    """A worker with decode alone gets nothing beside full ones alone: who computes a prompt and may decode does so."""
    full = E | P | D if has_images else P | D
    if family is Family.AGGREGATED:
        return ((full,),)
    if family is Family.DISAGGREGATED:
        return ((E, P, D),) if has_images else ((P, D),)
    beside = ((full, P), (full, P, D))
    return ((E, P | D), (E | P, D), (E, full), *beside) if has_images else beside
