"""What the best of each family bear, on requests that the search has not seen, and whether it pays to keep phases apart. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.planner.load import Load, Misses
from orchestrator.planner.search import Found
from orchestrator.planner.shapes import Family
from orchestrator.sim.capacity import Estimate, estimate

#: What limits a shape is looked for at so many times its goodput.
TOO_MUCH = 1.05
#: Loads that the best are judged by last so many times longer than those of the search: an idle cluster has to fill first.
LONGER = 3
#: Steps of bisection more than in the search: to 0.4 % or 0.7 %, as the expected rate was near or not, so that the interval is of the loads.
MORE_STEPS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """The best of a family. by_seed_rps: its goodput for each seed, the same seeds in all rows."""

    family: Family
    found: Found
    by_seed_rps: tuple[float, ...]
    misses: Misses

    @property
    def goodput_rps(self) -> Estimate:
        """Requests per second at the attainment."""
        return estimate(self.by_seed_rps)

    def __str__(self) -> str:
        return f"{self.found.candidate.shape} {interval_text(self.goodput_rps)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A family beside the aggregated one. difference_rps: of the same seeds. pays: None where the interval has both answers."""

    family: Family
    difference_rps: Estimate
    pays: bool | None
    sentence: str


def row(
    family: Family,
    found: Found,
    load: Load,
    seeds: Sequence[int],
    tell: Callable[[int], None] = lambda _num: None,
) -> Row:
    """Judge the best of a family again, by seeds that it was not chosen by and by longer loads. tell: gets how many seeds are done."""
    load = replace(load, duration_s=LONGER * load.duration_s)
    by_seed: list[float] = []
    for seed in seeds:
        near_rps = found.capacity_rps
        by_seed.append(load.capacity_rps(found.candidate, seed, near_rps, more_steps=MORE_STEPS))
        tell(len(by_seed))
    too_much_rps = TOO_MUCH * (by_seed[0] or load.lowest_rps)
    return Row(family, found, tuple(by_seed), load.misses(found.candidate, seeds[0], too_much_rps))


def verdict(aggregated: Row, other: Row) -> Verdict:
    """Seed by seed, since requests differ more than shapes do."""
    pairs = zip(other.by_seed_rps, aggregated.by_seed_rps, strict=True)
    difference = estimate([mine - theirs for mine, theirs in pairs])
    pays = None
    if abs(difference.mean) > difference.half:
        pays = difference.mean > 0
    sentence = f"{other.family} {_WORDS[pays]}: {other} against {aggregated} req/s"
    if aggregated.goodput_rps.mean:
        share = difference.mean / aggregated.goodput_rps.mean
        sentence += f", {abs(share):.0%} {'more' if share > 0 else 'less'}"
    if pays is None:
        sentence += f"; the difference, {interval_text(difference)}, is inside its interval"
    return Verdict(other.family, difference, pays, sentence)


_WORDS = {True: "pays", False: "does not pay", None: "is not shown to pay"}


def chosen(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Row:
    """The aggregated one, which is simplest, unless another pays; of several that do the one with most goodput."""
    paying = {one.family for one in verdicts if one.pays}
    found = [one for one in rows if one.family in paying]
    if not found:
        return next(one for one in rows if one.family is Family.AGGREGATED)
    return max(found, key=lambda one: one.goodput_rps.mean)


def interval_text(value: Estimate) -> str:
    """As 21.3 +- 0.4."""
    return f"{value.mean:.1f} +- {value.half:.1f}"


def as_json(load: Load, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything that came out; the same for the same seeds."""
    latency = load.latency
    return {
        "trace": load.trace.file,
        "model": latency.model.name,
        "device": latency.device.name,
        "num_devices": load.num_devices,
        "num_images": load.num_images,
        "ttft_s": load.slo.ttft_s,
        "tpot_s": load.slo.tpot_s,
        "attainment": load.attainment,
        "arrivals_s": LONGER * load.duration_s,
        "kv_cache_bytes": load.kv_cache_bytes,
        "families": [_row_json(one, load.num_devices) for one in rows],
        "verdicts": [
            {
                "family": one.family,
                "pays": one.pays,
                "difference_rps": one.difference_rps.mean,
                "half_interval_rps": one.difference_rps.half,
                "sentence": one.sentence,
            }
            for one in verdicts
        ],
        "chosen": chosen(rows, verdicts).family,
    }


def _row_json(one: Row, num_devices: int) -> dict[str, Any]:
    knobs, goodput = one.found.candidate.knobs, one.goodput_rps
    return {
        "family": one.family,
        "shape": str(one.found.candidate.shape),
        "token_budget": knobs.token_budget,
        "max_running_sequences": knobs.max_running_sequences,
        "prefill_order": knobs.prefill_order,
        "goodput_rps": goodput.mean,
        "half_interval_rps": goodput.half,
        "goodput_rps_per_device": goodput.mean / num_devices,
        "by_seed_rps": one.by_seed_rps,
        "missed_ttft": one.misses.ttft,
        "missed_tpot": one.misses.tpot,
        "refused": one.misses.refused,
        "num_tried": one.found.num_tried,
        "num_candidates": one.found.num_all,
    }
