"""What numbers of a GPU depend on, and the tests without which there are none."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orchestrator.bench.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]


def describe_gpu(commit: str | None = None) -> dict[str, Any]:
    """The machine, its first GPU where it has one, versions, commit, and the date (UTC, ISO 8601).

    commit: of the code, where git cannot say. Puts nothing on the GPU.
    """
    found = describe_machine() | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    if commit is not None:
        found["commit"] = commit
    if not torch.cuda.is_available():
        return found
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    name, driver = answer.splitlines()[0].split(", ")
    versions = {"cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__}
    return found | {"gpu": name, "driver": driver, **versions}


def tests_problem(*tests: str) -> str | None:
    """Why nothing is to be measured here; None where these tests pass. Some may be skipped, but not all.

    tests: files and single tests, as pytest takes them, from the root of the repository. PYTEST_ADDOPTS adds to them, as `-n 8` does.
    """
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", *tests]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0 and " passed" in found.stdout:
        return None
    return f"nothing is measured: its tests fail here, or none can run\n{found.stdout[-3000:]}{found.stderr[-1000:]}"
