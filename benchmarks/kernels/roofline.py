"""What is computed on a GPU against what it could be: TFLOP/s by FLOP per byte, as a picture and a table.

    python benchmarks/kernels/roofline.py [--out FILE.svg] [--json FILE]

Measures nothing: it reads what other benchmarks have left in benchmarks/results, of H100s of one kind. Both roofs are measured too: the rate of
a copy within the device, bytes read and written (paged_attention_gpu), and of a product of 8,192 x 8,192 x 8,192 in bf16 (sm_share_gpu).
Operations and bytes are counted, not measured:

- decode attention: 4 x 32 query heads x 128 for each token of all contexts; K and V, read once. Over packed KV the packed bytes.
- chunks of prompts: operations for what rows see; K and V read once, queries read and outputs written, in bf16.
- engine: prefill of one prompt and decode steps of Llama-3-8B's shape: two operations for each weight and row, and attention. All weights
  but the embedding table and the KV of all sequences, read once; of a prefill its KV, written once.

A kernel that reads something twice, as chunks read their contexts, is below its roof for that too. Reading alone is up to 2 % faster than
copying.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels.attention_shapes import CHUNKS, HEAD_DIM, NUM_HEADS  # noqa: E402
from orchestrator.plot import svg  # noqa: E402
from orchestrator.plot.chart import BELOW, LEFT, RIGHT, Axis, Frame, Series, chart  # noqa: E402

#: Of decode attention: (sequences, mean context, whether contexts differ).
DECODE_ROWS = ((1, 1024, False), (1, 16384, False), (16, 16384, True))
CHUNK_ROWS = (
    "256 cold",
    "2048 cold",
    "8192 cold",
    "512 after 2048",
    "128 after 65536",
    "512 after 131072",
    "128 after 65536, 64 decode at 2048",
)
PACKED_ROWS = ("decode attention, batch 1, context 32768", "decode attention, batch 32, context 32768")
CODECS = ("int4_hadamard", "gear", "gear_l")
CHUNK_KV_HEADS = 8
BF16_BYTES = 2
#: Llama-3-8B.
NUM_LAYERS, NUM_KV_HEADS = 32, 8
#: Of one token of one sequence in decode attention: a product with K and one with V, of all heads.
TOKEN_FLOP = 4 * NUM_HEADS * HEAD_DIM
#: Of K and V of one token for one head.
HEAD_BYTES = 2 * HEAD_DIM * BF16_BYTES

LEAN, CHUNK, PACKED, ENGINE = "our decode", "our chunks", "our decode, packed KV", "our engine"
SPLIT, FLASHINFER, FA3 = "fixed split", "FlashInfer", "FA3"
COLOURS = {
    LEAN: svg.BLUE,
    CHUNK: svg.GREEN,
    PACKED: svg.RED,
    ENGINE: "#0e8a9c",
    SPLIT: svg.GREY,
    FLASHINFER: svg.AMBER,
    FA3: svg.PURPLE,
}
WIDTH, HEIGHT, MARGIN = 640.0, 420.0, 16.0
X, Y = Axis("FLOP per byte", 0.4, 6000.0, is_log=True), Axis("TFLOP/s", 0.3, 1300.0, is_log=True)


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. kind: of COLOURS."""

    kind: str
    name: str
    flop: float
    num_bytes: float
    seconds: float

    @property
    def flop_per_byte(self) -> float:
        return self.flop / self.num_bytes

    @property
    def tflop_per_s(self) -> float:
        return self.flop / self.seconds / 1e12


@dataclass(frozen=True, slots=True)
class Roofs:
    """What the device can do at most, as measured."""

    tb_per_s: float
    tflop_per_s: float

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on the bytes no longer matter."""
        return self.tflop_per_s / self.tb_per_s

    def at(self, flop_per_byte: float) -> float:
        """TFLOP/s."""
        return min(self.tflop_per_s, flop_per_byte * self.tb_per_s)


def roofs_of(attention: Mapping[str, Any], sm_share: Mapping[str, Any]) -> Roofs:
    """By two results: of paged_attention_gpu, of sm_share_gpu."""
    return Roofs(attention["copy_tb_per_s"], max(row["gemm_tflops"] for row in sm_share["curve"]["rows"]))


def decode_points(attention: Mapping[str, Any]) -> list[Point]:
    """Ours and others of the rows that DECODE_ROWS names, for each number of KV heads."""
    ways = {LEAN: "lean_us", SPLIT: "split_us", FLASHINFER: "flashinfer_us", FA3: "fa3_us"}
    found = []
    for row in attention["decode"]:
        if (row["batch"], row["mean_context"], row["is_ragged"]) not in DECODE_ROWS:
            continue
        num_tokens = row["kv_bytes"] / (row["kv_heads"] * HEAD_BYTES)
        kind = ", ragged" if row["is_ragged"] else ""
        name = f"{row['kv_heads']} KV heads, {row['batch']} x {row['mean_context']:,}{kind}"
        found += [
            Point(way, name, TOKEN_FLOP * num_tokens, row["kv_bytes"], row[column] / 1e6)
            for way, column in ways.items()
            if row.get(column) is not None
        ]
    return found


def chunk_points(attention: Mapping[str, Any]) -> list[Point]:
    """Ours and others of the rows that CHUNK_ROWS names."""
    found = []
    for row in attention["chunks"]:
        if row["name"] not in CHUNK_ROWS:
            continue
        lengths = CHUNKS[row["name"]]
        num_bytes = sum(
            total * CHUNK_KV_HEADS * HEAD_BYTES + 2 * new * NUM_HEADS * HEAD_DIM * BF16_BYTES
            for new, total in lengths
        )
        for kind, way in ((CHUNK, "paged"), (FLASHINFER, "flashinfer"), (FA3, "fa3")):
            if way in row:
                found.append(Point(kind, row["name"], row["tflop"] * 1e12, num_bytes, row[way]["us"] / 1e6))
    return found


def packed_points(packed: Mapping[str, Any]) -> list[Point]:
    """Of the rows that PACKED_ROWS names, by codec. packed: of fused_gpu."""
    found = []
    for row in packed["rows"]:
        if row["what"] in PACKED_ROWS and row["way"] in CODECS and "seconds" in row:
            batch, context_len = (int(part.split()[-1]) for part in row["what"].split(",")[1:])
            name = f"{row['way']}, {batch} x {context_len:,}"
            found.append(Point(PACKED, name, TOKEN_FLOP * batch * context_len, row["bytes"], row["seconds"]))
    return found


def engine_points(engine: Mapping[str, Any]) -> list[Point]:
    """Of steps in bf16. engine: of engine_gpu, where a decode step's floor is its bytes at the rate of the copy."""
    token_bytes = NUM_LAYERS * NUM_KV_HEADS * HEAD_BYTES
    found, weight_bytes = [], 0.0
    for row in engine["decode"]:
        num_tokens = row["sequences"] * row["context"]
        num_bytes = row["floor_ms"] / 1e3 * engine["copy_tb_s"] * 1e12
        weight_bytes = num_bytes - num_tokens * token_bytes
        flop = 2 * weight_bytes / BF16_BYTES * row["sequences"] + NUM_LAYERS * TOKEN_FLOP * num_tokens
        name = f"decode step, {row['sequences']} x {row['context']:,}"
        found.append(Point(ENGINE, name, flop, num_bytes, row["ms"] / 1e3))
    row = engine["prefill"]
    seconds = row["ms"] / 1e3
    num_bytes = weight_bytes + row["tokens"] * token_bytes
    found.append(
        Point(ENGINE, f"prefill of {row['tokens']:,}", row["tflops"] * 1e12 * seconds, num_bytes, seconds)
    )
    return found


def plot(points: Sequence[Point], roofs: Roofs) -> str:
    """Each kind in its colour, the engine as squares; ours on top where points lie on each other."""
    line = tuple((x, roofs.at(x)) for x in (X.low, roofs.ridge, X.high))
    series = [Series(svg.GREY, line)] + [
        Series(colour, ((point.flop_per_byte, point.tflop_per_s),))
        for kind, colour in reversed(COLOURS.items())
        for point in points
        if point.kind == kind != ENGINE
    ]
    kinds = {point.kind for point in points}
    marks, height = svg.legend([(k, c) for k, c in COLOURS.items() if k in kinds], LEFT, 36, WIDTH)
    frame = Frame(LEFT, 36 + height + 12, WIDTH, HEIGHT)
    heading = svg.text(
        MARGIN, 24, "TFLOP/s of an H100 in bf16 by FLOP per byte; grey: what a copy and a product reach"
    )
    squares = [
        svg.bar(frame.x(X, x) - 4, frame.y(Y, y) - 4, 8, 8, COLOURS[ENGINE])
        for x, y in ((point.flop_per_byte, point.tflop_per_s) for point in points if point.kind == ENGINE)
    ]
    parts = [heading, *marks, *chart(frame, "", X, Y, series), *squares, *_names(points, roofs, frame)]
    return svg.document(
        LEFT + WIDTH + RIGHT, frame.top + HEIGHT + BELOW, "Roofline of kernels and of the engine", parts
    )


def _names(points: Sequence[Point], roofs: Roofs, frame: Frame) -> list[str]:
    """Of the roofs, of what the engine does, and of columns of decode."""

    def beside(x: float, y: float, words: str, dx: float, dy: float, anchor: str = "start") -> str:
        return svg.text(frame.x(X, x) + dx, frame.y(Y, y) + dy, words, anchor)

    middle = roofs.ridge**0.5
    parts = [
        beside(middle, roofs.at(middle), f"copy, {roofs.tb_per_s:.2f} TB/s", -10, 0, "end"),
        beside(roofs.ridge, roofs.tflop_per_s, f"product, {roofs.tflop_per_s:.0f} TFLOP/s", -10, -6, "end"),
    ]
    columns = {point.flop_per_byte: point.name.partition(",")[0] for point in points if point.kind == LEAN}
    parts += [beside(x, Y.low, heads, 0, -6, "middle") for x, heads in columns.items()]
    # Of points of one name, beside the lowest; among chunks right of the ridge there is no room.
    falling = sorted(points, key=lambda point: -point.tflop_per_s)
    for name, point in {point.name: point for point in falling}.items():
        x, y = point.flop_per_byte, point.tflop_per_s
        if point.kind == ENGINE and x > roofs.ridge:
            parts.append(beside(x, roofs.tflop_per_s, name, 0, -6, "middle"))
        elif x < roofs.ridge and (point.kind == ENGINE or name in CHUNK_ROWS):
            parts.append(beside(x, y, name, 9, 4))
    return parts


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.svg", help="draw the picture there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    attention, packed, engine, sm_share = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for name in ("paged_attention_gpu", "quantised_attention_gpu", "engine_gpu", "sm_share_gpu")
    )
    roofs = roofs_of(attention, sm_share)
    points = [
        *decode_points(attention),
        *chunk_points(attention),
        *packed_points(packed),
        *engine_points(engine),
    ]
    print(f"at most {roofs.tb_per_s:.2f} TB/s and {roofs.tflop_per_s:.0f} TFLOP/s")
    for point in points:
        rates = f"{point.flop_per_byte:8.1f} FLOP/byte {point.tflop_per_s:7.1f} TFLOP/s"
        share = point.tflop_per_s / roofs.at(point.flop_per_byte)
        print(f"{point.kind:18}{point.name:38}{rates} {share:5.0%} of the roof")
    if args.out:
        args.out.write_text(plot(points, roofs), encoding="utf-8")
    if args.json:
        found = {"roofs": asdict(roofs), "points": [asdict(point) for point in points]}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
