"""The picture of capacity_gpu: attainment of each policy against the rate, as SVG. Pure."""

from collections.abc import Sequence
from typing import Any

from orchestrator.control.slo import Slo
from orchestrator.plot import svg
from orchestrator.plot.chart import BELOW, LEFT, RIGHT, Axis, Frame, Series, axis_over, chart

WIDTH, HEIGHT, MARGIN = 520.0, 260.0, 16.0
#: Grey is the line of what a capacity is the highest rate with.
COLOURS = (svg.BLUE, svg.AMBER, svg.GREEN, svg.RED, svg.PURPLE)
CAPACITY_PERCENT = 90.0


def plot(rows: Sequence[dict[str, Any]], slo: Slo) -> str:
    """A line for each policy, those of vLLM dashed. rows: of the report, one or more, in any order."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["policy"], []).append((row["rate_rps"], 100 * row["attainment"]))
    theirs = {row["policy"] for row in rows if "vllm" in row}
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)}
    rates = axis_over("requests/s", [row["rate_rps"] for row in rows])
    bound = ((rates.low, CAPACITY_PERCENT), (rates.high, CAPACITY_PERCENT))
    series = [Series(svg.GREY, bound)] + [
        Series(colours[name], tuple(sorted(points)), has_dots=True, is_dashed=name in theirs)
        for name, points in lines.items()
    ]
    targets = f"TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms"
    names = [(f"{name} (dashed)" if name in theirs else name, colour) for name, colour in colours.items()]
    marks, height = svg.legend([*names, ("90 %", svg.GREY)], LEFT, 36, WIDTH)
    frame = Frame(LEFT, 36 + height + 12, WIDTH, HEIGHT)
    heading = svg.text(MARGIN, 24, f"Requests that met {targets}, %")
    parts = [heading, *marks, *chart(frame, "", rates, Axis("%", 0.0, 105.0), series)]
    return svg.document(
        LEFT + WIDTH + RIGHT, frame.top + HEIGHT + BELOW, "Attainment against the rate of requests", parts
    )
