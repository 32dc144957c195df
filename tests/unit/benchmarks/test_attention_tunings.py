"""Which cut of a kernel is best, of made-up times."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.kernels import attention_tunings


def row(kind: str, **us: float) -> dict[str, object]:
    return {"kind": kind, "us": us}


def test_cuts_are_told_by_their_mean_over_the_best_of_each_row() -> None:
    rows = [row("many", a=10.0, b=20.0), row("many", a=400.0, b=100.0), row("few", b=3.0)]
    found = attention_tunings.best_of(rows)
    assert found["few"] == {"b": 1.0}
    assert list(found["many"]) == ["b", "a"]
    assert found["many"] == pytest.approx({"b": 2**0.5, "a": 2.0})


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("kind", attention_tunings.ROWS)
def test_no_cut_is_tried_twice(kind: str, is_quick: bool) -> None:
    names = [name for name, _ in attention_tunings.calls(kind, is_quick=is_quick)]
    assert names
    assert len(set(names)) == len(names)
