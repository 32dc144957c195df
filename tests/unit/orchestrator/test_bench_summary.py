"""TTFT, TPOT, ITL, attainment and goodput against numbers worked out by hand, and how they are shown."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest, take_slice
from orchestrator.bench.records import (
    INTERRUPTED,
    NOT_SENT,
    OK,
    BenchConfig,
    GatewayTimings,
    LoadResult,
    RequestRecord,
    ServedModel,
)
from orchestrator.bench.report import as_json, lines
from orchestrator.bench.summary import BenchResult, Summary, summarise
from orchestrator.bench.trace import Trace, TraceRow
from orchestrator.control.slo import Percentiles, Slo, itl_s, percentile, percentiles, tpot_s

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def record(
    times_s: Sequence[float] = (), status: str = OK, *, asked: int | None = None, lag_s: float | None = 0.001
) -> RequestRecord:
    num_tokens = len(times_s) if asked is None else asked
    planned = PlannedRequest(TraceRow(1, 0.0, 10, num_tokens), 0.0, 10, num_tokens)
    return RequestRecord(planned, status, send_lag_s=lag_s, token_times_s=tuple(times_s))


def summary_of(*records: RequestRecord, duration_s: float = 10.0, elapsed_s: float = 20.0) -> Summary:
    return summarise(LoadResult(records, duration_s, elapsed_s, was_interrupted=False), SLO)


def test_tpot_is_the_mean_gap_and_undefined_below_two_tokens() -> None:
    assert tpot_s([0.5, 0.6, 0.9]) == pytest.approx(0.2)
    assert tpot_s([0.5, 0.7]) == pytest.approx(0.2)
    assert tpot_s([0.5]) is None
    assert tpot_s([]) is None


def test_itl_has_every_gap_and_zero_within_a_message() -> None:
    assert itl_s([0.5, 0.75, 0.75, 1.75]) == [0.25, 0.0, 1.0]
    assert itl_s([0.5]) == []


def test_percentiles_are_interpolated_between_neighbours() -> None:
    ordered = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [percentile(ordered, percent) for percent in (0, 25, 50, 90, 100)] == [
        1,
        2,
        3,
        pytest.approx(4.6),
        5,
    ]
    assert percentile([7.0], 99) == 7.0
    assert percentiles([2.0, 1.0]) == Percentiles(2, 1.5, *(pytest.approx(v) for v in (1.9, 1.95, 1.99)))
    assert percentiles([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_a_percentile_lies_between_the_values_around_it(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    value = percentile(ordered, percent)
    position = percent / 100 * (len(ordered) - 1)
    margin = 1e-9 * ordered[-1]
    assert (
        ordered[int(position)] - margin <= value <= ordered[min(int(position) + 1, len(ordered) - 1)] + margin
    )


@pytest.mark.parametrize(
    ("ttft", "tpot", "is_met"),
    [(1.0, 0.1, True), (1.0, None, True), (1.01, 0.05, False), (0.5, 0.11, False), (1.01, None, False)],
)
def test_a_request_meets_its_slo_when_it_meets_both_targets(
    ttft: float, tpot: float | None, is_met: bool
) -> None:
    assert SLO.is_met(ttft, tpot) is is_met


def test_attainment_counts_failed_and_unsent_requests_as_missed() -> None:
    summary = summary_of(
        record([0.5, 0.55, 0.6]),
        record([0.5]),
        record([1.5, 1.6]),
        record([0.5, 0.8]),
        record(status="UNAVAILABLE"),
        record(status="UNAVAILABLE"),
        record(status="DEADLINE_EXCEEDED"),
        record(status=NOT_SENT, lag_s=None),
    )
    assert (summary.num_arrived, summary.num_finished, summary.num_failed) == (8, 4, 4)
    assert summary.errors == {"DEADLINE_EXCEEDED": 1, NOT_SENT: 1, "UNAVAILABLE": 2}
    assert summary.attainment == 2 / 8
    assert summary.goodput_rps == 2 / 10.0
    assert summary.offered_rps == 8 / 10.0
    assert summary.output_tokens_per_s == 8 / 20.0


def test_percentiles_are_of_finished_requests_only() -> None:
    summary = summary_of(record([0.2, 0.3, 0.5]), record([0.4]), record([9.0], status="UNAVAILABLE"))
    assert summary.ttft_s is not None
    assert (summary.ttft_s.num_values, summary.ttft_s.p50) == (2, pytest.approx(0.3))
    assert summary.tpot_s is not None
    assert (summary.tpot_s.num_values, summary.tpot_s.p50) == (1, pytest.approx(0.15))
    assert summary.itl_s is not None
    assert (summary.itl_s.num_values, summary.itl_s.p50) == (2, pytest.approx(0.15))


def test_requests_cut_off_by_an_interruption_count_neither_way() -> None:
    summary = summary_of(record([0.5]), record([0.1], status=INTERRUPTED))
    assert (summary.num_arrived, summary.num_interrupted, summary.attainment) == (1, 1, 1.0)
    assert summary.ttft_s is not None
    assert summary.ttft_s.num_values == 1


def test_nothing_gives_no_numbers() -> None:
    summary = summarise(LoadResult((), 0.0, 0.0, was_interrupted=True), SLO)
    assert (summary.attainment, summary.ttft_s, summary.max_send_lag_s) == (None, None, None)
    assert (summary.goodput_rps, summary.offered_rps) == (0.0, 0.0)


def test_lateness_of_the_generator_is_flagged_above_50_ms() -> None:
    assert not summary_of(record([0.5], lag_s=0.05)).is_generator_late
    late = summary_of(record([0.5], lag_s=0.0), record([0.5], lag_s=0.06))
    assert late.is_generator_late
    assert late.max_send_lag_s == 0.06
    assert late.p99_send_lag_s == pytest.approx(0.0594)


def test_clipped_and_short_requests_are_counted() -> None:
    clipped = RequestRecord(
        PlannedRequest(TraceRow(1, 0.0, 100, 50), 0.0, 80, 50), OK, token_times_s=(0.5,), send_lag_s=0.0
    )
    summary = summary_of(clipped, record([0.5, 0.6]))
    assert (summary.num_clipped_prompts, summary.num_clipped_outputs, summary.num_short_outputs) == (1, 0, 1)


TRACE = Trace("some.csv", "azure", tuple(TraceRow(i + 1, float(i), 10, 3) for i in range(5)))
PART = take_slice(TRACE, rate_rps=1, duration_s=2)
CONFIG = BenchConfig(rate_rps=1, duration_s=2, first_row=1, slo=SLO, seed=0, timeout_s=30, max_in_flight=10)
MODEL = ServedModel("smol", "abc", 8192, 49152)


def result_of(*records: RequestRecord, was_interrupted: bool = False) -> BenchResult:
    load = LoadResult(records, 2.0, 3.0, was_interrupted)
    return BenchResult(MODEL, load, summarise(load, SLO))


def text_of(*records: RequestRecord) -> str:
    return "\n".join(lines(TRACE, PART, CONFIG, result_of(*records)))


def test_the_report_names_the_rows_and_shows_milliseconds() -> None:
    text = text_of(record([0.5, 0.55]), record([0.7, 0.75]))
    assert "some.csv (azure), rows 1 to 2 of 5, at 1x their speed" in text
    assert "1 requests/s for 2 s, open loop; model smol" in text
    assert "TTFT         600.0     680.0     690.0     698.0   2" in text
    assert "targets    TTFT <= 1000 ms and TPOT <= 100 ms" in text
    assert "goodput    1 requests/s; output 1.333 tokens/s" in text
    assert "WARNING" not in text


def test_no_percentile_is_printed_when_nothing_finished() -> None:
    text = text_of(record(status="UNAVAILABLE"), record(status="UNAVAILABLE"))
    assert "No request finished, so there are no percentiles." in text
    assert "p50" not in text
    assert "2 arrived, 0 finished, 2 failed: 2 UNAVAILABLE" in text
    assert "attainment 0.0% of 2 requests" in text


def test_errors_above_one_percent_are_called_out_beside_the_percentiles() -> None:
    few = [record([0.5])] * 99 + [record(status="UNAVAILABLE")]
    assert "WARNING" not in text_of(*few)
    many = [record([0.5])] * 98 + [record(status="UNAVAILABLE")] * 2
    before_table = text_of(*many).split("p50")[0]
    assert "WARNING    2.0% of the requests failed; the percentiles are of the others only" in before_table


def test_undefined_tpot_is_said_and_lateness_is_called_out() -> None:
    text = text_of(record([0.5], lag_s=0.2))
    assert "TPOT     undefined below 2 tokens" in text
    assert "WARNING    requests were sent late (p99 200.0 ms, max 200.0 ms; limit 50 ms)" in text


def test_the_json_has_what_was_asked_measured_and_concluded() -> None:
    gateway = GatewayTimings(0.4, 0.1, 0.3, 0.01, "p-0", "d-0", 1)
    finished = RequestRecord(
        record([0.5, 0.75]).planned,
        OK,
        send_lag_s=0.001,
        token_times_s=(0.5, 0.75),
        total_s=0.8,
        gateway=gateway,
    )
    result = result_of(finished, record(status="UNAVAILABLE"), was_interrupted=True)
    data = json.loads(
        json.dumps(as_json(TRACE, PART, CONFIG, result, machine={"cpu": "x"}, date="2026-01-02"))
    )
    assert data["format"] == "phasewise-bench/v1"
    assert data["config"]["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert data["trace"] == {
        "file": "some.csv",
        "format": "azure",
        "first_row": 1,
        "last_row": 2,
        "num_rows": 5,
        "speed_up": 1.0,
    }
    assert data["summary"]["was_interrupted"] is True
    assert data["summary"]["ttft_s"]["p50"] == 0.5
    first, second = data["requests"]
    assert (first["ttft_s"], first["tpot_s"], first["itl_s"], first["status"]) == (0.5, 0.25, [0.25], "OK")
    assert first["gateway"]["prefill_worker_id"] == "p-0"
    assert (second["ttft_s"], second["tpot_s"], second["itl_s"]) == (None, None, [])
