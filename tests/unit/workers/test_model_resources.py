"""How much memory a container leaves."""

from pathlib import Path

import pytest

from workers.errors import OutOfMemory
from workers.model import resources
from workers.model.resources import cgroup_available_bytes, check_memory


def _group(folder: Path, limit: str, current: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


def test_every_group_around_the_process_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root, "max", 10)
    _group(root / "a", "1000", 900, inactive_file=300)
    _group(root / "a" / "b", "500", 600)
    proc = tmp_path / "proc"
    proc.write_text("0::/a/b\n")
    assert cgroup_available_bytes(proc, root) == [0, 400]


def test_without_a_limit_or_without_version_2_there_is_none(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root, "max", 10)
    proc = tmp_path / "proc"
    assert cgroup_available_bytes(proc, root) == []
    proc.write_text("3:memory:/a\n")
    assert cgroup_available_bytes(proc, root) == []
    proc.write_text("0::/\n")
    assert cgroup_available_bytes(proc, root) == []


def test_a_containers_limit_is_an_error_before_it_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cgroup_available_bytes", lambda: [1000])
    check_memory("this", 1000, "lower that")
    with pytest.raises(OutOfMemory, match="lower that"):
        check_memory("this", 1001, "lower that")
