"""Where the time of simulated requests goes: spans of each, and a picture of some. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.bench.records import OK, RequestRecord
from orchestrator.control.slo import Slo, tpot_s
from orchestrator.plot import svg
from orchestrator.plot.chart import BELOW, RIGHT, TITLE, Axis, Frame, axes

#: Of every picture, in pixels.
WIDTH, MARGIN = 860.0, 16.0
#: Requests that one picture shows at most, and the height of each.
MAX_REQUESTS, ROW = 60, 13.0


class SpanKind(StrEnum):
    """What a request does for a while; in order."""

    QUEUE = "queue"
    PREFILL = "prefill"
    #: Where only the whole is known.
    TO_FIRST = "queue and prefill"
    HAND_OFF = "hand-off that decode waits for"
    DECODE = "decode"
    FAILED = "failed"


SPAN_COLOURS = {
    SpanKind.QUEUE: svg.GREY,
    SpanKind.PREFILL: svg.BLUE,
    SpanKind.TO_FIRST: svg.BLUE,
    SpanKind.HAND_OFF: svg.PURPLE,
    SpanKind.DECODE: svg.AMBER,
    SpanKind.FAILED: svg.RED,
}
MISSED_COLOUR, FAULT_COLOUR = svg.RED, svg.INK


@dataclass(frozen=True, slots=True)
class Span:
    """From when until when, in seconds since the request arrived."""

    kind: SpanKind
    begin_s: float
    end_s: float


def spans_of(record: RequestRecord) -> list[Span]:
    """One after the other, from its arrival to its end; those that took no time are left out."""
    if record.status != OK:
        found = [Span(SpanKind.FAILED, 0.0, record.total_s or 0.0)]
    else:
        first_s, last_s, gateway = record.token_times_s[0], record.token_times_s[-1], record.gateway
        if gateway is None:
            found = [Span(SpanKind.TO_FIRST, 0.0, first_s), Span(SpanKind.DECODE, first_s, last_s)]
        else:
            queue_s = min(gateway.queue_s, first_s)
            decode_s = min(first_s + (gateway.kv_exposed_s or 0.0), last_s)
            found = [
                Span(SpanKind.QUEUE, 0.0, queue_s),
                Span(SpanKind.PREFILL, queue_s, first_s),
                Span(SpanKind.HAND_OFF, first_s, decode_s),
                Span(SpanKind.DECODE, decode_s, last_s),
            ]
    return [span for span in found if span.end_s > span.begin_s]


def kinds_of(records: Sequence[RequestRecord]) -> list[SpanKind]:
    """Those that occur, in their order."""
    found = {span.kind for record in records for span in spans_of(record)}
    return [kind for kind in SpanKind if kind in found]


def requests_picture(records: Sequence[RequestRecord], slo: Slo, faults_s: Sequence[float] = ()) -> str:
    """At most MAX_REQUESTS of them, evenly chosen, in order of arrival; each begins on the left. faults_s: when each fault began, which is marked on requests that were there."""
    num = min(MAX_REQUESTS, len(records))
    shown = [records[index * len(records) // num] for index in range(num)]
    left = 110.0
    width = WIDTH - left - RIGHT
    entries = [(kind.value, SPAN_COLOURS[kind]) for kind in kinds_of(shown)]
    parts = [svg.text(MARGIN, 24, f"{num} of {len(records)} requests in order of arrival")]
    entries.append(("missed its targets", MISSED_COLOUR))
    if faults_s:
        entries.append(("a fault begins", FAULT_COLOUR))
    marks, height = svg.legend(entries, MARGIN, 38, WIDTH - 2 * MARGIN)
    frame = Frame(left, 38 + height + TITLE, width, max(1, num) * ROW)
    longest_s = max((span.end_s for record in shown for span in spans_of(record)), default=0.0)
    parts.append(svg.text(left - 14, frame.top - 8, "arrived at", "end"))
    time = Axis("seconds since its arrival", 0.0, longest_s or 1.0)
    parts += [*marks, "<g>", *axes(frame, "", time)]
    for i, record in enumerate(shown):
        y = frame.top + i * ROW
        parts += [*_row(record, slo, frame, time, y), *_faults(record, faults_s, frame, time, y)]
    parts.append("</g>")
    return svg.document(WIDTH, frame.top + frame.height + BELOW, "Where the time of requests goes", parts)


def _row(record: RequestRecord, slo: Slo, frame: Frame, time: Axis, y: float) -> list[str]:
    parts = [svg.text(frame.left - 14, y + ROW - 3, f"{record.planned.arrival_s:,.1f} s", "end")]
    if not _is_met(record, slo):
        parts.append(svg.bar(frame.left - 9, y + 1, 4, ROW - 2, MISSED_COLOUR))
    for span in spans_of(record):
        begin, end = frame.x(time, span.begin_s), frame.x(time, span.end_s)
        parts.append(svg.bar(begin, y + 1, end - begin, ROW - 2, SPAN_COLOURS[span.kind]))
    return parts


def _faults(
    record: RequestRecord, faults_s: Sequence[float], frame: Frame, time: Axis, y: float
) -> list[str]:
    end_s = max((span.end_s for span in spans_of(record)), default=0.0)
    since_s = [at_s - record.planned.arrival_s for at_s in faults_s]
    return [
        svg.bar(frame.x(time, one_s) - 1, y, 2, ROW, FAULT_COLOUR) for one_s in since_s if 0 <= one_s < end_s
    ]


def _is_met(record: RequestRecord, slo: Slo) -> bool:
    """It has met both targets."""
    return record.status == OK and slo.is_met(record.token_times_s[0], tpot_s(record.token_times_s))
