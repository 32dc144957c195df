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
CLUSTERS = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_is_valid(path: Path) -> None:
    deployment = load(path)
    assert deployment.metadata.name == path.stem, "the file has the name of its deployment"


def _cluster(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_takes_the_cluster_configuration(path: Path) -> None:
    # What `ray up` does with a file before it touches a machine.
    validate_config(prepare_config(_cluster(path)))


def test_ray_would_refuse_a_misspelt_key() -> None:
    config = prepare_config(_cluster(CLUSTERS[0]))
    with pytest.raises(ValidationError, match="cluster_nam"):
        validate_config({**config, "cluster_nam": "x"})


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_node_shows_the_token(path: Path) -> None:
    config = _cluster(path)
    [head] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    [worker] = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_ray_starts_the_workers_of_machines_of_ones_own() -> None:
    config = _cluster(ROOT / "deploy" / "ray" / "local.yaml")
    [head] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "RAY_enable_autoscaler_v2=0" in head
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_cluster_that_grows_has_room_for_all_workers_of_its_manifest_and_none_on_its_head() -> None:
    config = _cluster(ROOT / "deploy" / "ray" / "autoscaled.yaml")
    spec = load(ROOT / "deploy" / "manifests" / "autoscaled.yaml").spec
    [group], autoscale = spec.workers, spec.controller.autoscale
    assert autoscale is not None
    node = config["available_node_types"]["worker"]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert node["resources"]["CPU"] == group.resources.cpus, "one worker on a node, and all of it"
    assert node["min_workers"] <= group.replicas
    assert node["max_workers"] == config["max_workers"] == autoscale.max_workers
