"""Pictures of simulated loads: how well each rate was served, and who did what over time. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.bench.records import RequestRecord
from orchestrator.bench.summary import Summary
from orchestrator.control.role_switch import phase_text
from orchestrator.control.slo import Slo
from orchestrator.control.view import SwitchState, SwitchView
from orchestrator.plot import svg
from orchestrator.plot.chart import BELOW, LEFT, RIGHT, Axis, Frame, Series, axes, axis_over, chart
from orchestrator.plot.requests import MARGIN, SPAN_COLOURS, WIDTH, SpanKind, kinds_of, spans_of
from workers.api import Phase, PhaseSet, WorkerId

ENCODE, PREFILL, DECODE = (frozenset({phase}) for phase in Phase)
PHASE_COLOURS: Mapping[PhaseSet, str] = {
    PREFILL: svg.BLUE,
    DECODE: svg.AMBER,
    PREFILL | DECODE: svg.GREEN,
    ENCODE: svg.PURPLE,
    ENCODE | PREFILL: svg.PINK,
    ENCODE | DECODE: svg.BROWN,
    ENCODE | PREFILL | DECODE: svg.TEAL,
}
SWITCH_COLOUR = svg.RED
#: Workers that one picture shows at most, and the height of each.
MAX_LANES, LANE = 64, 20.0
#: Moments at which requests are counted, and parts of the time in which arrivals are.
NUM_POINTS, NUM_BINS = 300, 40
#: What requests do, in charts of their own since numbers differ much.
BANDS = (
    (
        "requests before their first token",
        (SpanKind.QUEUE, SpanKind.PREFILL, SpanKind.TO_FIRST, SpanKind.FAILED),
    ),
    ("requests after it", (SpanKind.HAND_OFF, SpanKind.DECODE)),
)


@dataclass(frozen=True, slots=True)
class Point:
    """What came of one rate, in requests per second."""

    rate_rps: float
    summary: Summary


@dataclass(frozen=True, slots=True)
class Course:
    """One simulation. workers: with their phases at its beginning. start_s: on the switches' clock, when arrivals began."""

    workers: Mapping[WorkerId, PhaseSet]
    switches: Sequence[SwitchView]
    start_s: float
    records: Sequence[RequestRecord]
    elapsed_s: float


def attainment_picture(points: Sequence[Point], slo: Slo) -> str:
    """Attainment, p90 of TTFT and p90 of TPOT, each against the rate, with the targets."""
    ordered = sorted(points, key=lambda point: point.rate_rps)
    rates = axis_over("requests/s", [point.rate_rps for point in ordered])
    width = (WIDTH - 3 * (LEFT + RIGHT)) / 3
    frames = [Frame(LEFT + i * (width + LEFT + RIGHT), 64.0, width, 220.0) for i in range(3)]
    met = tuple((one.rate_rps, 100 * (one.summary.attainment or 0.0)) for one in ordered)
    attainment = Series(svg.BLUE, met, has_dots=True)
    ttft = [(one.rate_rps, one.summary.ttft_s.p90 * 1e3) for one in ordered if one.summary.ttft_s]
    tpot = [(one.rate_rps, one.summary.tpot_s.p90 * 1e3) for one in ordered if one.summary.tpot_s]
    parts = [
        svg.text(MARGIN, 24, "How well each rate was served; dashed: the target"),
        *chart(frames[0], "attainment, %", rates, Axis("%", 0.0, 105.0), [attainment]),
        *_latency(frames[1], "TTFT p90, ms", rates, ttft, slo.ttft_s * 1e3),
        *_latency(frames[2], "TPOT p90, ms", rates, tpot, slo.tpot_s * 1e3),
    ]
    return svg.document(WIDTH, 64 + 220 + BELOW, "Attainment, TTFT and TPOT against rate", parts)


def _latency(
    frame: Frame, title: str, rates: Axis, points: Sequence[tuple[float, float]], target_ms: float
) -> list[str]:
    y = axis_over("ms", [target_ms, *(value for _, value in points)], is_log=True)
    target = Series(svg.GREY, ((rates.low, target_ms), (rates.high, target_ms)), is_dashed=True)
    return chart(frame, title, rates, y, [target, Series(svg.BLUE, tuple(points), has_dots=True)])


def phases_picture(course: Course) -> str:
    """What each worker serves, how many tokens come, and what requests do, above each other, by the same time."""
    shown = list(course.workers)[:MAX_LANES]
    left = max(float(LEFT), MARGIN + 8 + max(map(svg.text_width, shown)))
    width, time = WIDTH - left - RIGHT, Axis("seconds", 0.0, max(course.elapsed_s, 1e-3))
    title = "workers, by what they serve"
    if len(shown) < len(course.workers):
        title += f"; the first {len(shown)} of {len(course.workers):,}"
    occurring = {*course.workers.values(), *(switch.phases for switch in course.switches)}
    entries = [
        (phase_text(phases), colour) for phases, colour in PHASE_COLOURS.items() if phases in occurring
    ]
    parts, top = _heading(title, [*entries, ("switch begins", SWITCH_COLOUR)], left, MARGIN)
    lanes = Frame(left, top, width, LANE * len(shown))
    parts += _lanes(course, shown, lanes, time)
    top = lanes.top + lanes.height + BELOW + 12

    marks, top = _arrivals(course.records, Frame(left, top, width, 90), time)
    parts += marks
    for title, kinds in BANDS:
        marks, top = _requests(course.records, title, kinds, Frame(left, top, width, 90), time)
        parts += marks
    return svg.document(WIDTH, top, "Phases of workers and requests over time", parts)


def _arrivals(records: Sequence[RequestRecord], room: Frame, time: Axis) -> tuple[list[str], float]:
    """The band of tokens that are asked for; returns where it ends."""
    planned = [record.planned for record in records]
    asked = (
        ("of prompts", svg.BLUE, [(one.arrival_s, one.prompt_tokens) for one in planned]),
        ("of answers", svg.AMBER, [(one.arrival_s, one.output_tokens) for one in planned]),
    )
    series = [Series(colour, _binned(time, amounts), is_step=True) for _, colour, amounts in asked]
    entries = [(name, colour) for name, colour, _ in asked]
    return _band("tokens/s asked for by what arrives", entries, series, room, time)


def _requests(
    records: Sequence[RequestRecord], title: str, kinds: Sequence[SpanKind], room: Frame, time: Axis
) -> tuple[list[str], float]:
    """A band of requests by what they do; returns where it ends."""
    intervals: dict[SpanKind, list[tuple[float, float]]] = {
        kind: [] for kind in kinds_of(records) if kind in kinds
    }
    for record in records:
        at_s = record.planned.arrival_s
        for span in spans_of(record):
            if span.kind in intervals:
                intervals[span.kind].append((at_s + span.begin_s, at_s + span.end_s))
    series = [
        Series(SPAN_COLOURS[kind], tuple(_counted(time, found)), is_step=True)
        for kind, found in intervals.items()
    ]
    entries = [(kind.value, SPAN_COLOURS[kind]) for kind in intervals]
    return _band(title, entries, series, room, time)


def _band(
    title: str, entries: Sequence[tuple[str, str]], series: Sequence[Series], room: Frame, time: Axis
) -> tuple[list[str], float]:
    """room: its top is that of the heading, its height that of the chart."""
    heading, top = _heading(title, entries, room.left, room.top)
    frame = Frame(room.left, top, room.width, room.height)
    values = [value for one in series for _, value in one.points]
    y = axis_over("", values, from_zero=True)
    return [*heading, *chart(frame, "", time, y, series)], top + room.height + BELOW + 12


def _heading(
    title: str, entries: Sequence[tuple[str, str]], left: float, top: float
) -> tuple[list[str], float]:
    """Title and legend; returns where what they stand above begins."""
    marks, height = svg.legend(entries, left, top + 18, WIDTH - left - RIGHT)
    return [svg.text(left, top + 10, title), *marks], top + 18 + height + 4


def _lanes(course: Course, shown: Sequence[WorkerId], frame: Frame, time: Axis) -> list[str]:
    parts = ["<g>", *axes(frame, "", time)]
    for i, worker_id in enumerate(shown):
        y = frame.top + i * LANE
        parts.append(svg.text(frame.left - 6, y + LANE - 6, worker_id, "end"))
        done = [
            (switch.began_at_s - course.start_s, switch)
            for switch in course.switches
            if switch.worker_id == worker_id and switch.state is not SwitchState.UNDONE
        ]
        for begin_s, end_s, phases in _served(course.workers[worker_id], done, time.high):
            begin, end = frame.x(time, begin_s), frame.x(time, end_s)
            parts.append(svg.bar(begin, y + 2, end - begin, LANE - 4, PHASE_COLOURS[phases]))
        for began_s, _ in done:
            at = min(max(frame.x(time, began_s) - 1.5, frame.left), frame.left + frame.width - 3)
            parts.append(svg.bar(at, y, 3, LANE, SWITCH_COLOUR))
    return [*parts, "</g>"]


def _served(
    phases: PhaseSet, switches: Sequence[tuple[float, SwitchView]], until_s: float
) -> Iterator[tuple[float, float, PhaseSet]]:
    """From when until when which phases. A worker that changes has its old ones until it has the new ones."""
    begin_s = 0.0
    for began_s, switch in switches:
        if switch.change_s is not None:
            changed_s = min(max(began_s + switch.change_s, begin_s), until_s)
            yield begin_s, changed_s, phases
            begin_s, phases = changed_s, switch.phases
    yield begin_s, until_s, phases


def _binned(time: Axis, amounts: Sequence[tuple[float, int]]) -> tuple[tuple[float, float], ...]:
    """(when, how much) each: the rate in each of NUM_BINS parts of the time."""
    width_s = time.high / NUM_BINS
    sums = [0.0] * (NUM_BINS + 1)
    for at_s, amount in amounts:
        sums[min(int(at_s / width_s), NUM_BINS - 1)] += amount / width_s
    sums[NUM_BINS] = sums[NUM_BINS - 1]
    return tuple((index * width_s, value) for index, value in enumerate(sums))


def _counted(time: Axis, intervals: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """How many there are, at those of NUM_POINTS moments at which that changes, and at the last one."""
    begins, ends = sorted(begin for begin, _ in intervals), sorted(end for _, end in intervals)
    num_begun = num_ended = 0
    last = -1
    for index in range(NUM_POINTS + 1):
        at_s = time.high * index / NUM_POINTS
        while num_begun < len(begins) and begins[num_begun] <= at_s:
            num_begun += 1
        while num_ended < len(ends) and ends[num_ended] <= at_s:
            num_ended += 1
        if num_begun - num_ended != last or index == NUM_POINTS:
            last = num_begun - num_ended
            yield at_s, last
