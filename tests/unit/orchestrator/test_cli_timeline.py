"""The drawing of one request's time."""

import pytest

from orchestrator.cli.timeline import BAR_COLUMNS, Span, bar, lines, seconds
from protos import inference_pb2 as pb
from tests.support.fake_gateway import messages

ON_TWO_WORKERS = """\
             0                                       789 ms
queue       |#                                             |  12.4 ms
prefill     | ##############                               |   242 ms
KV transfer |   ------------#                              |   215 ms
decode      |               ###############################|   530 ms

latency      TTFT 256 ms, TPOT 66.0 ms, total 789 ms
tokens       37 in the prompt, 2 generated; ended by an end token
KV transfer  1.63 MiB in 6 chunks, 7.56 MiB/s
             201 ms (93%) hidden by prefill (-), 14.0 ms exposed (#)
             by shm (both are on this host), codec none, all read in place
             second token 530 ms after the first
workers      prefill on prefill-0, decode on decode-0"""

ON_ONE_WORKER = """\
             0                                       789 ms
queue       |#                                             |  12.4 ms
prefill     | ##############                               |   242 ms
decode      |                                              |   0.0 ms

latency      TTFT 256 ms, TPOT none below 2 tokens, total 789 ms
tokens       37 in the prompt, 1 generated; ended by the length limit
worker       both-0
attempts     2: a worker was lost and the request went on elsewhere"""


def last_message() -> pb.GenerateResponse:
    response = messages("Paris", ".")[-1]
    assert isinstance(response, pb.GenerateResponse)
    return response


def test_a_request_on_two_workers_shows_the_transfer_beside_prefill() -> None:
    assert "\n".join(lines(last_message())) == ON_TWO_WORKERS


def test_a_request_on_one_worker_has_no_transfer() -> None:
    last = last_message()
    last.finish_reason = pb.FINISH_REASON_LENGTH
    last.usage.completion_tokens = 1
    last.timings.ClearField("kv_transfer")
    last.timings.ClearField("tpot_s")
    last.timings.ClearField("decode_s")
    last.timings.attempts = 2
    last.timings.prefill_worker_id = last.timings.decode_worker_id = "both-0"
    assert "\n".join(lines(last)) == ON_ONE_WORKER


def test_pictures_have_a_bar_and_a_line_for_each_shard() -> None:
    last = last_message()
    last.usage.image_tokens = 20
    last.timings.encode_s, last.timings.encode_start_s = 0.1, 0.01
    last.timings.encodes.add(worker_id="encode-0", num_tiles=4, duration_s=0.09, encode_s=0.08)
    last.timings.encodes.add(worker_id="encode-1", first_tile=4, num_tiles=1, duration_s=0.1, encode_s=0.09)
    drawn = lines(last)
    assert drawn[2:4] == [
        "encode      | #####                                        |   100 ms",
        "prefill     | ##############                               |   242 ms",
    ]
    start = next(i for i, line in enumerate(drawn) if line.startswith("tokens"))
    assert drawn[start : start + 3] == [
        "tokens       37 in the prompt, 20 of pictures, 2 generated; ended by an end token",
        "pictures     encode-0: tiles 0-3, 90.0 ms in all: encode 80.0 ms",
        "             encode-1: tile 4, 100 ms in all: encode 90.0 ms",
    ]


def test_the_transfer_of_a_later_attempt_is_told_and_not_drawn() -> None:
    last = last_message()
    last.timings.attempts = 2
    drawn = lines(last)
    assert not any(line.startswith("KV transfer |") for line in drawn)
    assert "KV transfer  1.63 MiB in 6 chunks, 7.56 MiB/s" in drawn


def test_trouble_on_the_way_is_told_and_what_a_worker_does_not_tell_is_left_out() -> None:
    last = last_message()
    transfer = last.timings.kv_transfer
    transfer.num_resent_chunks, transfer.num_resumes = 2, 1
    assert "             2 chunks sent again, resumed 1 time" in lines(last)
    transfer.num_resent_chunks = transfer.num_resumes = transfer.num_wire_bytes = 0
    transfer.transport = transfer.transport_reason = transfer.codec = ""
    transfer.transfer_s = transfer.busy_s = 0.0
    last.timings.ClearField("second_token_s")
    drawn = lines(last)
    start = drawn.index("KV transfer  1.63 MiB in 6 chunks")
    assert drawn[start + 1] == "             0.0 ms hidden by prefill (-), 14.0 ms exposed (#)"
    assert drawn[start + 2].startswith("workers ")


def test_a_message_without_numbers_is_drawn_all_the_same() -> None:
    assert lines(pb.GenerateResponse())[1] == f"queue       |{' ' * BAR_COLUMNS}|   0.0 ms"


def test_it_fits_80_columns() -> None:
    last = last_message()
    last.timings.kv_transfer.num_bytes = 2**40
    last.timings.kv_transfer.num_chunks = 2**20
    last.timings.total_s = 9999.0
    assert max(len(line) for line in lines(last)) <= 80


@pytest.mark.parametrize(
    ("span", "drawn"),
    [
        (Span("all", 0.0, 1.0), "#" * BAR_COLUMNS),
        (Span("short", 0.5, 1e-9), " " * (BAR_COLUMNS // 2) + "#"),
        (Span("short at the end", 1.0, 1e-9), " " * (BAR_COLUMNS - 1) + "#"),
        (Span("over the end", 0.5, 9.0), " " * (BAR_COLUMNS // 2) + "#" * (BAR_COLUMNS // 2)),
        (Span("exposed", 0.0, 1.0, "-", 0.5), "-" * (BAR_COLUMNS // 2) + "#" * (BAR_COLUMNS // 2)),
        (Span("none", 0.5, 0.0), ""),
    ],
)
def test_a_bar_stays_on_the_axis_and_can_be_seen(span: Span, drawn: str) -> None:
    assert bar(span, 1.0) == drawn.ljust(BAR_COLUMNS)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, "0.0 ms"),
        (0.01236, "12.4 ms"),
        (0.09996, "100 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (99.99, "99.99 s"),
        (100.4, "100 s"),
    ],
)
def test_durations_have_three_digits_or_more(duration_s: float, text: str) -> None:
    assert seconds(duration_s) == text
