"""One keeper for several processes, and its end after the last of them; with real processes, which keep nothing."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.keeper_members import KeeperMember, KeeperPlace
from tests.support.keeper_starts import break_down, refuse, write_line
from tests.support.mps_members import is_running
from tests.support.waiting import until_in_thread
from workers.device.keeper import Keeping, Membership, Start, Tell, join
from workers.errors import MpsFailed, OutOfMemory

#: Longer than any test.
LONG_S = 1000.0
Begin = Callable[..., KeeperMember]


class Place(KeeperPlace):
    """With members."""

    def join(
        self,
        start: Callable[..., object] = write_line,
        grace_s: float = 0.0,
        on_wait: Tell = lambda _done: None,
    ) -> Membership:
        """In this process."""
        begin: Start = partial(start, self.log, self.gate)  # type: ignore[assignment]
        return join("test", "a", Keeping(begin, MpsFailed, None, grace_s), root=self.root, on_wait=on_wait)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Nothing is left at the end, but for keepers whose grace is long, which are killed."""
    found = Place(tmp_path)
    yield found
    found.gate.touch()
    until_in_thread(lambda: not any(map(is_running, found.pids)), "the end of the keepers")


@pytest.fixture
def begin(place: Place) -> Iterator[Begin]:
    """Starts members, which are killed at the end."""
    members: list[KeeperMember] = []

    def begin_one(grace_s: float = 0.0) -> KeeperMember:
        members.append(KeeperMember(place.root, place.log, place.gate, grace_s))
        return members[-1]

    yield begin_one
    for member in members:
        member.kill()


def test_processes_that_start_at_once_have_one_keeper_which_ends_with_the_last(
    place: Place, begin: Begin
) -> None:
    members = [begin() for _ in range(4)]
    (pid,) = {member.keeper_pid() for member in members}
    assert place.pids == [pid]
    for member in members:
        assert is_running(pid)
        member.kill()
    until_in_thread(lambda: not is_running(pid), "the end of the keeper")
    assert not list(place.root.iterdir())


def test_all_who_wait_are_told_how_far_it_is(place: Place) -> None:
    place.gate.unlink()
    told: list[list[float]] = [[], []]
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(place.join, on_wait=one.append) for one in told]
        until_in_thread(lambda: all(0.5 in one for one in told), "the half of it, told to both")
        place.gate.touch()
        members = [one.result() for one in joining]
    assert {one.kept.decode() for one in members} == {str(pid) for pid in place.pids}
    assert all(one == sorted(one) for one in told)
    for member in members:
        member.leave()


def test_after_whoever_started_it_was_killed_it_starts_on_for_the_next(place: Place, begin: Begin) -> None:
    place.gate.unlink()
    starter = begin(LONG_S)
    until_in_thread(lambda: bool(place.pids), "the keeper that starts")
    starter.kill()
    other = begin(LONG_S)
    place.gate.touch()
    pid = other.keeper_pid()
    assert place.pids == [pid]
    os.kill(pid, signal.SIGKILL)


def test_who_waits_no_longer_leaves_it_to_the_next(place: Place) -> None:
    place.gate.unlink()

    class Stopped(Exception):  # noqa: N818 - as that of a worker
        pass

    def stop(done: float) -> None:
        if done == 0.5:
            raise Stopped

    # The one that starts it, and one that waits for that.
    with pytest.raises(Stopped):
        place.join(grace_s=LONG_S, on_wait=stop)
    with pytest.raises(Stopped):
        place.join(on_wait=stop)
    (pid,) = place.pids
    with ThreadPoolExecutor(1) as pool:
        began = threading.Event()
        joining = pool.submit(place.join, on_wait=lambda _done: began.set())
        assert began.wait(60)
        place.gate.touch()
        assert int(joining.result().kept) == pid
    os.kill(pid, signal.SIGKILL)


def test_what_stops_it_reaches_who_started_it_and_who_waits_tries_anew(place: Place) -> None:
    place.gate.unlink()
    waiting = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(place.join, refuse)
        until_in_thread(lambda: bool(place.pids), "the keeper that starts")
        second = pool.submit(place.join, refuse, on_wait=lambda _done: waiting.set())
        assert waiting.wait(60)
        place.gate.touch()
        with pytest.raises(OutOfMemory) as raised:
            first.result()
        assert (raised.value.need_bytes, raised.value.remedy) == (2, "lower it")
        member = second.result()
    assert [int(member.kept)] == place.pids[1:]
    member.leave()


def test_an_error_that_is_none_of_ours_is_told_of_and_leaves_nothing(place: Place) -> None:
    with pytest.raises(MpsFailed, match="does not start: RuntimeError: there is no such device"):
        join("test", "a", Keeping(break_down, MpsFailed, None), root=place.root)
    assert not list(place.root.iterdir())


def test_one_that_does_not_start_in_time_is_told_of_and_stays_for_others(place: Place) -> None:
    place.gate.unlink()
    with pytest.raises(MpsFailed, match=r"does not start within 0\.01 s; see .*keeper.log"):
        join(
            "test", "a", Keeping(partial(write_line, place.log, place.gate), MpsFailed, 0.01), root=place.root
        )
    place.gate.touch()
    place.join().leave()


def test_within_its_grace_the_next_one_finds_it(place: Place, begin: Begin) -> None:
    first = begin(LONG_S)
    pid = first.keeper_pid()
    first.kill()
    again = begin(LONG_S)
    assert again.keeper_pid() == pid
    assert place.pids == [pid]
    os.kill(pid, signal.SIGKILL)


def test_after_its_grace_it_is_gone(place: Place) -> None:
    member = place.join(grace_s=0.2)
    pid = int(member.kept)
    member.leave()
    until_in_thread(lambda: not is_running(pid), "the end of the keeper")
    assert not list(place.root.iterdir())


def test_after_it_was_killed_the_next_one_has_another_and_all_leave_nothing(
    place: Place, begin: Begin
) -> None:
    first = begin()
    pid = first.keeper_pid()
    os.kill(pid, signal.SIGKILL)
    until_in_thread(lambda: not is_running(pid), "the end of the keeper")
    second = begin()
    other = second.keeper_pid()
    assert place.pids == [pid, other]
    # A member of the one that was killed keeps the other one, too.
    second.kill()
    member = place.join()
    assert int(member.kept) == other
    member.leave()
    first.kill()
    until_in_thread(lambda: not is_running(other), "the end of the other keeper")
    assert not list(place.root.iterdir())


def test_after_one_that_cannot_be_used_was_given_up_the_next_one_has_another(
    place: Place, begin: Begin
) -> None:
    first = begin()
    pid = first.keeper_pid()
    place.join().give_up()
    second = begin()
    other = second.keeper_pid()
    assert place.pids == [pid, other]
    # The one that was given up ends with its last member, and takes nothing of the other one along.
    first.kill()
    until_in_thread(lambda: not is_running(pid), "the end of the keeper that was given up")
    assert begin().keeper_pid() == other


def test_a_member_of_one_that_has_gone_gives_up_no_other(place: Place) -> None:
    early = place.join()
    place.join().give_up()
    member = place.join()
    early.give_up()
    again = place.join()
    assert again.kept == member.kept
    member.leave()
    again.leave()


def test_one_that_is_killed_while_it_starts_is_told_of(place: Place) -> None:
    place.gate.unlink()
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(place.join)
        until_in_thread(lambda: bool(place.pids), "the keeper that starts")
        os.kill(place.pids[0], signal.SIGKILL)
        with pytest.raises(MpsFailed, match="does not start: what libraries print"):
            joining.result()
    assert not list(place.root.iterdir())


def test_what_others_have_left_goes_and_what_lives_stays(place: Place, begin: Begin) -> None:
    beginning = f"phasewise-test-{os.geteuid()}-"
    dead, half_gone, strange = (place.root / f"{beginning}{name}" for name in ("b", "c-gone-7", "d"))
    for folder in (dead, half_gone, strange):
        folder.mkdir(mode=0o700)
        (folder / "kept").touch()
    strange.chmod(0o755)
    pid = begin(LONG_S).keeper_pid()
    other = join(
        "test", "e", Keeping(partial(write_line, place.log, place.gate), MpsFailed, None), root=place.root
    )
    assert {folder.name for folder in place.root.iterdir()} == {f"{beginning}{name}" for name in "ade"}
    other.leave()
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


def test_whoever_comes_and_goes_has_one_that_lives(place: Place) -> None:
    def come_and_go(_number: int) -> None:
        for _ in range(4):
            member = place.join()
            assert is_running(int(member.kept))
            member.leave()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come_and_go, range(3)))
    until_in_thread(lambda: not list(place.root.iterdir()), "the end of the folder")
