"""Everything under deploy/ is valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.manifest.load import load

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = sorted((ROOT / "deploy" / "manifests").glob("*.yaml"))
CLUSTER = ROOT / "deploy" / "ray" / "local.yaml"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_is_valid(path: Path) -> None:
    deployment = load(path)
    assert deployment.metadata.name == path.stem, "the file has the name of its deployment"


def _cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    return config


def test_ray_takes_the_cluster_configuration() -> None:
    # What `ray up` does with a file before it touches a machine.
    validate_config(prepare_config(_cluster()))


def test_ray_would_refuse_a_misspelt_key() -> None:
    config = prepare_config(_cluster())
    with pytest.raises(ValidationError, match="cluster_nam"):
        validate_config({**config, "cluster_nam": "x"})


def test_every_node_of_the_cluster_shows_the_token_and_ray_starts_workers_of_its_own() -> None:
    config = _cluster()
    [head] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    [worker] = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "RAY_enable_autoscaler_v2=0" in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
