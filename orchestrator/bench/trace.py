"""Request traces: when requests came and how long they were.

Two formats are read, told apart by the first line: the CSV of the Azure LLM inference traces and the
JSON lines of the Mooncake traces. Neither has text. Both may say how many pictures a request has: the CSV in a column NumImages,
as that of AzureLMMInferenceTrace_multimodal (ModServe, SoCC'25) does, the JSON under num_images.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import TraceError

#: Tokens that one of a row's hash_ids stands for.
HASH_BLOCK_TOKENS = 512
MAX_ROWS = 1_000_000
MAX_LINE_CHARACTERS = 2**20
MAX_TOKENS = 2**31 - 1

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_PICTURES_HEADER = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"
MAX_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request. Rows of equal `hash_ids` at the start share that many 512-token blocks of their prompts."""

    #: Counts from 1; in the CSV row 1 follows the header.
    number: int
    #: Seconds since some moment common to the file.
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    num_images: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole file: rows in order of arrival, at least one."""

    file: str
    #: "azure" or "mooncake".
    format: str
    rows: tuple[TraceRow, ...]


def read_trace(path: Path) -> Trace:
    """Read a trace file. Raises TraceError with the line that is wrong."""
    file = str(path)
    try:
        with path.open(encoding="utf-8") as stream:
            return _read(file, stream)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(file, None, f"cannot be read: {reason}") from error


def _read(file: str, stream: Any) -> Trace:
    lines = enumerate(iter(lambda: stream.readline(MAX_LINE_CHARACTERS), ""), start=1)
    _, first = next(lines, (1, ""))
    if first.strip() == AZURE_HEADER:
        return Trace(file, "azure", tuple(_rows(file, lines, _azure_row)))
    if first.strip() == AZURE_PICTURES_HEADER:
        return Trace(file, "azure", tuple(_rows(file, lines, _azure_pictures_row)))
    if first.startswith("{"):
        return Trace(file, "mooncake", tuple(_rows(file, _again(first, lines), _mooncake_row)))
    raise TraceError(
        file,
        1,
        f"is no trace: the first line is neither {AZURE_HEADER!r} nor a JSON object of a Mooncake trace",
    )


def _again(first: str, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield 1, first
    yield from lines


def _rows(
    file: str, lines: Iterator[tuple[int, str]], parse: Callable[[int, str], TraceRow]
) -> Iterator[TraceRow]:
    number, earlier_s = 0, -math.inf
    for line, text in lines:
        if not text.strip():
            continue
        if number == MAX_ROWS:
            raise TraceError(file, line, f"more than {MAX_ROWS} rows; cut the file")
        number += 1
        if len(text) == MAX_LINE_CHARACTERS:
            raise TraceError(file, line, f"is longer than {MAX_LINE_CHARACTERS} characters")
        try:
            row = parse(number, text)
        except ValueError as error:
            raise TraceError(file, line, str(error)) from error
        if row.arrival_s < earlier_s:
            raise TraceError(file, line, "this row is earlier than the one before")
        earlier_s = row.arrival_s
        yield row
    if number == 0:
        raise TraceError(file, None, "has no rows")


def _azure_row(number: int, text: str) -> TraceRow:
    columns = text.strip().split(",")
    if len(columns) != 3:
        raise ValueError(f"has {len(columns)} columns; needed: {AZURE_HEADER}")
    return TraceRow(
        number,
        _timestamp_s(columns[0]),
        _num_tokens("ContextTokens", _whole(columns[1])),
        _num_tokens("GeneratedTokens", _whole(columns[2])),
    )


def _azure_pictures_row(number: int, text: str) -> TraceRow:
    columns = text.strip().split(",")
    if len(columns) != 4:
        raise ValueError(f"has {len(columns)} columns; needed: {AZURE_PICTURES_HEADER}")
    row = _azure_row(number, ",".join((columns[0], *columns[2:])))
    return replace(row, num_images=_num_images("NumImages", _whole(columns[1])))


def _timestamp_s(text: str) -> float:
    """Seconds since 1970 of `2023-11-16 18:15:46.6805900`, taken as UTC."""
    whole, _, fraction = text.partition(".")
    try:
        # The fraction has seven digits, one more than datetime keeps.
        moment = datetime.strptime(f"{whole} +0000", "%Y-%m-%d %H:%M:%S %z")
        return moment.timestamp() + float(f"0.{_digits(fraction)}")
    except ValueError as error:
        raise ValueError(f"TIMESTAMP is {text[:40]!r}; needed: as 2023-11-16 18:15:46.6805900") from error


def _digits(text: str) -> str:
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no fraction")
    return text or "0"


def _whole(text: str) -> Any:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _mooncake_row(number: int, text: str) -> TraceRow:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is no JSON of a trace: it is nested without end") from error
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    if not isinstance(data, dict) or any(key not in data for key in keys):
        raise ValueError(f"is no JSON object with the keys {', '.join(keys)}")
    prompt_tokens = _num_tokens("input_length", data["input_length"])
    hash_ids: Any = data["hash_ids"]
    if not isinstance(hash_ids, list) or not all(type(item) is int for item in hash_ids):
        raise ValueError("hash_ids is no list of whole numbers")
    if len(hash_ids) * HASH_BLOCK_TOKENS < prompt_tokens:
        raise ValueError(f"input_length {prompt_tokens} needs more than {len(hash_ids)} hash_ids")
    timestamp_ms: Any = data["timestamp"]
    if type(timestamp_ms) not in (int, float) or not 0 <= timestamp_ms < 1e15:
        raise ValueError(f"timestamp is {str(timestamp_ms)[:40]}; needed: milliseconds, 0 or more")
    output_tokens = _num_tokens("output_length", data["output_length"])
    num_images = _num_images("num_images", data.get("num_images", 0))
    return TraceRow(number, timestamp_ms / 1000, prompt_tokens, output_tokens, tuple(hash_ids), num_images)


def _num_images(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_IMAGES:
        raise ValueError(f"{name} is {str(value)[:40]!r}; needed: a whole number from 0 to {MAX_IMAGES}")
    return value


def _num_tokens(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{name} is {str(value)[:40]!r}; needed: a whole number from 1 to {MAX_TOKENS}")
    return value
