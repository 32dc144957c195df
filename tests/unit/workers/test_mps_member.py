"""One MPS daemon for several processes, and its end with the last of them; with a double of it, and real processes."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.fake_mps import write_fake
from tests.support.mps_members import Member, daemon_pid, is_running, keeper_pid
from tests.support.waiting import until_in_thread
from workers.device.mps import ask
from workers.device.mps_member import join
from workers.errors import MpsFailed, SharingUnsupported

Start = Callable[[str], Member]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "root"
    found.mkdir()
    return found


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Starts members, which are killed at the end: then nothing is left."""
    members: list[Member] = []

    def start_one(command: str) -> Member:
        members.append(Member(command, root))
        return members[-1]

    yield start_one
    for member in members:
        member.kill()
    until_in_thread(lambda: not list(root.iterdir()), "the end of the folder")


def answers(folder: Path, command: str) -> bool:
    return ask(command, folder, "get_server_list") == "11\n12"


def test_processes_that_start_at_once_have_one_daemon(tmp_path: Path, start: Start) -> None:
    command = write_fake(tmp_path)
    (folder,) = {member.folder() for member in [start(command) for _ in range(4)]}
    assert answers(folder, command)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("killed", [0, 1])
def test_a_daemon_outlives_each_member_and_not_the_last(
    tmp_path: Path, root: Path, start: Start, killed: int
) -> None:
    command = write_fake(tmp_path)
    # The first has started the daemon.
    members = [start(command)]
    folder = members[0].folder()
    members.append(start(command))
    assert members[1].folder() == folder
    members[killed].kill()
    again = start(command)
    assert again.folder() == folder
    assert answers(folder, command)
    daemon, keeper = daemon_pid(folder), keeper_pid(folder)
    again.kill()
    members[1 - killed].kill()
    until_in_thread(lambda: not is_running(daemon) and not is_running(keeper), "the end of the daemon")
    assert not list(root.iterdir())


def test_who_comes_while_a_daemon_ends_has_another_one(tmp_path: Path, start: Start) -> None:
    end = tmp_path / "end"
    command = write_fake(tmp_path, ends_after=end)
    member = start(command)
    folder = member.folder()
    member.kill()
    until_in_thread(lambda: (folder / "quit").exists(), "the daemon that is told to end")
    late = start(command)
    end.touch()
    other = late.folder()
    assert other != folder
    assert answers(other, command)
    assert not folder.exists()


def test_a_starter_that_is_killed_leaves_no_daemon_half_started(
    tmp_path: Path, root: Path, start: Start
) -> None:
    begin = tmp_path / "begin"
    command = write_fake(tmp_path, starts_after=begin)
    starter = start(command)
    until_in_thread(lambda: bool(list(root.glob("*/*/pid"))), "the daemon that starts")
    starter.kill()
    other = start(command)
    begin.touch()
    assert answers(other.folder(), command)


def test_after_the_keeper_was_killed_its_daemon_ends_and_the_next_one_has_another(
    tmp_path: Path, start: Start
) -> None:
    command = write_fake(tmp_path)
    folder = start(command).folder()
    daemon = daemon_pid(folder)
    os.kill(keeper_pid(folder), signal.SIGKILL)
    until_in_thread(lambda: not is_running(daemon) and not folder.exists(), "the end of the daemon")
    other = start(command).folder()
    assert other != folder
    assert answers(other, command)


def test_after_a_daemon_has_died_the_next_one_has_another(tmp_path: Path, start: Start) -> None:
    command = write_fake(tmp_path)
    folder = start(command).folder()
    keeper = keeper_pid(folder)
    os.kill(daemon_pid(folder), signal.SIGKILL)
    until_in_thread(lambda: not is_running(keeper), "the end of its keeper")
    other = start(command).folder()
    assert other != folder
    assert answers(other, command)


def test_what_a_machine_that_went_down_has_left_is_in_nobodys_way(
    tmp_path: Path, root: Path, start: Start
) -> None:
    folder = root / f"phasewise-mps-{os.geteuid()}-1"
    (folder / "phasewise-mps-dead").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "pipe").write_text("phasewise-mps-dead")
    (folder / "lock").touch()
    command = write_fake(tmp_path)
    assert answers(start(command).folder(), command)


def test_a_daemon_that_does_not_start_is_told_of_in_its_words_and_leaves_nothing(
    tmp_path: Path, root: Path
) -> None:
    with pytest.raises(MpsFailed, match="does not listen: cannot listen"):
        join("GPU-1", command=write_fake(tmp_path, is_broken=True), root=root)
    assert not list(root.iterdir())


def test_without_the_command_nothing_is_made(root: Path) -> None:
    with pytest.raises(SharingUnsupported, match="not on the PATH; install the driver's compute utilities"):
        join("GPU-1", command="no-such-command-here", root=root)
    assert not list(root.iterdir())


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_folder_that_others_could_have_made_is_not_used(tmp_path: Path, root: Path, kind: str) -> None:
    folder = root / f"phasewise-mps-{os.geteuid()}-1"
    if kind == "link":
        folder.symlink_to(tmp_path)
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with pytest.raises(MpsFailed, match="remove it" if kind != "file" else "cannot make .*: File exists"):
        join("GPU-1", command=write_fake(tmp_path), root=root)


def test_where_no_folder_can_be_made_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(MpsFailed, match=r"cannot make .*: No such file"):
        join("GPU-1", command=write_fake(tmp_path), root=tmp_path / "missing")


def test_a_process_that_the_daemon_does_not_know_is_none_of_its_clients(tmp_path: Path, root: Path) -> None:
    member = join("GPU-1", command=write_fake(tmp_path), root=root)
    with pytest.raises(
        MpsFailed, match=f"this process, {os.getpid()}, is no client .* its clients: 110, 120"
    ):
        member.check()
    member.leave()
    until_in_thread(lambda: not list(root.iterdir()), "the end of the folder")


def test_whoever_comes_and_goes_has_a_daemon_that_lives(tmp_path: Path, root: Path) -> None:
    command = write_fake(tmp_path)

    def come_and_go(_number: int) -> None:
        for _ in range(4):
            member = join("GPU-1", command=command, root=root)
            assert answers(member.folder, command)
            member.leave()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come_and_go, range(3)))
    until_in_thread(lambda: not list(root.iterdir()), "the end of the folder")
