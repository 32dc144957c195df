"""Pictures: well-formed, the same each time, and no mark or word outside of where it belongs."""

from dataclasses import replace
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK, GatewayTimings, LoadResult, RequestRecord
from orchestrator.bench.summary import summarise
from orchestrator.bench.trace import TraceRow
from orchestrator.control.slo import Slo
from orchestrator.control.view import SwitchState, SwitchView
from orchestrator.plot import svg
from orchestrator.plot.chart import Axis, Frame, Series, axis_over, chart
from orchestrator.plot.requests import MAX_REQUESTS, Span, SpanKind, requests_picture, spans_of
from orchestrator.plot.simulated import (
    FAULT_COLOUR,
    MAX_LANES,
    PHASE_COLOURS,
    SWITCH_COLOUR,
    Course,
    FaultMark,
    Point,
    attainment_picture,
    phases_picture,
)
from tests.support.sim import BOTH, D, P
from workers.api import Phase, WorkerId

SLO = Slo(0.5, 0.03)
#: Pixels that rounding may add.
ROUNDING = 0.11

durations = st.floats(0.0, 1e4)
numbers = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))


def record(
    at_s: float, first_s: float, gap_s: float, num: int, timings: tuple[float, float] | None
) -> RequestRecord:
    planned = PlannedRequest(TraceRow(1, at_s, 100, num), at_s, 100, num)
    times = tuple(first_s + gap_s * index for index in range(num))
    gateway = None
    if timings is not None:
        queue_s, exposed_s = timings
        gateway = GatewayTimings(first_s, queue_s, max(0.0, first_s - queue_s), exposed_s, "p", "d", 1)
    return RequestRecord(planned, OK, "", 0.0, times, times[-1], gateway)


records = st.lists(
    st.one_of(
        st.builds(
            record,
            durations,
            durations,
            durations,
            st.integers(1, 20),
            st.none() | st.tuples(durations, durations),
        ),
        st.builds(
            lambda at_s, total_s: RequestRecord(
                PlannedRequest(TraceRow(1, at_s, 9, 9), at_s, 9, 9), "UNAVAILABLE", "no", 0.0, (), total_s
            ),
            durations,
            st.none() | durations,
        ),
    ),
    max_size=80,
)


def elements(picture: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(picture).iter())


def box(element: ElementTree.Element) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom, as wide as words are thought to be."""
    get, name = element.attrib, element.tag.split("}")[1]
    if name == "rect" and get["width"] != "100%":
        x, y = float(get["x"]), float(get["y"])
        return x, y, x + float(get["width"]), y + float(get["height"])
    if name == "polyline":
        points = [tuple(map(float, pair.split(","))) for pair in get["points"].split()]
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        return min(xs), min(ys), max(xs), max(ys)
    if name == "line":
        return float(get["x1"]), float(get["y1"]), float(get["x2"]), float(get["y2"])
    if name == "circle":
        x, y = float(get["cx"]), float(get["cy"])
        return x, y, x, y
    if name == "text":
        x, y, width = float(get["x"]), float(get["y"]), svg.text_width(element.text or "")
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[get["text-anchor"]]
        return left, y - 9, left + width, y + 2
    return None


def check(picture: str) -> None:
    """Everything is on the picture, lines and dots in their frames, and words do not overlap."""
    root = ElementTree.fromstring(picture)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        if (found := box(element)) is not None:
            assert found[0] >= -ROUNDING, element.attrib
            assert found[1] >= -ROUNDING, element.attrib
            assert found[2] <= width + ROUNDING, element.attrib
            assert found[3] <= height + ROUNDING, element.attrib
    for group in root.findall(".//{*}g"):
        [frame] = [one for one in group if one.attrib.get("class") == "frame"]
        left, top, right, bottom = box(frame) or (0.0, 0.0, 0.0, 0.0)
        for mark in [
            *group.findall(".//{*}polyline"),
            *group.findall(".//{*}circle"),
            *group.findall(".//{*}line"),
        ]:
            x1, y1, x2, y2 = box(mark) or (0.0, 0.0, 0.0, 0.0)
            assert left - ROUNDING <= x1 <= x2 <= right + ROUNDING
            assert top - ROUNDING <= y1 <= y2 <= bottom + ROUNDING
    words = [found for one in root.findall(".//{*}text") if (found := box(one)) is not None]
    for a, b in combinations(words, 2):
        is_apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert is_apart, (a, b)


@given(st.lists(st.tuples(numbers, numbers), max_size=30), st.booleans(), st.booleans(), st.booleans())
def test_all_of_a_line_is_in_its_frame(
    points: list[tuple[float, float]], is_step: bool, is_log: bool, from_zero: bool
) -> None:
    x = axis_over("seconds", [at for at, _ in points])
    y = axis_over("ms", [value for _, value in points], is_log=is_log, from_zero=from_zero)
    series = Series(svg.BLUE, tuple(sorted(points)), is_step=is_step, has_dots=True)
    parts = chart(Frame(100, 40, 300, 200), "title", x, y, [series])
    picture = svg.document(450, 300, "<&>", parts)
    root = ElementTree.fromstring(picture)
    assert len(list(root.findall(".//{*}circle"))) == len(points)
    [group] = root.findall(".//{*}g")
    for mark in [
        *group.findall(".//{*}polyline"),
        *group.findall(".//{*}circle"),
        *group.findall(".//{*}line"),
    ]:
        x1, y1, x2, y2 = box(mark) or (0.0, 0.0, 0.0, 0.0)
        assert 100 - ROUNDING <= x1 <= x2 <= 400 + ROUNDING
        assert 40 - ROUNDING <= y1 <= y2 <= 240 + ROUNDING


@given(numbers, st.floats(1e-3, 1e9), st.booleans())
def test_ticks_are_few_and_on_the_axis(low: float, length: float, is_log: bool) -> None:
    axis = Axis("", abs(low) + 1e-3 if is_log else low, (abs(low) if is_log else low) + 1e-3 + length, is_log)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(axis.low <= tick <= axis.high for tick in ticks)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0.0, 100.0), [0, 20, 40, 60, 80, 100]),
        (Axis("", 0.0, 1.0), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis("", 40.0, 700.0, is_log=True), [50, 100, 200, 500]),
        (Axis("", 1.0, 1e4, is_log=True), [1, 10, 100, 1000, 10000]),
        (Axis("", 0.4, 6e3, is_log=True), [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_steps_hold_their_value() -> None:
    x, y = Axis("", 0.0, 10.0), Axis("", 0.0, 10.0)
    parts = chart(Frame(0, 0, 10, 10), "", x, y, [Series("c", ((0, 0), (5, 10), (10, 5)), is_step=True)])
    [line] = [part for part in parts if part.startswith("<polyline")]
    assert 'points="0.0,10.0 5.0,10.0 5.0,0.0 10.0,0.0 10.0,5.0"' in line


@given(records)
@settings(max_examples=40, deadline=None)
def test_every_request_is_on_the_picture_of_requests(found: list[RequestRecord]) -> None:
    picture = requests_picture(found, SLO)
    assert picture == requests_picture(found, SLO)
    check(picture)
    for one in found:
        spans = spans_of(one)
        assert all(a.end_s == b.begin_s for a, b in pairwise(spans))


def test_a_request_waits_is_prefilled_handed_off_and_decodes() -> None:
    spans = spans_of(record(3.0, 0.5, 0.1, 4, (0.2, 0.05)))
    assert spans == [
        Span(SpanKind.QUEUE, 0.0, 0.2),
        Span(SpanKind.PREFILL, 0.2, 0.5),
        Span(SpanKind.HAND_OFF, 0.5, 0.55),
        Span(SpanKind.DECODE, 0.55, pytest.approx(0.8)),
    ]
    kinds = [span.kind for span in spans_of(record(3.0, 0.5, 0.1, 4, None))]
    assert kinds == [SpanKind.TO_FIRST, SpanKind.DECODE]


def test_a_sample_of_many_requests_is_shown_and_slow_ones_are_marked() -> None:
    many = [record(float(i), 0.6 if i % 2 else 0.1, 0.01, 5, None) for i in range(10 * MAX_REQUESTS)]
    picture = requests_picture(many, SLO)
    assert f"{MAX_REQUESTS} of {len(many)} requests" in picture
    assert picture.count(svg.AMBER) == MAX_REQUESTS + 1
    slow = requests_picture([replace(one) for one in many[1:2]], SLO)
    assert slow.count(svg.RED) == 2


@given(
    st.lists(st.tuples(durations, st.integers(0, 2), st.sampled_from([P, D, BOTH]), st.none() | durations)),
    records,
    durations,
)
@settings(max_examples=40, deadline=None)
def test_every_switch_is_on_the_picture_of_phases(
    changes: list[tuple[float, int, frozenset[object], float | None]],
    found: list[RequestRecord],
    elapsed_s: float,
) -> None:
    workers = {WorkerId(f"w{i}"): BOTH for i in range(3)}
    switches = [
        SwitchView(
            f"s{n}",
            WorkerId(f"w{i}"),
            BOTH,
            phases,
            SwitchState.CHANGED,
            "",
            change_s=change_s,
            began_at_s=at_s,
        )  # type: ignore[arg-type]
        for n, (at_s, i, phases, change_s) in enumerate(sorted(changes, key=lambda change: change[0]))
    ]
    course = Course(workers, switches, 6.0, found, elapsed_s)
    picture = phases_picture(course)
    assert picture == phases_picture(course)
    check(picture)
    lanes = picture.split("<g>")[1]
    assert lanes.count(SWITCH_COLOUR) == len(switches)


def test_a_worker_changes_its_colour_when_it_has_its_new_phases() -> None:
    worker = WorkerId("w")
    switch = SwitchView("s", worker, P, D, SwitchState.PROVEN, "", change_s=1.0, began_at_s=10.0)
    refused = replace(switch, switch_id="t", state=SwitchState.UNDONE)
    picture = phases_picture(Course({worker: P}, (switch, refused), 6.0, (), 10.0))
    lanes = next(one for one in elements(picture) if one.tag.endswith("}g"))
    bars = [one.attrib for one in lanes if one.tag.endswith("rect") and "fill" in one.attrib]
    assert [one["fill"] for one in bars] == [PHASE_COLOURS[P], PHASE_COLOURS[D], SWITCH_COLOUR]
    assert float(bars[0]["width"]) == pytest.approx(float(bars[1]["width"]), abs=0.02)


@given(
    st.lists(st.tuples(st.integers(-1, 2), durations, st.none() | durations, st.booleans())),
    records,
    durations,
)
@settings(max_examples=40, deadline=None)
def test_every_fault_is_on_the_picture_of_phases(
    drawn: list[tuple[int, float, float | None, bool]], found: list[RequestRecord], elapsed_s: float
) -> None:
    faults = [
        FaultMark(
            None if i < 0 else WorkerId(f"w{i}"),
            begin_s,
            None if lasts_s is None else begin_s + lasts_s,
            is_down,
        )
        for i, begin_s, lasts_s, is_down in drawn
    ]
    course = Course({WorkerId(f"w{i}"): BOTH for i in range(3)}, (), 6.0, found, elapsed_s, faults)
    picture = phases_picture(course)
    assert picture == phases_picture(course)
    check(picture)
    lanes, *bands = picture.split("<g>")[1:]
    assert lanes.count(FAULT_COLOUR) == len(faults)
    assert all(band.split("</g>")[0].count(FAULT_COLOUR) == len(faults) for band in bands)
    assert (">controller<" in picture) == any(i < 0 for i, *_ in drawn)
    assert (">fault; dashed: begins<" in picture) == bool(faults)


@pytest.mark.parametrize(
    ("downs", "parts"),
    [
        ([], [(0, 10)]),
        ([(2, 4)], [(0, 2), (4, 10)]),
        ([(2, None)], [(0, 2)]),
        ([(0, 4), (3, 5)], [(5, 10)]),
        ([(6, 7), (2, 3)], [(0, 2), (3, 6), (7, 10)]),
        ([(2, 9), (3, 4)], [(0, 2), (9, 10)]),
        ([(12, 13)], [(0, 10)]),
    ],
)
def test_a_worker_serves_nothing_while_it_is_down(
    downs: list[tuple[float, float | None]], parts: list[tuple[float, float]]
) -> None:
    worker = WorkerId("w")
    faults = [FaultMark(worker, begin_s, end_s, is_down=True) for begin_s, end_s in downs]
    picture = phases_picture(Course({worker: P}, (), 0.0, (), 10.0, faults))
    lanes = next(one for one in elements(picture) if one.tag.endswith("}g"))
    left, _, right, _ = next(found for one in lanes if (found := box(one)) is not None)
    bars = [box(one) for one in lanes if one.attrib.get("fill") == PHASE_COLOURS[P]]
    served = [(one[0], one[2]) for one in bars if one is not None]
    width = right - left
    assert served == [
        (pytest.approx(left + width * begin / 10, abs=0.1), pytest.approx(left + width * end / 10, abs=0.1))
        for begin, end in parts
    ]


def test_a_fault_that_begins_while_a_request_is_there_is_marked_on_it() -> None:
    one = record(3.0, 0.5, 0.1, 4, None)
    plain = requests_picture([one], SLO)
    assert FAULT_COLOUR not in plain.split("</style>")[1]
    # Before it, in it and after it.
    picture = requests_picture([one], SLO, [2.9, 3.4, 4.9])
    check(picture)
    assert picture.count(f'"{FAULT_COLOUR}"') == 2
    assert ">a fault begins<" in picture


def test_the_picture_of_attainment_says_how_many_faults_there_were() -> None:
    points = [Point(1.0, summarise(LoadResult((), 1.0, 1.0, was_interrupted=False), SLO))]
    for num, said in ((0, "the target<"), (1, "with 1 fault<"), (3, "with 3 faults<")):
        picture = attainment_picture(points, SLO, num)
        check(picture)
        assert said in picture


def test_every_set_of_phases_has_a_colour_of_its_own() -> None:
    sets = [frozenset(chosen) for num in (1, 2, 3) for chosen in combinations(Phase, num)]
    assert set(PHASE_COLOURS) == set(sets)
    assert len({*PHASE_COLOURS.values(), SWITCH_COLOUR}) == len(sets) + 1
    picture = phases_picture(Course({WorkerId(f"w{i}"): one for i, one in enumerate(sets)}, (), 0.0, (), 1.0))
    check(picture)
    # Of the legend and of its lane; other charts may have it too.
    assert all(picture.count(colour) >= 2 for colour in PHASE_COLOURS.values())


def test_of_many_workers_the_first_are_shown() -> None:
    workers = {WorkerId(f"w{i}"): BOTH for i in range(1000)}
    picture = phases_picture(Course(workers, (), 0.0, (), 1.0))
    assert f"the first {MAX_LANES} of 1,000" in picture
    check(picture)


@given(st.lists(st.tuples(st.floats(0.01, 1e5), records), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_rate_is_on_the_picture_of_attainment(runs: list[tuple[float, list[RequestRecord]]]) -> None:
    points = [
        Point(rate, summarise(LoadResult(tuple(found), 1.0, 1.0, was_interrupted=False), SLO))
        for rate, found in runs
    ]
    picture = attainment_picture(points, SLO)
    assert picture == attainment_picture(points, SLO)
    check(picture)
    first = picture.split("<g>")[1]
    assert first.count("<circle") == len(points)
