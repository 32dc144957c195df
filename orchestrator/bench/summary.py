"""What the records of a load say about the service. Pure."""

from collections import Counter
from dataclasses import dataclass

from orchestrator.bench.records import INTERRUPTED, OK, LoadResult, ServedModel
from orchestrator.control.slo import Percentiles, Slo, itl_s, percentile, percentiles, tpot_s

MAX_FAILED_SHARE = 0.01
MAX_SEND_LAG_S = 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """All requests that arrived, except those that an interruption cut off.

    Percentiles are of the finished requests alone and None when there is none. A request that failed
    or was not sent has missed its targets.
    """

    num_arrived: int
    num_finished: int
    num_interrupted: int
    #: Requests by status, the finished ones left out.
    errors: dict[str, int]
    #: Finished requests with fewer tokens than were asked for.
    num_short_outputs: int
    num_clipped_prompts: int
    num_clipped_outputs: int
    #: Arrivals per second, interrupted ones included.
    offered_rps: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None
    #: Share of the arrived requests that met both targets; None when none arrived.
    attainment: float | None
    #: Requests that met both targets, per second of the time over which requests arrived.
    goodput_rps: float
    #: Output tokens of finished requests, per second until the last answer.
    output_tokens_per_s: float
    #: Lateness of the load generator; None when nothing was sent.
    p99_send_lag_s: float | None
    max_send_lag_s: float | None

    @property
    def num_failed(self) -> int:
        """Requests that ended in an error or were not sent."""
        return self.num_arrived - self.num_finished

    @property
    def has_many_errors(self) -> bool:
        """So many failed that percentiles of the others may mislead."""
        return self.num_failed > MAX_FAILED_SHARE * self.num_arrived

    @property
    def is_generator_late(self) -> bool:
        """The load was not the one asked for."""
        return self.max_send_lag_s is not None and self.max_send_lag_s > MAX_SEND_LAG_S


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All that a report needs."""

    model: ServedModel
    load: LoadResult
    summary: Summary


def summarise(result: LoadResult, slo: Slo) -> Summary:
    """Summary of a load of any length, an empty one included."""
    records = result.records
    arrived = [record for record in records if record.status != INTERRUPTED]
    finished = [record for record in arrived if record.status == OK]
    errors = Counter(record.status for record in arrived if record.status != OK)
    lags_s = sorted(record.send_lag_s for record in records if record.send_lag_s is not None)
    tpots = [value for record in finished if (value := tpot_s(record.token_times_s)) is not None]
    num_met = sum(slo.is_met(record.token_times_s[0], tpot_s(record.token_times_s)) for record in finished)
    return Summary(
        num_arrived=len(arrived),
        num_finished=len(finished),
        num_interrupted=len(records) - len(arrived),
        errors=dict(sorted(errors.items())),
        num_short_outputs=sum(len(r.token_times_s) < r.planned.output_tokens for r in finished),
        num_clipped_prompts=sum(record.planned.is_prompt_clipped for record in records),
        num_clipped_outputs=sum(record.planned.is_output_clipped for record in records),
        offered_rps=_per_s(len(records), result.arrivals_duration_s),
        ttft_s=percentiles([record.token_times_s[0] for record in finished]),
        tpot_s=percentiles(tpots),
        itl_s=percentiles([gap_s for record in finished for gap_s in itl_s(record.token_times_s)]),
        attainment=num_met / len(arrived) if arrived else None,
        goodput_rps=_per_s(num_met, result.arrivals_duration_s),
        output_tokens_per_s=_per_s(sum(len(r.token_times_s) for r in finished), result.elapsed_s),
        p99_send_lag_s=percentile(lags_s, 99) if lags_s else None,
        max_send_lag_s=lags_s[-1] if lags_s else None,
    )


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if count else 0.0
