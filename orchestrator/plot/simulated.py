"""Pictures of simulated loads: how well each rate was served, and who did what over time. Pure."""

import math
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
SWITCH_COLOUR, FAULT_COLOUR = svg.RED, svg.INK
#: Whose faults no worker has.
CONTROLLER = "controller"
#: Workers that one picture shows at most, and the height of each.
MAX_LANES, LANE = 64, 20.0
#: Width of what marks one moment.
MARK = 3.0
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
class FaultMark:
    """What went wrong from when until when, in seconds since arrivals began.

    worker_id: None of the controller. end_s: None where it was not over at the end. is_down: there was no process to serve meanwhile.
    """

    worker_id: WorkerId | None
    begin_s: float
    end_s: float | None
    is_down: bool


@dataclass(frozen=True, slots=True)
class Course:
    """One simulation. workers: with their phases at its beginning. start_s: on the switches' clock, when arrivals began."""

    workers: Mapping[WorkerId, PhaseSet]
    switches: Sequence[SwitchView]
    start_s: float
    records: Sequence[RequestRecord]
    elapsed_s: float
    faults: Sequence[FaultMark] = ()


def attainment_picture(points: Sequence[Point], slo: Slo, num_faults: int = 0) -> str:
    """Attainment, p90 of TTFT and p90 of TPOT, each against the rate, with the targets. num_faults: of each rate."""
    ordered = sorted(points, key=lambda point: point.rate_rps)
    rates = axis_over("requests/s", [point.rate_rps for point in ordered])
    width = (WIDTH - 3 * (LEFT + RIGHT)) / 3
    frames = [Frame(LEFT + i * (width + LEFT + RIGHT), 64.0, width, 220.0) for i in range(3)]
    met = tuple((one.rate_rps, 100 * (one.summary.attainment or 0.0)) for one in ordered)
    attainment = Series(svg.BLUE, met, has_dots=True)
    ttft = [(one.rate_rps, one.summary.ttft_s.p90 * 1e3) for one in ordered if one.summary.ttft_s]
    tpot = [(one.rate_rps, one.summary.tpot_s.p90 * 1e3) for one in ordered if one.summary.tpot_s]
    title = "How well each rate was served; dashed: the target"
    if num_faults:
        title += f"; with {num_faults} fault{'s' if num_faults > 1 else ''}"
    parts = [
        svg.text(MARGIN, 24, title),
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
    names = [*shown, *([CONTROLLER] if any(fault.worker_id is None for fault in course.faults) else [])]
    left = max(float(LEFT), MARGIN + 8 + max(map(svg.text_width, names)))
    width, time = WIDTH - left - RIGHT, Axis("seconds", 0.0, max(course.elapsed_s, 1e-3))
    title = "workers, by what they serve"
    if len(shown) < len(course.workers):
        title += f"; the first {len(shown)} of {len(course.workers):,}"
    occurring = {*course.workers.values(), *(switch.phases for switch in course.switches)}
    entries = [
        (phase_text(phases), colour) for phases, colour in PHASE_COLOURS.items() if phases in occurring
    ]
    entries.append(("switch begins", SWITCH_COLOUR))
    if course.faults:
        entries.append(("fault; dashed: begins", FAULT_COLOUR))
    parts, top = _heading(title, entries, left, MARGIN)
    lanes = Frame(left, top, width, LANE * len(names))
    parts += _lanes(course, names, lanes, time)
    top = lanes.top + lanes.height + BELOW + 12

    marks, top = _arrivals(course, Frame(left, top, width, 90), time)
    parts += marks
    for title, kinds in BANDS:
        marks, top = _requests(course, title, kinds, Frame(left, top, width, 90), time)
        parts += marks
    return svg.document(WIDTH, top, "Phases of workers and requests over time", parts)


def _arrivals(course: Course, room: Frame, time: Axis) -> tuple[list[str], float]:
    """The band of tokens that are asked for; returns where it ends."""
    planned = [record.planned for record in course.records]
    asked = (
        ("of prompts", svg.BLUE, [(one.arrival_s, one.prompt_tokens) for one in planned]),
        ("of answers", svg.AMBER, [(one.arrival_s, one.output_tokens) for one in planned]),
    )
    series = [Series(colour, _binned(time, amounts), is_step=True) for _, colour, amounts in asked]
    entries = [(name, colour) for name, colour, _ in asked]
    return _band("tokens/s asked for by what arrives", entries, series, course.faults, room, time)


def _requests(
    course: Course, title: str, kinds: Sequence[SpanKind], room: Frame, time: Axis
) -> tuple[list[str], float]:
    """A band of requests by what they do; returns where it ends."""
    intervals: dict[SpanKind, list[tuple[float, float]]] = {
        kind: [] for kind in kinds_of(course.records) if kind in kinds
    }
    for record in course.records:
        at_s = record.planned.arrival_s
        for span in spans_of(record):
            if span.kind in intervals:
                intervals[span.kind].append((at_s + span.begin_s, at_s + span.end_s))
    series = [
        Series(SPAN_COLOURS[kind], tuple(_counted(time, found)), is_step=True)
        for kind, found in intervals.items()
    ]
    entries = [(kind.value, SPAN_COLOURS[kind]) for kind in intervals]
    return _band(title, entries, series, course.faults, room, time)


def _band(
    title: str,
    entries: Sequence[tuple[str, str]],
    series: Sequence[Series],
    faults: Sequence[FaultMark],
    room: Frame,
    time: Axis,
) -> tuple[list[str], float]:
    """room: its top is that of the heading, its height that of the chart."""
    heading, top = _heading(title, entries, room.left, room.top)
    frame = Frame(room.left, top, room.width, room.height)
    values = [value for one in series for _, value in one.points]
    y = axis_over("", values, from_zero=True)
    begins = [
        Series(FAULT_COLOUR, ((one.begin_s, y.low), (one.begin_s, y.high)), is_dashed=True) for one in faults
    ]
    return [*heading, *chart(frame, "", time, y, [*begins, *series])], top + room.height + BELOW + 12


def _heading(
    title: str, entries: Sequence[tuple[str, str]], left: float, top: float
) -> tuple[list[str], float]:
    """Title and legend; returns where what they stand above begins."""
    marks, height = svg.legend(entries, left, top + 18, WIDTH - left - RIGHT)
    return [svg.text(left, top + 10, title), *marks], top + 18 + height + 4


def _lanes(course: Course, names: Sequence[str], frame: Frame, time: Axis) -> list[str]:
    """names: of workers, and perhaps the controller, which serves nothing."""
    parts = ["<g>", *axes(frame, "", time)]
    for i, name in enumerate(names):
        y = frame.top + i * LANE
        parts.append(svg.text(frame.left - 6, y + LANE - 6, name, "end"))
        worker_id = WorkerId(name) if name in course.workers else None
        faults = [fault for fault in course.faults if fault.worker_id == worker_id]
        if worker_id is not None:
            parts += _serving(course, worker_id, [fault for fault in faults if fault.is_down], frame, time, y)
        for fault in faults:
            begin = min(frame.x(time, fault.begin_s), frame.left + frame.width - MARK)
            end = frame.x(time, time.high if fault.end_s is None else fault.end_s)
            parts.append(svg.bar(begin, y + LANE / 2 - 2, max(end - begin, MARK), 4, FAULT_COLOUR))
    return [*parts, "</g>"]


def _serving(
    course: Course, worker_id: WorkerId, downs: Sequence[FaultMark], frame: Frame, time: Axis, y: float
) -> list[str]:
    """What a worker serves, but for when it is down, and where its switches begin."""
    done = [
        (switch.began_at_s - course.start_s, switch)
        for switch in course.switches
        if switch.worker_id == worker_id and switch.state is not SwitchState.UNDONE
    ]
    parts = []
    for begin_s, end_s, phases in _served(course.workers[worker_id], done, time.high):
        for up_s, down_s in _without(begin_s, end_s, downs):
            begin, end = frame.x(time, up_s), frame.x(time, down_s)
            parts.append(svg.bar(begin, y + 2, end - begin, LANE - 4, PHASE_COLOURS[phases]))
    for began_s, _ in done:
        at = min(max(frame.x(time, began_s) - MARK / 2, frame.left), frame.left + frame.width - MARK)
        parts.append(svg.bar(at, y, MARK, LANE, SWITCH_COLOUR))
    return parts


def _without(begin_s: float, end_s: float, downs: Sequence[FaultMark]) -> Iterator[tuple[float, float]]:
    """The parts of this time in which none of them was."""
    for down in sorted(downs, key=lambda down: down.begin_s):
        if down.begin_s >= end_s:
            break
        if begin_s < down.begin_s:
            yield begin_s, down.begin_s
        begin_s = max(begin_s, math.inf if down.end_s is None else down.end_s)
    if begin_s < end_s:
        yield begin_s, end_s


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
