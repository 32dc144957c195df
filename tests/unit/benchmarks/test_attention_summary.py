"""What a table of decode attention is summed up to."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.attention_shapes import RAGGED, ragged_lengths
from benchmarks.kernels.attention_summary import summary_of

RESULT = Path(__file__).resolve().parents[3] / "benchmarks/results/paged_attention_gpu.json"


def row(lean_us: float = 100.0, split_us: float = 200.0, **more: Any) -> dict[str, Any]:
    found = {"lean_us": lean_us, "split_us": split_us, "gather_us": 50.0, "share_of_copy": 0.5}
    found |= {"mean_context": 1024, "batch": 1, "kv_bytes": 1_000_000, "is_ragged": False}
    return found | more


def test_the_table_in_the_repository_gives_its_summary() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert summary_of(result["decode"], ["flashinfer", "fa3"]) == result["summary"]


@pytest.mark.parametrize(("split_us", "share"), [(98.1, 1.0), (98.0, 0.0)])
def test_two_percent_more_is_not_slower(split_us: float, share: float) -> None:
    assert summary_of([row(100.0, split_us)], [])["not_slower_than_split"] == share


def test_contiguous_kv_would_have_to_be_gathered_first() -> None:
    found = summary_of([row(cudnn_us=60.0, fa2_us=110.0), row(cudnn_us=40.0)], [])
    assert found["not_slower_than_any_on_contiguous_kv"] == 0.0
    assert found["not_slower_than_any_with_gather"] == 0.5
    assert found["not_slower_than_fa2_or_split"] == 1.0


def test_a_library_counts_in_the_rows_that_it_is_in() -> None:
    rows = [row(peer_us=50.0), row(), row(peer_us=400.0, is_ragged=True), row(peer_us=None, is_ragged=True)]
    found = summary_of(rows, ["peer"])
    assert found["not_slower_than_peer_or_split"] == 0.75
    assert found["peer_over_lean_even"] == pytest.approx(0.5)
    assert found["peer_over_lean_ragged"] == pytest.approx(4.0)


def test_what_no_row_tells_is_no_number() -> None:
    found = summary_of([row()], ["peer"])
    assert all(
        math.isnan(found[name])
        for name in ("peer_over_lean_even", "unsplit_over_lean_long", "share_of_copy_worst_from_1_gb")
    )


@pytest.mark.parametrize("batch_size", [1, 4, len(RAGGED), 64])
def test_ragged_batches_have_about_the_mean_that_is_asked_for(batch_size: int) -> None:
    lengths = ragged_lengths(batch_size, 4096)
    assert len(lengths) == batch_size
    assert 4096 * batch_size - batch_size < sum(lengths) <= 4096 * batch_size
