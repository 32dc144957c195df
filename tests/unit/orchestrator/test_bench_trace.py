"""Traces as they are read, and as they are re-timed, clipped and given tokens."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.plan import Slice, plan_requests, prompt_token_ids, take_slice
from orchestrator.bench.trace import Trace, TraceRow, read_trace
from orchestrator.errors import GatewayUnreachable, TraceError

TRACES = Path(__file__).parents[2] / "fixtures" / "traces"
AZURE = TRACES / "azure_llm_2023_conv.csv"
MOONCAKE = TRACES / "mooncake_conversation.jsonl"

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD_CSV = "2023-11-16 18:15:46.6805900,374,44\n"
GOOD = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


def test_azure_rows_have_times_and_lengths() -> None:
    trace = read_trace(AZURE)
    assert (trace.format, len(trace.rows)) == ("azure", 200)
    first, second = trace.rows[:2]
    assert (first.number, first.prompt_tokens, first.output_tokens, first.hash_ids) == (1, 374, 44, ())
    assert second.arrival_s - first.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_rows_have_times_lengths_and_hashes() -> None:
    trace = read_trace(MOONCAKE)
    assert (trace.format, len(trace.rows)) == ("mooncake", 200)
    first = trace.rows[0]
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 6758, 500)
    assert first.hash_ids == tuple(range(14))
    assert trace.rows[-1].arrival_s == 72.0


def refused(tmp_path: Path, content: str | bytes) -> TraceError:
    path = tmp_path / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    return caught.value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,b", "has 2 columns; needed: TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("2023-11-16,3,4", "TIMESTAMP is '2023-11-16'; needed: as 2023-11-16 18:15:46.6805900"),
        ("2023-13-16 18:15:46.0,3,4", "TIMESTAMP is '2023-13-16 18:15:46.0'"),
        ("2023-11-16 18:15:47.-5,3,4", "TIMESTAMP is '2023-11-16 18:15:47.-5'"),
        ("2023-11-16 18:15:47.0,x,4", "ContextTokens is 'x'; needed: a whole number from 1"),
        ("2023-11-16 18:15:47.0,0,4", "ContextTokens is '0'; needed: a whole number from 1"),
        ("2023-11-16 18:15:47.0,3,-1", "GeneratedTokens is '-1'; needed: a whole number from 1"),
        ("2023-11-16 18:15:47.0,3,9999999999", "GeneratedTokens is '9999999999'; needed"),
        ("2023-11-16 18:15:46.0,3,4", "this row is earlier than the one before"),
        ("x" * 2**21, "is longer than 1048576 characters"),
    ],
)
def test_a_bad_csv_line_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    error = refused(tmp_path, HEADER + GOOD_CSV + line + "\n")
    assert error.line == 3
    assert error.problem.startswith(said)
    assert str(error).startswith(f"{tmp_path / 'trace'}:3: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON: "),
        ("[" * 100_000, "is no JSON of a trace: it is nested without end"),
        ("5", "is no JSON object with the keys timestamp, input_length, output_length, hash_ids"),
        ('{"timestamp": 0}', "is no JSON object with the keys"),
        (json.dumps({**GOOD, "input_length": 1025}), "input_length 1025 needs more than 2 hash_ids"),
        (json.dumps({**GOOD, "input_length": 0}), "input_length is '0'; needed"),
        (json.dumps({**GOOD, "input_length": 1.5}), "input_length is '1.5'; needed"),
        (json.dumps({**GOOD, "output_length": True}), "output_length is 'True'; needed"),
        (json.dumps({**GOOD, "hash_ids": ["a", "b"]}), "hash_ids is no list of whole numbers"),
        (json.dumps({**GOOD, "hash_ids": None}), "hash_ids is no list of whole numbers"),
        (json.dumps({**GOOD, "timestamp": -1}), "timestamp is -1; needed: milliseconds"),
        (json.dumps({**GOOD, "timestamp": float("nan")}), "timestamp is nan; needed: milliseconds"),
        (json.dumps({**GOOD, "timestamp": "0"}), "timestamp is 0; needed: milliseconds"),
    ],
)
def test_a_bad_json_line_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    error = refused(tmp_path, json.dumps(GOOD) + "\n\n" + line + "\n")
    assert error.line == 3
    assert error.problem.startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no trace"),
        (HEADER, "has no rows"),
        ("time,in,out\n1,2,3\n", "is no trace: the first line is neither"),
        (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert refused(tmp_path, content).problem.startswith(said)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file or directory"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    "error", [TraceError("t.csv", 3, "is odd"), GatewayUnreachable("h:1", "it is silent")]
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@given(st.text(max_size=80), st.booleans())
def test_any_text_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, is_csv: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_text((HEADER + GOOD_CSV if is_csv else json.dumps(GOOD) + "\n") + text, errors="replace")
    try:
        rows = read_trace(path).rows
    except TraceError:
        return
    assert rows


def trace_of(*arrivals_s: float) -> Trace:
    rows = tuple(TraceRow(i, at_s, 10, 5) for i, at_s in enumerate(arrivals_s, start=1))
    return Trace("t", "azure", rows)


def test_a_slice_keeps_the_shape_of_bursts_at_the_new_rate() -> None:
    part = take_slice(trace_of(100, 100, 101, 108, 110), rate_rps=2, duration_s=2)
    assert part.arrivals_s == (0.0, 0.0, pytest.approx(0.2), pytest.approx(1.6))
    assert part.speed_up == pytest.approx(5.0)
    assert [row.number for row in part.rows] == [1, 2, 3, 4]


def test_a_slice_may_begin_later() -> None:
    part = take_slice(trace_of(0, 50, 51, 54, 56), rate_rps=1, duration_s=3, first_row=2)
    assert part.arrivals_s == (0.0, pytest.approx(0.5), pytest.approx(2.0))
    assert part.rows[0].number == 2


def test_a_slice_that_ends_with_the_file_gets_its_mean_gap_at_the_end() -> None:
    part = take_slice(trace_of(0, 1, 4), rate_rps=3, duration_s=1)
    assert part.arrivals_s == (0.0, pytest.approx(1 / 6), pytest.approx(4 / 6))


def test_one_request_needs_no_rate() -> None:
    assert take_slice(trace_of(7), rate_rps=1, duration_s=1).arrivals_s == (0.0,)


@pytest.mark.parametrize(
    ("rate_rps", "duration_s", "first_row", "said"),
    [
        (10, 1, 1, "needs 10 rows from row 1 on; the trace ends at row 5"),
        (1, 3, 4, "needs 3 rows from row 4 on; the trace ends at row 5"),
        (1, 1, 6, "needs 1 rows from row 6 on"),
        (1, 1, 0, "there is no row 0: the first one is row 1"),
        (1, 1, -3, "there is no row -3"),
        (0.1, 1, 1, "is no request at all"),
        (1e308, 1e308, 1, "the trace ends at row 5"),
        (2, 1, 1, "rows 1 to 2 all arrive at once"),
    ],
)
def test_a_slice_that_the_trace_cannot_give_is_refused(
    rate_rps: float, duration_s: float, first_row: int, said: str
) -> None:
    with pytest.raises(TraceError, match=said):
        take_slice(trace_of(5, 5, 5, 6, 7), rate_rps=rate_rps, duration_s=duration_s, first_row=first_row)


@given(
    st.lists(st.floats(0, 100), min_size=3, max_size=40).map(
        lambda gaps: [sum(gaps[:i]) for i in range(len(gaps))]
    ),
    st.floats(0.1, 100),
)
def test_retiming_scales_every_gap_alike_and_ends_within_the_duration(
    times_s: list[float], duration_s: float
) -> None:
    num_rows = len(times_s) - 1
    trace = trace_of(*times_s)
    try:
        part = take_slice(trace, rate_rps=num_rows / duration_s, duration_s=duration_s)
    except TraceError:
        assert times_s[-1] <= 0
        return
    assert len(part.rows) == num_rows
    assert part.arrivals_s[0] == 0
    assert part.arrivals_s[-1] <= duration_s
    for (a, b), (c, d) in zip(pairwise(times_s), pairwise(part.arrivals_s), strict=False):
        assert d - c == pytest.approx((b - a) / times_s[-1] * duration_s, abs=1e-9 * duration_s)


def planned_lengths(
    row: TraceRow, max_context_tokens: int, prompt: int | None = None, output: int | None = None
) -> tuple[int, int, bool, bool]:
    part = take_slice(Trace("t", "azure", (row,)), rate_rps=1, duration_s=1)
    (planned,) = plan_requests(
        part, max_context_tokens=max_context_tokens, max_prompt_tokens=prompt, max_output_tokens=output
    )
    return planned.prompt_tokens, planned.output_tokens, planned.is_prompt_clipped, planned.is_output_clipped


def test_lengths_are_clipped_to_the_limits_and_the_context() -> None:
    row = TraceRow(1, 0.0, 1000, 200)
    assert planned_lengths(row, 8192) == (1000, 200, False, False)
    assert planned_lengths(row, 1200) == (1000, 200, False, False)
    assert planned_lengths(row, 1199) == (999, 200, True, False)
    assert planned_lengths(row, 8192, prompt=300, output=7) == (300, 7, True, True)
    assert planned_lengths(row, 100) == (1, 99, True, True)
    assert planned_lengths(row, 2) == (1, 1, True, True)


def test_equal_hash_ids_give_equal_blocks_of_512_tokens() -> None:
    first = TraceRow(1, 0.0, 1500, 1, (7, 8, 9))
    second = TraceRow(2, 0.0, 1400, 1, (7, 8, 10))
    a = prompt_token_ids(first, 1500, vocab_size=49152, seed=0)
    b = prompt_token_ids(second, 1400, vocab_size=49152, seed=0)
    assert (len(a), len(b)) == (1500, 1400)
    assert a[:1024] == b[:1024]
    assert a[1024:1400] != b[1024:]
    assert a[:512] != a[512:1024]


def test_clipping_a_prompt_keeps_its_beginning() -> None:
    for row in (TraceRow(1, 0.0, 1500, 1, (7, 8, 9)), TraceRow(1, 0.0, 1500, 1)):
        whole = prompt_token_ids(row, 1500, vocab_size=100, seed=3)
        assert prompt_token_ids(row, 600, vocab_size=100, seed=3) == whole[:600]


def test_prompts_depend_on_seed_and_row_and_stay_in_the_vocabulary() -> None:
    row = TraceRow(1, 0.0, 100, 1)
    prompt = prompt_token_ids(row, 100, vocab_size=50, seed=1)
    assert prompt == prompt_token_ids(row, 100, vocab_size=50, seed=1)
    assert prompt != prompt_token_ids(row, 100, vocab_size=50, seed=2)
    assert prompt != prompt_token_ids(TraceRow(2, 0.0, 100, 1), 100, vocab_size=50, seed=1)
    assert 0 <= min(prompt) < max(prompt) < 50
    # Written down, so that a change of the generator cannot pass unseen: results would not compare.
    assert prompt[:4] == [13, 40, 43, 36]


# Pictures.


def test_both_formats_may_say_how_many_pictures_a_request_has(tmp_path: Path) -> None:
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text(
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.1,3,700,5\n2024-10-15 00:00:01.0,0,7,5\n"
    )
    row = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}
    mooncake.write_text(json.dumps({**row, "num_images": 3}) + "\n" + json.dumps(row) + "\n")
    for path in (azure, mooncake):
        rows = read_trace(path).rows
        assert [one.num_images for one in rows] == [3, 0]
        assert rows[0].prompt_tokens == 700


@pytest.mark.parametrize("num", ["-1", "x", "1001", "1.5"])
def test_a_number_of_pictures_that_is_none_is_said_with_its_line(tmp_path: Path, num: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.1,{num},700,5\n")
    with pytest.raises(TraceError, match="NumImages is"):
        read_trace(path)
    path.write_text(
        json.dumps(
            {"timestamp": 0, "input_length": 7, "output_length": 5, "hash_ids": [1], "num_images": num}
        )
    )
    with pytest.raises(TraceError, match="num_images is"):
        read_trace(path)


def test_a_prompt_has_room_for_its_pictures_and_pictures_have_room_in_the_context() -> None:
    rows = (
        TraceRow(1, 0.0, 100, 10, (), 2),
        TraceRow(2, 1.0, 1000, 10, (), 2),
        TraceRow(3, 2.0, 10, 10, (), 50),
    )
    part = Slice(rows, (0.0, 1.0, 2.0), 1.0)
    planned = plan_requests(part, max_context_tokens=2000, image_tokens=192)
    assert [(one.prompt_tokens, one.num_images) for one in planned] == [(385, 2), (1000, 2), (1921, 10)]
    assert [one.num_images for one in plan_requests(part, max_context_tokens=2000)] == [0, 0, 0]
