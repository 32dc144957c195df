"""A benchmark as lines for a person and as JSON. Pure."""

from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from orchestrator.bench.plan import Slice
from orchestrator.bench.records import BenchConfig, RequestRecord
from orchestrator.bench.summary import MAX_SEND_LAG_S, BenchResult, Summary
from orchestrator.bench.trace import Trace
from orchestrator.control.slo import Percentiles, Slo, itl_s, tpot_s

FORMAT = "phasewise-bench/v1"


def lines(trace: Trace, part: Slice, config: BenchConfig, result: BenchResult) -> list[str]:
    """What is printed."""
    summary = result.summary
    rate = f"{summary.offered_rps:.3g} requests/s for {result.load.arrivals_duration_s:.3g} s"
    return [
        f"trace      {describe_slice(trace, part)}",
        f"load       {rate}, open loop; model {result.model.name}",
        *_clipped(summary, result),
        *_outcomes(summary),
        "",
        *_percentile_table(summary),
        *_targets(summary, config.slo),
        *_lateness(summary),
    ]


def describe_slice(trace: Trace, part: Slice) -> str:
    """Which rows, and how they were re-timed."""
    first, last = part.rows[0].number, part.rows[-1].number
    return f"{trace.file} ({trace.format}), rows {first} to {last} of {len(trace.rows)}, at {part.speed_up:.3g}x their speed"


def _clipped(summary: Summary, result: BenchResult) -> list[str]:
    if not summary.num_clipped_prompts and not summary.num_clipped_outputs:
        return []
    clipped = f"{summary.num_clipped_prompts} prompts and {summary.num_clipped_outputs} outputs"
    return [f"clipped    {clipped}; the context has {result.model.max_context_tokens} tokens"]


def _outcomes(summary: Summary) -> list[str]:
    text = f"requests   {summary.num_arrived} arrived, {summary.num_finished} finished, {summary.num_failed} failed"
    if summary.errors:
        text += ": " + ", ".join(f"{count} {status}" for status, count in summary.errors.items())
    found = [text]
    if summary.num_interrupted:
        found.append(
            f"           {summary.num_interrupted} more were cut off by the interruption and do not count"
        )
    if summary.num_short_outputs:
        found.append(f"           {summary.num_short_outputs} finished with fewer tokens than asked for")
    return found


def _percentile_table(summary: Summary) -> list[str]:
    if summary.ttft_s is None:
        return ["No request finished, so there are no percentiles."]
    found = []
    if summary.has_many_errors:
        found.append(
            f"WARNING    {summary.num_failed / summary.num_arrived:.1%} of the requests failed; "
            "the percentiles are of the others only"
        )
    found.append(f"{'ms':<8} {'p50':>9} {'p90':>9} {'p95':>9} {'p99':>9}   values")
    for name, values in (("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s), ("ITL", summary.itl_s)):
        found.append(f"{name:<8} {_milliseconds(values)}")
    return found


def _milliseconds(values: Percentiles | None) -> str:
    if values is None:
        return "undefined below 2 tokens"
    numbers = (values.p50, values.p90, values.p95, values.p99)
    return " ".join(f"{number * 1000:9.1f}" for number in numbers) + f"   {values.num_values}"


def _targets(summary: Summary, slo: Slo) -> list[str]:
    if summary.attainment is None:
        return []
    return [
        "",
        f"targets    TTFT <= {slo.ttft_s * 1000:g} ms and TPOT <= {slo.tpot_s * 1000:g} ms",
        f"attainment {summary.attainment:.1%} of {summary.num_arrived} requests",
        f"goodput    {summary.goodput_rps:.3g} requests/s; output {summary.output_tokens_per_s:.4g} tokens/s",
    ]


def _lateness(summary: Summary) -> list[str]:
    if summary.max_send_lag_s is None or summary.p99_send_lag_s is None:
        return []
    late = f"p99 {summary.p99_send_lag_s * 1000:.1f} ms, max {summary.max_send_lag_s * 1000:.1f} ms"
    if summary.is_generator_late:
        limit = f"{MAX_SEND_LAG_S * 1000:g} ms"
        return [
            f"WARNING    requests were sent late ({late}; limit {limit}): the load was not the one asked for"
        ]
    return [f"send lag   {late}"]


def as_json(
    trace: Trace,
    part: Slice,
    config: BenchConfig,
    result: BenchResult,
    *,
    machine: dict[str, Any],
    date: str,
) -> dict[str, Any]:
    """What is saved: everything that was asked, measured and concluded. Durations are in seconds."""
    return {
        "format": FORMAT,
        "date": date,
        "machine": machine,
        "config": asdict(config),
        "model": asdict(result.model),
        "trace": {
            "file": PurePath(trace.file).name,
            "format": trace.format,
            "first_row": part.rows[0].number,
            "last_row": part.rows[-1].number,
            "num_rows": len(trace.rows),
            "speed_up": part.speed_up,
        },
        "summary": {
            **asdict(result.summary),
            "was_interrupted": result.load.was_interrupted,
            "arrivals_duration_s": result.load.arrivals_duration_s,
            "elapsed_s": result.load.elapsed_s,
        },
        "requests": [_request_json(record) for record in result.load.records],
    }


def _request_json(record: RequestRecord) -> dict[str, Any]:
    times_s = record.token_times_s
    return {
        "row": record.planned.row.number,
        "arrival_s": _rounded(record.planned.arrival_s),
        "send_lag_s": _rounded(record.send_lag_s),
        "status": record.status,
        "message": record.message,
        "prompt_tokens": record.planned.prompt_tokens,
        "asked_output_tokens": record.planned.output_tokens,
        "output_tokens": len(times_s),
        "ttft_s": _rounded(times_s[0]) if times_s else None,
        "tpot_s": _rounded(tpot_s(times_s)),
        "itl_s": [_rounded(gap_s) for gap_s in itl_s(times_s)],
        "total_s": _rounded(record.total_s),
        "gateway": asdict(record.gateway) if record.gateway else None,
    }


def _rounded(value_s: float | None) -> float | None:
    """To microseconds, which is finer than any clock here is true."""
    return None if value_s is None else round(value_s, 6)
