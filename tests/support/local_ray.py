"""A Ray cluster for a test module: started as `phasewise up` starts one, and joined by the test process."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray
from ray.experimental.internal_kv import _internal_kv_get
# isort: on

from orchestrator.runtime.cluster import NAMESPACE
from orchestrator.runtime.head import end_process, start_head
from orchestrator.runtime.local_head import NODE_ADDRESS


def requested_resources() -> Any:
    """What an autoscaler would read that it was last asked for."""
    return json.loads(_internal_kv_get("autoscaler_resource_request") or "null")


@contextmanager
def local_ray(folder: Path, *, num_cpus: int) -> Iterator[str]:
    """The address of a cluster that lives as long as the block; this process has joined it."""
    head = start_head(num_cpus=num_cpus, log=folder / "head.log")
    try:
        ray.init(
            address=head.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=NODE_ADDRESS,
        )
        yield head.ray_address
    finally:
        ray.shutdown()
        end_process(head.process.pid, head.created_unix_s)
        head.close()
