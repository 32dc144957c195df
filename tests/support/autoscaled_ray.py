"""A Ray cluster with an autoscaler, all on this machine: a head on which no worker fits, and nodes that come and go.

Ray's own `AutoscalingCluster` runs `ray stop`, which ends every Ray of the machine; this ends what it has started.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler.v2.sdk import get_cluster_status
# isort: on

from orchestrator.runtime.local_head import NODE_ADDRESS, OBJECT_STORE_BYTES
from tests.support.waiting import until_in_thread

RAY = str(Path(sys.executable).parent / "ray")
#: That nodes show each other.
TOKEN = Path.home() / ".ray" / "auth_token"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

#: Of a configuration, that Ray asks for.
EMPTY_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@contextmanager
def autoscaled_ray(folder: Path, *, max_nodes: int, idle_s: float = 1.0) -> Iterator[str]:
    """The address of a cluster that lives as long as the block. This process does not join it, as one that has is ended with it.

    Up to max_nodes nodes of one CPU come beside the head, which has none; one that is idle for idle_s goes.
    """
    with socket.socket() as probe:
        probe.bind((NODE_ADDRESS, 0))
        address = f"{NODE_ADDRESS}:{probe.getsockname()[1]}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_config(address, max_nodes, idle_s)), encoding="utf-8")
    if not TOKEN.exists():
        subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(_command(address, config), stdout=log, stderr=log, env=_environment())
    try:
        until_in_thread(lambda: _answers(address), "Ray is up")
        yield address
    finally:
        _end(head)


def num_nodes(address: str) -> int:
    """That live, without the head."""
    status = get_cluster_status(address)
    return max(0, len(status.active_nodes) + len(status.idle_nodes) - 1)


def num_asked_for(address: str) -> int:
    """Workers that the autoscaler was last told to have room for."""
    asked = get_cluster_status(address).resource_demands.cluster_constraint_demand
    return sum(one.count for constraint in asked for one in constraint.bundles_by_count)


def _config(address: str, max_nodes: int, idle_s: float) -> dict[str, Any]:
    return {
        "cluster_name": "test",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_s / 60,
        # By its name, the provider wants defaults from a file that Ray's wheel does not have.
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {
                "resources": {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in EMPTY_LISTS},
    }


def _command(address: str, config: Path) -> list[str]:
    host, _, port = address.rpartition(":")
    return [
        RAY,
        "start",
        "--head",
        "--block",
        f"--node-ip-address={host}",
        f"--port={port}",
        "--num-cpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--autoscaling-config={config}",
        "--include-dashboard=false",
        "--disable-usage-stats",
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _end(head: "subprocess.Popen[bytes]") -> None:
    """Also the nodes, which outlive their head."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(head.pid).children(recursive=True)
        head.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=10)
    head.wait()
