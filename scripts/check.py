"""Everything that CI checks, in order of speed: `python scripts/check.py [STEP ...]`. Stops at the first failure."""

import os
import subprocess
import sys
import threading
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
    # Of one file in one process, since its tests share what is costly to make. After the integration tests, which end last.
    "tests": [
        "nice",
        "-n",
        "5",
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
    # They start processes and clusters of their own, and wait for them most of the time.
    "integration": [sys.executable, "-m", "pytest", "tests/integration"],
}

ENVIRONMENT = {
    # More threads than cores spin while they wait for each other: three processes with two threads each on two cores took
    # 2.4 times as long as with one. Workers that are deployed have as many as their manifest says.
    "OMP_NUM_THREADS": "1",
    # What is compiled is kept also where one's own settings forbid it: tests start hundreds of processes.
    "PYTHONDONTWRITEBYTECODE": "",
}

#: The step that runs beside these.
LAST, BESIDE = "integration", ("types", "tests")


def main(names: list[str]) -> int:
    """Run the named steps, or all; returns the exit status. Integration tests wait much: they run beside the last others."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"unknown step {unknown[0]!r}; steps: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    wanted = list(names or STEPS)
    beside: Beside | None = None
    status = 0
    for name in wanted:
        if name == LAST and len(wanted) > 1:
            continue
        if name in BESIDE and LAST in wanted and beside is None:
            beside = Beside(LAST)
        status = run(name)
        if status != 0:
            break
    if beside is not None:
        # Also after a failure: what it has started must end.
        status = beside.finish() or status
    elif status == 0 and LAST in wanted and len(wanted) > 1:
        status = run(LAST)
    return status


def run(name: str) -> int:
    """One step; returns its exit status."""
    print(f"== {name}: {' '.join(STEPS[name][-2:])}", flush=True)
    began_s = time.monotonic()
    status = subprocess.run(STEPS[name], cwd=ROOT, check=False, env=os.environ | ENVIRONMENT).returncode
    print(f"== {name}: {'failed' if status else 'ok'} in {time.monotonic() - began_s:.0f} s", flush=True)
    return status


class Beside:
    """A step that runs beside others; what it says is held back until `finish`, and comes live from then on."""

    def __init__(self, name: str) -> None:
        print(f"== {name}: begins beside the next ones", flush=True)
        self._name = name
        self._began_s = time.monotonic()
        self._said: list[str] = []
        self._is_told = False
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            STEPS[name],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                if self._is_told:
                    print(line, end="", flush=True)
                else:
                    self._said.append(line)

    def finish(self) -> int:
        """Print what was said, wait for the end; returns the exit status."""
        with self._lock:
            print(f"== {self._name}: {' '.join(STEPS[self._name][-2:])}", flush=True)
            print("".join(self._said), end="", flush=True)
            self._is_told = True
        status = self._process.wait()
        self._reader.join()
        took_s = time.monotonic() - self._began_s
        print(f"== {self._name}: {'failed' if status else 'ok'} in {took_s:.0f} s", flush=True)
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
