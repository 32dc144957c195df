"""A Ray cluster of one node, which lives as long as this process: `python -m orchestrator.runtime.local_head`.

Prints one line of JSON when the cluster is up. Ends on SIGTERM or SIGINT, and when its stdin closes: whoever started it is
gone then, however that came about. Something on stdin releases it from that. Ray's own processes notice if this one is killed.
"""

import argparse
import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray
# isort: on

#: Not 127.0.0.1, which Ray replaces by the address of the network card: that may change while we run.
NODE_ADDRESS = "127.0.0.10"
#: Ray's object store carries nothing of ours.
OBJECT_STORE_BYTES = 128 * 2**20


def _wait_for_end_of_stdin(is_over: threading.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        is_over.set()


def main() -> int:
    """Until told to end; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-cpus", type=int, required=True)
    args = parser.parse_args()
    is_over = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        is_over.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    context: Any = ray.init(
        address="local",
        num_cpus=args.num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        _node_ip_address=NODE_ADDRESS,
    )
    try:
        info = context.address_info
        report = {"address": info["gcs_address"], "log_dir": f"{info['session_dir']}/logs"}
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
        # Whoever read that may be gone before we are.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        threading.Thread(target=_wait_for_end_of_stdin, args=(is_over,), daemon=True).start()
        is_over.wait()
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
