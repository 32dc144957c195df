"""The capacity benchmark with policies that compute prompts and decodes at the same time, on a CPU with stand-ins for streams."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving.capacity_engine import MOST_TOKENS, Policy
from workers.api import PrefillOrder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, TRACE = "benchmarks/serving/capacity_gpu.py", "tests/fixtures/traces/azure_llm_2023_conv.csv"


def test_policies_by_name() -> None:
    assert Policy.of("sarathi+spf@512") == Policy("sarathi+spf@512", PrefillOrder.SHORTEST_REMAINING, 512)
    assert Policy.of("fcfs@2048") == Policy("fcfs@2048", PrefillOrder.FCFS, 2048)
    assert Policy.of("slack@predicted").budget is None
    assert Policy.of("nexus+fcfs") == Policy("nexus+fcfs", PrefillOrder.FCFS, MOST_TOKENS, "nexus")
    assert Policy.of("semi_pd+spf").sharing == "semi_pd"
    assert Policy.of("phasewise+fcfs") == Policy("phasewise+fcfs", PrefillOrder.FCFS, None, "phasewise")
    assert Policy.of("phasewise") == Policy("phasewise", PrefillOrder.LEAST_SLACK, None, "phasewise")


@pytest.mark.parametrize(
    "name",
    [
        "nexus",
        "mooncake+fcfs",
        "sarathi+best@2048",
        "fcfs",
        "fcfs@0",
        "sarathi+fcfs@x",
        "nexus+",
        "nexus+fcfs@512",
    ],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="the budget a number of tokens or predicted"):
        Policy.of(name)


def test_rows_say_how_the_device_was_shared(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "--tiny", "--trace", TRACE, "--first-row", "20", "--rows", "6"]
    command += ["--rates", "12", "--max-running", "8", "--slo-tpot-ms", "500", "--json", str(path)]
    command += ["--policies", "sarathi+fcfs@256,nexus+spf,semi_pd+fcfs,phasewise"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    rows = {row["policy"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert {row["num_requests"] for row in rows.values()} == {6}
    assert "layouts" not in rows["sarathi+fcfs@256"]
    for name in ("nexus+spf", "semi_pd+fcfs"):
        assert any(layout.startswith("split") for layout in rows[name]["layouts"])
    assert set(rows["phasewise"]["layouts"]) == {"together"}
