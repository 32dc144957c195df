"""The best candidate of a family: by looking at all of them where they are few, else by Bayesian search. Pure.

Both judge by the median capacity of the same seeds, which are not those that the winner is reported with: the best of many on some
requests is better there than it is.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from orchestrator.planner.shapes import Candidate, Grid, Knobs, Shape, is_allowed
from workers.api import PrefillOrder

if TYPE_CHECKING:
    import optuna

#: More candidates are not all looked at.
MAX_EXHAUSTIVE = 200
#: Candidates that the Bayesian search draws, how many of these at random to begin with, and how often it draws, known ones too.
NUM_TRIED, NUM_RANDOM, MAX_TRIALS = 80, 30, 400
#: How many it weighs for each that it draws.
NUM_WEIGHED = 100
#: One of so many goes on to the other seeds.
REDUCTION = 3
#: A candidate is better than another by as much at least.
BETTER = 1.01


class Judge(Protocol):
    """What a candidate bears; orchestrator.planner.load.Load is one."""

    def reaches(self, candidate: Candidate, seed: int, rate_rps: float) -> bool:
        """Enough requests meet their targets at this rate."""
        ...

    def capacity_rps(self, candidate: Candidate, seed: int, near_rps: float = 0.0) -> float:
        """The highest rate that it bears. near_rps: what is expected."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """Of a family. num_tried: different candidates that were looked at, of num_all. capacity_rps: 0 when none bears any rate."""

    candidate: Candidate
    capacity_rps: float
    num_tried: int
    num_all: int


Tell = Callable[[Found], None]


def search(
    grid: Grid, judge: Judge, *, seeds: Sequence[int], tell: Tell, max_exhaustive: int = MAX_EXHAUSTIVE
) -> Found | None:
    """The best of the grid; None when it is empty. tell: gets the best so far after each candidate."""
    candidates = grid.candidates()
    if not candidates:
        return None
    if len(candidates) <= max_exhaustive:
        return exhaustive(candidates, judge, seeds=seeds, tell=tell)
    return bayesian(grid, judge, seeds=seeds, tell=tell)


def exhaustive(candidates: Sequence[Candidate], judge: Judge, *, seeds: Sequence[int], tell: Tell) -> Found:
    """All of them, where a candidate that does not bear what the best one does is looked at no further."""
    found = Found(candidates[0], 0.0, 0, len(candidates))
    for candidate in candidates:
        found = _better(found, candidate, judge, seeds)
        tell(found)
    return found


def _better(best: Found, candidate: Candidate, judge: Judge, seeds: Sequence[int]) -> Found:
    """The better one of both."""
    best_rps = best.capacity_rps
    if not best_rps or _most_reach(judge, candidate, seeds, best_rps * BETTER):
        found_rps = statistics.median(judge.capacity_rps(candidate, seed, best_rps) for seed in seeds)
        if found_rps > best_rps:
            best = replace(best, candidate=candidate, capacity_rps=found_rps)
    return replace(best, num_tried=best.num_tried + 1)


def _most_reach(judge: Judge, candidate: Candidate, seeds: Sequence[int], rate_rps: float) -> bool:
    """The median capacity is above this rate."""
    num_left, num_needed = len(seeds), len(seeds) // 2 + 1
    for seed in seeds:
        if num_needed > num_left:
            return False
        num_needed -= judge.reaches(candidate, seed, rate_rps)
        num_left -= 1
        if num_needed == 0:
            return True
    return False


def bayesian(grid: Grid, judge: Judge, *, seeds: Sequence[int], tell: Tell) -> Found:
    """Draws candidates, and then walks from the best of them to better neighbours while there are any. One judge gives one result.

    Source: tree-structured Parzen estimators (Bergstra et al., NeurIPS 2011) with successive halving over the seeds (Jamieson and
    Talwalkar, AISTATS 2016). EPD (arXiv 2501.05460) searches shapes with a Bayesian optimiser whose kernel and trials it does not name.
    """
    known: dict[Candidate, float] = {}
    candidates = grid.candidates()
    found = _draw(grid, known, judge, seeds, tell)
    walked_from = None
    while walked_from != found.candidate:
        walked_from = found.candidate
        for candidate in candidates:
            if candidate not in known and grid.are_neighbours(walked_from, candidate):
                known[candidate] = 0.0
                found = _better(found, candidate, judge, seeds)
                tell(found)
    return found


def _draw(grid: Grid, known: dict[Candidate, float], judge: Judge, seeds: Sequence[int], tell: Tell) -> Found:
    # It takes a moment to import, and small grids do not need it.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=NUM_RANDOM, n_ei_candidates=NUM_WEIGHED, seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    )
    candidates = grid.candidates()
    best = Found(candidates[0], 0.0, 0, len(candidates))

    def objective(trial: "optuna.Trial") -> float:
        nonlocal best
        candidate = _suggest(trial, grid)
        if candidate in known:
            # It counts as a bad one, so that others are drawn.
            raise optuna.TrialPruned
        found: list[float] = []
        for step, seed in enumerate(seeds, 1):
            found.append(judge.capacity_rps(candidate, seed, best.capacity_rps))
            known[candidate] = statistics.median(found)
            trial.report(known[candidate], step)
            if step < len(seeds) and trial.should_prune():
                raise optuna.TrialPruned
        if known[candidate] > best.capacity_rps:
            best = replace(best, candidate=candidate, capacity_rps=known[candidate])
        return known[candidate]

    def told(study: "optuna.Study", _trial: "optuna.trial.FrozenTrial") -> None:
        nonlocal best
        best = replace(best, num_tried=len(known))
        tell(best)
        if len(known) >= min(NUM_TRIED, len(candidates)):
            study.stop()

    study.optimize(objective, n_trials=MAX_TRIALS, callbacks=[told])
    return best


def _suggest(trial: "optuna.Trial", grid: Grid) -> Candidate:
    index = trial.suggest_int("layout", 0, len(grid.layouts) - 1)
    layout = grid.layouts[index]
    num_left, groups = grid.num_devices, []
    for i, phases in enumerate(layout):
        num_after = len(layout) - i - 1
        num = trial.suggest_int(f"{index}.{i}", 1, num_left - num_after) if num_after else num_left
        groups.append((phases, num))
        num_left -= num
    order = PrefillOrder(trial.suggest_categorical("order", [str(one) for one in grid.orders]))
    limit = grid.batch_limits[trial.suggest_int("limit", 0, len(grid.batch_limits) - 1)]
    budgets = [budget for budget in grid.token_budgets if is_allowed(budget, limit)]
    budget = budgets[trial.suggest_int("budget", 0, len(budgets) - 1)]
    return Candidate(Shape(tuple(groups)), Knobs(budget, limit, order))
