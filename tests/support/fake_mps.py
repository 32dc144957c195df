"""A double of nvidia-cuda-mps-control: a script that listens, answers and ends as the daemon does."""

from pathlib import Path

_SCRIPT = """#!/usr/bin/env python3
import os, sys, time
folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
if "-f" in sys.argv:
    if {is_broken}:
        print("cannot listen"); sys.exit(1)
    open(folder + "/environment", "w").write(str(sorted(set(os.environ) & {{"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_VISIBLE_DEVICES"}})))
    open(folder + "/control", "w").close()
    while not os.path.exists(folder + "/quit") or {is_deaf}:
        time.sleep(0.005)
    sys.exit(0)
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


def write_fake(folder: Path, *, is_broken: bool = False, is_deaf: bool = False) -> str:
    """Its path. is_broken: it does not start; is_deaf: it does not end."""
    path = folder / "mps-control"
    path.write_text(_SCRIPT.format(is_broken=is_broken, is_deaf=is_deaf))
    path.chmod(0o755)
    return str(path)
