"""Whether a file can be written is found out without a trace."""

import os
from pathlib import Path

import pytest

from orchestrator.cli.writable import file_problem, folder_problem


def test_a_try_leaves_everything_as_it_was(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("kept")
    link.symlink_to(tmp_path / "nowhere yet")
    for path in (there, link, tmp_path / "new"):
        assert file_problem(path) == ""
    assert folder_problem(tmp_path, ["there", "new"]) == ""
    assert folder_problem(tmp_path / "folder", ["a", "b"]) == ""
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert there.read_text() == "kept"
    assert link.is_symlink()


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    # Nobody reads from it: to open it would wait for ever.
    os.mkfifo(tmp_path / "pipe")
    assert file_problem(tmp_path / "pipe") == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (".", "Is a directory"),
        ("file/x", "Not a directory"),
        ("no/x", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_why_it_cannot_be_written_is_said(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    assert file_problem(path) == f"{path} cannot be written: {why}"
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_a_folder_has_the_problem_of_its_first_file_or_its_own(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "file").write_text("")
    assert folder_problem(tmp_path, "ab") == f"{tmp_path / 'b'} cannot be written: Is a directory"
    assert folder_problem(tmp_path / "no" / "x", "a").endswith("No such file or directory")
    assert folder_problem(tmp_path / "file", "a").endswith("File exists")
    assert sorted(os.listdir(tmp_path)) == ["b", "file"]
