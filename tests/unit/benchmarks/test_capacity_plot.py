"""The picture of capacity_gpu: every row is where its numbers say."""

from itertools import permutations
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.serving.capacity_plot import COLOURS, HEIGHT, plot
from orchestrator.control.slo import Slo
from orchestrator.plot import svg

SLO = Slo(0.5, 0.03)
SVG = "{http://www.w3.org/2000/svg}"


def row(policy: str, rate_rps: float, attainment: float) -> dict[str, Any]:
    found = {"policy": policy, "rate_rps": rate_rps, "attainment": attainment}
    return found | ({"vllm": {}} if policy.startswith("vllm") else {})


ROWS = [
    row("vllm@2048", 20.0, 0.5),
    row("slack@predicted", 26.0, 0.0),
    row("vllm@2048", 26.0, 0.25),
    row("slack@predicted", 20.0, 1.0),
]


def lines(picture: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(picture)
    return {line.attrib["stroke"]: line for line in root.iter(f"{SVG}polyline")}


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_height_is_attainment_and_lines_run_by_the_rate() -> None:
    found = lines(plot(ROWS, SLO))
    theirs, ours = points(found[COLOURS[0]]), points(found[COLOURS[1]])
    (_, bound), _ = points(found[svg.GREY])
    percent = HEIGHT / 105
    assert ours[1][1] - ours[0][1] == pytest.approx(100 * percent, abs=0.2)
    assert theirs[1][1] - theirs[0][1] == pytest.approx(25 * percent, abs=0.2)
    assert bound - ours[0][1] == pytest.approx(10 * percent, abs=0.2)
    assert [x for x, _ in ours] == [x for x, _ in theirs] == sorted(x for x, _ in ours)


def test_lines_of_vllm_are_dashed_and_the_legend_says_so() -> None:
    picture = plot(ROWS, SLO)
    found = lines(picture)
    assert "stroke-dasharray" in found[COLOURS[0]].attrib
    assert "stroke-dasharray" not in found[COLOURS[1]].attrib
    words = [one.text for one in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert {"vllm@2048 (dashed)", "slack@predicted"} <= set(words)
    assert "Requests that met TTFT 500 ms and TPOT 30 ms, %" in words


def test_the_order_of_rows_moves_no_point() -> None:
    pictures = [lines(plot(rows, SLO)) for rows in permutations(ROWS)]
    drawn = {frozenset(line.attrib["points"] for line in found.values()) for found in pictures}
    assert len(drawn) == 1


def test_one_row_is_a_dot() -> None:
    root = ElementTree.fromstring(plot(ROWS[:1], SLO))
    assert len(list(root.iter(f"{SVG}circle"))) == 1
