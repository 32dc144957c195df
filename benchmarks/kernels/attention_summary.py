"""What rows of decode attention say together. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.kernels.attention_shapes import CONTEXTS, LONG_CONTEXT


def summary_of(rows: list[dict[str, Any]], peers: Sequence[str]) -> dict[str, float]:
    """Shares of rows and ratios of times. Up to 2 % more time than the best counts as not slower.

    rows: of decode_row, one or more. peers: names of libraries that may have a time in rows.
    """

    def others(row: dict[str, Any], names: Sequence[str], gathered: Sequence[str]) -> list[float]:
        found = [row[name] for name in ("split_us", *names) if row.get(name) is not None]
        return found + [row[name] + row["gather_us"] for name in gathered if row.get(name) is not None]

    def share(names: Sequence[str], gathered: Sequence[str] = ()) -> float:
        return sum(row["lean_us"] <= 1.02 * min(others(row, names, gathered)) for row in rows) / len(rows)

    def ratio(name: str, chosen: list[dict[str, Any]]) -> float:
        ratios = [row[name] / row["lean_us"] for row in chosen if row.get(name) is not None]
        return statistics.geometric_mean(ratios) if ratios else float("nan")

    long = [row for row in rows if row["mean_context"] >= LONG_CONTEXT]
    longest = [row for row in long if row["batch"] == 1 and row["mean_context"] == max(CONTEXTS)]
    large = [row["share_of_copy"] for row in rows if row["kv_bytes"] >= 1e9]
    contiguous = ["fa2_us", "cudnn_us"]
    of_peers: dict[str, float] = {}
    for name in peers:
        column = f"{name}_us"
        of_peers[f"not_slower_than_{name}_or_split"] = share([column])
        of_peers[f"not_slower_than_{name}_or_any_on_contiguous_kv"] = share([column, *contiguous])
        of_peers[f"not_slower_than_{name}_or_any_with_gather"] = share([column], contiguous)
        for kind, is_ragged in (("even", False), ("ragged", True)):
            chosen = [row for row in rows if row["is_ragged"] == is_ragged]
            of_peers[f"{name}_over_lean_{kind}"] = ratio(column, chosen)
    return {
        "share_of_copy_worst_from_1_gb": min(large, default=float("nan")),
        "share_of_copy_median_from_1_gb": statistics.median(large) if large else float("nan"),
        "not_slower_than_split": share([]),
        "not_slower_than_fa2_or_split": share(["fa2_us"]),
        "not_slower_than_any_on_contiguous_kv": share(contiguous),
        "not_slower_than_any_with_gather": share([], contiguous),
        **of_peers,
        "fa2_over_lean_long": ratio("fa2_us", long),
        "unsplit_over_lean_long": ratio("unsplit_us", long),
        "unsplit_over_lean_512k_batch_1": ratio("unsplit_us", longest),
    }
