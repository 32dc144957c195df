"""What the EPD benchmark sends, what it makes of answers, and its picture."""

from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from benchmarks.serving.epd_load import (
    EPD,
    Row,
    Seen,
    Workload,
    arrivals,
    comparison,
    markdown,
    row_of,
    slo_of,
)
from benchmarks.serving.epd_plot import plot
from orchestrator.control.slo import Slo

TWO = Workload("2 pictures", 2)


def test_every_shape_gets_the_same_requests_at_the_same_times() -> None:
    assert arrivals(TWO, 3.0, 20.0, seed=5) == arrivals(TWO, 3.0, 20.0, seed=5)


def test_no_picture_comes_twice_in_a_run() -> None:
    asked = arrivals(TWO, 5.0, 20.0, seed=4) + arrivals(replace(TWO, num_images=8), 5.0, 20.0, seed=1)
    pictures = [picture for one in asked for picture in one.pictures]
    assert len(pictures) == len(set(pictures)) > 100


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    asked = arrivals(TWO, 5.0, 200.0, seed=3)
    assert asked[0].at_s == 0
    assert 900 < len(asked) < 1100
    assert all(before.at_s < after.at_s < 200 for before, after in pairwise(asked))


def test_a_workload_says_which_requests_have_pictures_how_many_and_how_long_answers_are() -> None:
    mixed = Workload("mixed", 3, output_tokens=(64, 128), text_only=0.5, num_distinct=6)
    asked = arrivals(mixed, 10.0, 50.0, seed=4)
    with_pictures = [one for one in asked if one.pictures]
    assert 0.4 < len(with_pictures) / len(asked) < 0.6
    assert all(len(set(one.pictures)) == 3 and max(one.pictures) < 6 for one in with_pictures)
    assert {64, 128} <= {one.num_output_tokens for one in asked} <= set(range(64, 129))


def seen(at_s: float, ttft_s: float, *, tpot_s: float = 0.01, num_encoded: int = 2) -> Seen:
    return Seen(at_s, (ttft_s, ttft_s + tpot_s, ttft_s + 2 * tpot_s), 0.05, 2, num_encoded)


def row(shape: str, *all_seen: Seen, load: float = 0.5) -> Row:
    return row_of(
        "balanced", "2 <pictures>", shape, load=load, rate_rps=2.0, slo=Slo(0.3, 0.02), seen=all_seen
    )


def test_a_row_has_percentiles_throughput_until_the_last_answer_and_attainment() -> None:
    found = row(EPD, seen(0, 0.1), seen(1, 0.2), seen(2, 0.3), seen(2.98, 1.0, num_encoded=0))
    assert found.ttft_p50_ms == pytest.approx(250)
    assert found.tpot_p99_ms == pytest.approx(10)
    assert found.throughput_rps == pytest.approx(1.0)
    assert found.attainment == 0.75
    assert found.encoded == 0.75


def test_a_request_that_failed_has_missed_its_target_and_is_in_no_percentile() -> None:
    found = row(EPD, seen(0, 0.1), Seen(1, (), 0.0, 0, 0))
    assert (found.num_requests, found.num_failed, found.attainment) == (2, 1, 0.5)
    assert found.ttft_p99_ms == pytest.approx(100)
    assert "| 2, 1 failed |" in markdown([found])


def test_a_request_that_generates_slowly_misses_its_target() -> None:
    assert row(EPD, seen(0, 0.1), seen(1, 0.1, tpot_s=0.03)).attainment == 0.5


def test_the_target_is_a_multiple_of_the_median_without_load() -> None:
    slo = slo_of([seen(0, 0.1), seen(1, 0.2), seen(2, 0.9)], 3.0)
    assert (slo.ttft_s, slo.tpot_s) == (pytest.approx(0.6), pytest.approx(0.03))


def test_the_comparison_says_where_epd_loses() -> None:
    rows = [
        row(EPD, seen(0, 0.1, tpot_s=0.02)),
        row("EP + D", seen(0, 0.2)),
        row("2 x EPD", seen(0, 0.1), load=0.8),
    ]
    assert "| 50% | EP + D | 0.50 wins | 0.50 wins | 2.00 loses |" in comparison(rows)
    assert "2 x EPD" not in comparison(rows)
    assert len(markdown(rows).splitlines()) == 2 + len(rows)


def test_the_picture_has_a_bar_for_each_row() -> None:
    rows = [row(EPD, seen(0, 0.1)), row("EP + D", seen(0, 0.2)), row(EPD, seen(0, 0.3), load=0.8)]
    tree = ElementTree.fromstring(plot(rows))
    assert len(tree.findall("{*}polyline")) == len(rows)
    assert any("2 <pictures>" in (text.text or "") for text in tree.findall("{*}text"))
