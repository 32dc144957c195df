"""Everything that CI checks, in order of speed: `python scripts/check.py [STEP ...]`. Stops at the first failure."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

STEPS: dict[str, list[str]] = {
    "lint": [str(BIN / "ruff"), "check", "."],
    "format": [str(BIN / "ruff"), "format", "--check", "."],
    "stubs": [sys.executable, "protos/generate.py", "--check"],
    "docs": [sys.executable, "scripts/manifest_docs.py", "--check"],
    "layers": [str(BIN / "lint-imports")],
    "types": [str(BIN / "mypy")],
    # Of one file in one process, since its tests share what is costly to make.
    "tests": [
        sys.executable,
        "-m",
        "pytest",
        "--ignore",
        "tests/integration",
        "-n",
        "2",
        "--dist",
        "loadfile",
    ],
    # They start processes and clusters of their own, which want both cores.
    "integration": [sys.executable, "-m", "pytest", "tests/integration"],
}


def main(names: list[str]) -> int:
    """Run the named steps, or all; returns the exit status."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"unknown step {unknown[0]!r}; steps: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    for name in names or STEPS:
        print(f"== {name}: {' '.join(STEPS[name][-2:])}", flush=True)
        began_s = time.monotonic()
        status = subprocess.run(STEPS[name], cwd=ROOT, check=False).returncode
        print(f"== {name}: {'failed' if status else 'ok'} in {time.monotonic() - began_s:.0f} s", flush=True)
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
