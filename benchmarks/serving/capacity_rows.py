"""A load, what came of its requests, and that as a row of the report."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.bench.plan import PlannedRequest
from orchestrator.control.slo import Slo, itl_s, percentiles, tpot_s


@dataclass(frozen=True, slots=True)
class Load:
    """Requests and the tokens of their prompts, one for one."""

    requests: tuple[PlannedRequest, ...]
    prompts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, requests: Sequence[PlannedRequest], vocab_size: int) -> "Load":
        """Random tokens, the same for the same lengths."""
        rng = random.Random(1)
        vocabulary = range(vocab_size)
        return cls(
            tuple(requests), tuple(tuple(rng.choices(vocabulary, k=one.prompt_tokens)) for one in requests)
        )


@dataclass(slots=True)
class Served:
    """One request: when it was due and when its tokens came, on the clock of the run."""

    plan: PlannedRequest
    due_s: float
    times_s: list[float]


def report(policy: str, rate_rps: float, served: Sequence[Served], slo: Slo) -> dict[str, Any]:
    """One row."""
    ttfts_s = [one.times_s[0] - one.due_s for one in served]
    tpots = [tpot_s(one.times_s) for one in served]
    tpots_s = [value for value in tpots if value is not None]
    met = [slo.is_met(ttft, tpot) for ttft, tpot in zip(ttfts_s, tpots, strict=True)]
    gaps_s = [gap for one in served for gap in itl_s(one.times_s)]
    first_s, last_s = min(one.due_s for one in served), max(one.times_s[-1] for one in served)
    num_tokens = sum(len(one.times_s) for one in served)
    shown = {
        name: asdict(found)
        for name, values in (("ttft_s", ttfts_s), ("tpot_s", tpots_s), ("itl_s", gaps_s))
        if (found := percentiles(values)) is not None
    }
    return {
        "policy": policy,
        "rate_rps": rate_rps,
        "num_requests": len(served),
        "prompt_tokens_mean": sum(one.plan.prompt_tokens for one in served) / len(served),
        "output_tokens_mean": sum(one.plan.output_tokens for one in served) / len(served),
        "attainment": sum(met) / len(met),
        "late_first_tokens": sum(ttft > slo.ttft_s for ttft in ttfts_s) / len(met),
        "slow_decodes": sum(value is not None and value > slo.tpot_s for value in tpots) / len(met),
        **shown,
        "longest_ttft_s": max(ttfts_s),
        "output_tokens_per_s": num_tokens / (last_s - first_s),
    }


def show(row: dict[str, Any]) -> None:
    """A line."""
    ttft, tpot, itl = (
        "/".join(f"{1e3 * row[name][p]:.1f}" if name != "ttft_s" else f"{1e3 * row[name][p]:.0f}" for p in ps)
        for name, ps in (
            ("ttft_s", ("p50", "p90", "p99")),
            ("tpot_s", ("p50", "p90", "p99")),
            ("itl_s", ("p99",)),
        )
    )
    print(
        f"{row['policy']:<18}{row['rate_rps']:>5g}/s  attainment {row['attainment']:.3f} (late {row['late_first_tokens']:.3f}, "
        f"slow {row['slow_decodes']:.3f})  TTFT {ttft}  TPOT {tpot}  ITL p99 {itl} ms  {row['output_tokens_per_s']:.0f} tok/s",
        flush=True,
    )
