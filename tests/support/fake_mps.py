"""A double of nvidia-cuda-mps-control: a script that listens, answers and ends as the daemon does."""

from pathlib import Path

_SCRIPT = """#!/usr/bin/env python3
import os, sys, time
folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)
if "-f" in sys.argv:
    if {is_broken}:
        print("cannot listen"); sys.exit(1)
    open(folder + "/environment", "w").write(str(sorted(set(os.environ) & {{"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_VISIBLE_DEVICES"}})))
    open(folder + "/pid", "w").write(str(os.getpid()))
    wait_for({starts_after!r})
    open(folder + "/control", "w").close()
    wait_for("/deaf" if {is_deaf} else folder + "/quit")
    wait_for({ends_after!r})
    sys.exit(0)
if not os.path.exists(folder + "/control"):
    print("no daemon", file=sys.stderr); sys.exit(1)
for line in sys.stdin:
    word = line.split()[0]
    if word == "quit":
        open(folder + "/quit", "w").close()
    elif word == "get_server_list":
        print("11\\n12")
    elif word == "get_client_list":
        print(line.split()[1] + "0")
    else:
        print("no such command", file=sys.stderr); sys.exit(1)
"""


def write_fake(
    folder: Path,
    *,
    is_broken: bool = False,
    is_deaf: bool = False,
    starts_after: Path = Path("/"),
    ends_after: Path = Path("/"),
) -> str:
    """Its path. is_broken: it does not start; is_deaf: it does not end; starts_after, ends_after: nor before there is such a file."""
    path = folder / "mps-control"
    path.write_text(
        _SCRIPT.format(
            is_broken=is_broken, is_deaf=is_deaf, starts_after=str(starts_after), ends_after=str(ends_after)
        )
    )
    path.chmod(0o755)
    return str(path)
