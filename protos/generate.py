"""Write the Python code of every .proto file beside it: `python protos/generate.py`.

With --check nothing is written; the exit status is 1 if a committed file is not what would be written.
"""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Run protoc over all files, with typed stubs; results land in out/protos/."""
    sources = [f"protos/{path.name}" for path in sorted(PROTOS.glob("*.proto"))]
    flags = [f"--{kind}={out}" for kind in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *flags, *sources]
    environment = {"PATH": str(Path(sys.executable).parent)}
    subprocess.run(command, cwd=PROTOS.parent, check=True, env=environment, stderr=subprocess.DEVNULL)


def main() -> int:
    """Generate, or compare with --check; returns the exit status."""
    if "--check" not in sys.argv[1:]:
        generate(PROTOS.parent)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "protos"
        committed = {path.name for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in PROTOS.glob(pattern)}
        wanted = {path.name for path in fresh.iterdir()}
        stale = committed ^ wanted
        stale |= {name for name in committed & wanted if not filecmp.cmp(PROTOS / name, fresh / name, False)}
    if stale:
        print(f"stale: {', '.join(sorted(stale))}; run python protos/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
