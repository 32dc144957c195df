"""What is said of a GPU, and which tests let its benchmarks measure."""

import os
import re
from datetime import datetime
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

PASSES, FAILS, IS_SKIPPED = "", "    assert False, 'wrong product'\n", "    pytest.skip('needs two GPUs')\n"


@pytest.fixture
def has_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two, by what the tools say; tests are those in `tmp_path`."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1'\necho 'NVIDIA A2, 570.2'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")


def write_tests(folder: Path, *bodies: str) -> str:
    """A file of marked tests with these bodies."""
    tests = [
        f"@pytest.mark.gpu\ndef test_{i}():\n    print('said by {i}')\n{body}"
        for i, body in enumerate(bodies)
    ]
    # Not to be chosen.
    tests.append(f"def test_without_mark():\n{FAILS}")
    (folder / "test_it.py").write_text("\n".join(["import pytest", *tests]))
    return "test_it.py"


@pytest.mark.parametrize("bodies", [(PASSES,), (PASSES, IS_SKIPPED)])
def test_what_passes_may_be_measured(has_gpu: None, tmp_path: Path, bodies: tuple[str, ...]) -> None:
    assert gpu.tests_problem(write_tests(tmp_path, *bodies)) is None


@pytest.mark.parametrize(
    ("bodies", "reason"),
    [
        ((PASSES, FAILS, PASSES), "wrong product"),
        # A gate that tests nothing is none.
        ((IS_SKIPPED,), "1 skipped"),
        ((), "1 deselected"),
    ],
)
def test_nothing_is_measured_on_red(
    has_gpu: None, tmp_path: Path, bodies: tuple[str, ...], reason: str
) -> None:
    problem = gpu.tests_problem(write_tests(tmp_path, *bodies))
    assert problem is not None
    assert reason in problem


def test_nothing_is_measured_where_a_file_is_missing(has_gpu: None) -> None:
    assert "test_of_old.py" in (gpu.tests_problem("test_of_old.py") or "")


def test_nothing_is_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.tests_problem("tests/gpu") == "there is no NVIDIA GPU here"
    assert "gpu" not in gpu.describe_gpu()


def test_the_first_gpu_is_named_with_its_driver(has_gpu: None) -> None:
    found = gpu.describe_gpu()
    assert (found["gpu"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.1")
    assert found["torch"] == torch.__version__
    assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert gpu.describe_gpu("abc123")["commit"] == "abc123"


def test_the_tests_that_benchmarks_wait_for_are_there() -> None:
    root = Path(__file__).resolve().parents[3]
    named = {
        name
        for file in (root / "benchmarks").rglob("*.py")
        for name in re.findall(r'"(tests/gpu/.+?)"', file.read_text(encoding="utf-8"))
    }
    assert len(named) > 8
    for name in named:
        path, _, test = name.partition("::")
        assert f"def {test}" in (root / path).read_text(encoding="utf-8"), name
