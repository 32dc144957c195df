"""What is counted for the picture of roofs, and that each point is where its numbers say."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.kernels import roofline
from benchmarks.kernels.roofline import ENGINE, LEAN, Point, Roofs, plot

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks/results"
ROOFS = Roofs(tb_per_s=3.0, tflop_per_s=750.0)
SVG = "{http://www.w3.org/2000/svg}"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def recorded() -> list[Point]:
    """All points of the picture in the docs."""
    attention = result("paged_attention_gpu")
    return [
        *roofline.decode_points(attention),
        *roofline.chunk_points(attention),
        *roofline.packed_points(result("quantised_attention_gpu")),
        *roofline.engine_points(result("engine_gpu")),
    ]


def decode_row(kv_heads: int, **more: Any) -> dict[str, Any]:
    """One sequence of 1,024 tokens."""
    found = {"kv_heads": kv_heads, "batch": 1, "mean_context": 1024, "is_ragged": False}
    return found | {"kv_bytes": 1024 * kv_heads * 512, "lean_us": 10.0, "split_us": 20.0} | more


@pytest.mark.parametrize("kv_heads", [2, 8, 32])
def test_decode_does_as_much_with_a_byte_as_query_heads_share_a_kv_head(kv_heads: int) -> None:
    ours, split = roofline.decode_points({"decode": [decode_row(kv_heads)]})
    assert ours.flop == 4 * 32 * 128 * 1024
    assert ours.flop_per_byte == split.flop_per_byte == 32 / kv_heads
    assert ours.tflop_per_s == pytest.approx(2 * split.tflop_per_s)


def test_what_was_not_measured_has_no_point() -> None:
    row = decode_row(8, fa3_us=12.0, flashinfer_us=None)
    assert [point.kind for point in roofline.decode_points({"decode": [row]})] == [
        LEAN, roofline.SPLIT, roofline.FA3,
    ]  # fmt: skip
    assert roofline.decode_points({"decode": [decode_row(8, mean_context=1023)]}) == []
    packed = {"what": roofline.PACKED_ROWS[0], "way": "gear", "bytes": 1, "not_run": "no memory"}
    assert roofline.packed_points({"rows": [packed]}) == []


def test_chunks_read_keys_and_values_once_and_queries_and_write_outputs() -> None:
    row = {"name": "512 after 2048", "tflop": 0.5, "paged": {"us": 50.0}}
    (point,) = roofline.chunk_points({"chunks": [row]})
    assert point.num_bytes == 2560 * 8 * 512 + 2 * 512 * 32 * 128 * 2
    assert point.flop == 0.5e12
    assert point.seconds == pytest.approx(50e-6)


def test_bytes_of_a_step_are_those_that_its_floor_was_made_of() -> None:
    weight_bytes, token_bytes = 16e9, 131072
    sizes = [(64, 2048), (1, 2048)]
    floors_ms = [(weight_bytes + n * context * token_bytes) / 3e12 * 1e3 for n, context in sizes]
    decode = [
        {"sequences": n, "context": context, "ms": 20.0, "floor_ms": floor_ms}
        for (n, context), floor_ms in zip(sizes, floors_ms, strict=True)
    ]
    prefill = {"tokens": 2048, "ms": 50.0, "tflops": 600.0}
    many, one, prompt = roofline.engine_points({"copy_tb_s": 3.0, "decode": decode, "prefill": prefill})
    # Two operations for each of 8e9 weights, and attention in 32 layers.
    assert one.flop == pytest.approx(2 * 8e9 + 32 * 4 * 32 * 128 * 2048)
    assert many.flop == pytest.approx(64 * one.flop)
    assert many.num_bytes == pytest.approx(weight_bytes + 64 * 2048 * token_bytes)
    assert prompt.num_bytes == pytest.approx(weight_bytes + 2048 * token_bytes)
    assert prompt.flop == pytest.approx(30e12)


def test_roofs_meet_at_the_ridge() -> None:
    assert ROOFS.ridge == 250.0
    assert ROOFS.at(1.0) == 3.0
    assert ROOFS.at(250.0) == ROOFS.at(4000.0) == 750.0
    rows = [{"gemm_tflops": 700.0}, {"gemm_tflops": 750.0}, {"gemm_tflops": 60.0}]
    assert roofline.roofs_of({"copy_tb_per_s": 3.0}, {"curve": {"rows": rows}}) == ROOFS


def test_what_is_recorded_is_below_the_roof() -> None:
    """Reading is a little faster than copying; more than that would be a wrong count."""
    roofs = roofline.roofs_of(result("paged_attention_gpu"), result("sm_share_gpu"))
    points = recorded()
    assert {point.kind for point in points} == set(roofline.COLOURS)
    for point in points:
        assert point.tflop_per_s < 1.03 * roofs.at(point.flop_per_byte), point


def test_points_are_on_the_picture_where_their_numbers_say() -> None:
    points = [
        Point(LEAN, "8 KV heads, one", 4e12, 1e12, 1.0),
        Point(LEAN, "8 KV heads, two", 4e12, 1e12, 0.5),
        Point(ENGINE, "step", 40e12, 1e12, 1.0),
    ]
    root = ElementTree.fromstring(plot(points, ROOFS))
    (one, two) = root.iter(f"{SVG}circle")
    assert one.attrib["cx"] == two.attrib["cx"]
    squares = [rect for rect in root.iter(f"{SVG}rect") if rect.attrib.get("width") == "8.00"]
    assert len(squares) == 1
    # Ten times the operations for a byte, ten times the rate: as far right, and up, as on its axis a decade is wide.
    right = float(squares[0].attrib["x"]) + 4 - float(one.attrib["cx"])
    up = float(one.attrib["cy"]) - float(squares[0].attrib["y"]) - 4
    x, y = roofline.X, roofline.Y
    assert right == pytest.approx(roofline.WIDTH * (x.share(40) - x.share(4)), abs=0.2)
    assert up == pytest.approx(roofline.HEIGHT * (y.share(40) - y.share(4)), abs=0.2)
    words = {one.text for one in root.iter(f"{SVG}text")}
    assert {"copy, 3.00 TB/s", "product, 750 TFLOP/s", "8 KV heads", "step"} <= words


def test_nothing_that_is_recorded_lies_off_the_axes() -> None:
    for point in recorded():
        assert roofline.X.low < point.flop_per_byte < roofline.X.high, point
        assert roofline.Y.low < point.tflop_per_s < roofline.Y.high, point
