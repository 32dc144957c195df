"""What is installed, and under which names."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {"orchestrator", "workers", "kvtransfer", "phasewise_kernels", "protos"}


def test_the_folder_kernels_is_no_package() -> None:
    # transformers probes for a package of that name, and would import ours.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_package_kernels_further_down_the_path_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.WHOSE)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "theirs"


def test_the_wheel_holds_exactly_the_five_packages(tmp_path: Path) -> None:
    # From a copy of what is in the tree: a build leaves folders behind.
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "orchestrator",
        "workers",
        "kvtransfer",
        "kernels",
        "protos",
    ):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("phasewise-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert not [name for name in names if name.startswith("protos/") and name.endswith(".tmp")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    heavy = "{'ray', 'torch', 'grpc', 'transformers', 'numpy'}"
    code = f"import sys, {package}; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == ""


def test_what_the_orchestrator_imports_of_workers_is_without_torch() -> None:
    code = "import sys, workers.api, workers.wire, workers.actor; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
