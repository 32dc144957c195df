"""The files that remember which deployments run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.errors import LaunchFailed
from orchestrator.runtime.registry import Registry, RunningDeployment, default_folder

RUNNING = RunningDeployment("laptop", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.10:3", 4, 5.5)


def test_what_is_saved_is_found_until_it_is_removed(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new")
    assert registry.list() == []
    registry.save(RUNNING)
    assert Registry(tmp_path / "new").get("laptop") == RUNNING
    assert registry.list() == [RUNNING]
    registry.remove("laptop")
    registry.remove("laptop")
    assert registry.get("laptop") is None
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{", '{"name": "laptop"}', "\udcff"])
def test_a_file_that_is_none_of_ours_is_not_a_deployment(tmp_path: Path, content: str) -> None:
    (tmp_path / "laptop.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert Registry(tmp_path).get("laptop") is None
    assert Registry(tmp_path).list() == []


def test_a_file_of_the_version_before_is_read(tmp_path: Path) -> None:
    values = asdict(RUNNING)
    del values["is_autoscaled"]
    (tmp_path / "laptop.json").write_text(json.dumps(values))
    assert Registry(tmp_path).get("laptop") == RUNNING
    assert Registry(tmp_path).list() == [RUNNING]


def test_a_log_is_kept_only_if_something_is_in_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.log_path("empty").touch()
    registry.log_path("full").write_text("Ray said something")
    registry.remove("empty")
    registry.remove("full")
    assert [path.name for path in tmp_path.iterdir()] == ["full.log"]


def test_the_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "phasewise" / "deployments"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_folder() == Path.home() / ".local" / "state" / "phasewise" / "deployments"


def test_a_name_is_started_by_one_at_a_time_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with registry.starting("laptop"):
        with pytest.raises(LaunchFailed, match="'laptop' is being started by another process"):
            registry.starting("laptop").__enter__()
        with registry.starting("other"):
            pass
    with registry.starting("laptop"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "phasewise").write_text("a file where a folder should be")
    registry = Registry(tmp_path / "phasewise" / "deployments")
    with pytest.raises(LaunchFailed, match=r"phasewise/deployments: .*\. Set XDG_STATE_HOME"):
        registry.starting("laptop").__enter__()
    with pytest.raises(LaunchFailed, match="Set XDG_STATE_HOME"):
        registry.save(RUNNING)
