"""One pool of blocks that several processes allocate from."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from workers.device import shared_blocks
from workers.device.shared_blocks import SharedBlocks

NUM_BLOCKS = 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "blocks"
    SharedBlocks.create(found, NUM_BLOCKS).close()
    return found


@pytest.fixture
def blocks(path: Path) -> Iterator[SharedBlocks]:
    opened = SharedBlocks(path)
    yield opened
    opened.close()


def test_a_pool_is_made_once(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        SharedBlocks.create(path, 1)
    with pytest.raises(FileNotFoundError):
        SharedBlocks(tmp_path / "none")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_asked_for_is_given_whole_or_not_at_all(blocks: SharedBlocks) -> None:
    assert blocks.allocate(60, 1) == list(range(60))
    assert blocks.allocate(41, 2) is None
    assert blocks.num_free() == 40
    assert blocks.allocate(0, 2) == []


def test_nobody_frees_or_hands_over_what_is_not_its_own(blocks: SharedBlocks) -> None:
    blocks.allocate(4, 1)
    blocks.allocate(4, 2)
    for wrong in ([0, 4], [99], [-1], [NUM_BLOCKS], [0, 0]):
        with pytest.raises(ValueError, match="not 1's, or named twice"):
            blocks.free(wrong, 1)
        with pytest.raises(ValueError, match="not 1's, or named twice"):
            blocks.hand_over(wrong, 1, 3)
    assert blocks.blocks_of(1) == [0, 1, 2, 3]


def test_what_is_handed_over_is_not_freed_with_who_had_it(blocks: SharedBlocks) -> None:
    blocks.allocate(6, 1)
    blocks.hand_over([1, 2], 1, 2)
    assert blocks.reap(1) == 4
    assert blocks.blocks_of(2) == [1, 2]
    assert blocks.num_free() == 98


class SharedPool(RuleBasedStateMachine):
    """Against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(f"/tmp/blocks-{os.getpid()}-{id(self)}")
        self.first = SharedBlocks.create(self.path, 12)
        self.second = SharedBlocks(self.path)
        self.owners: dict[int, int] = {}

    def teardown(self) -> None:
        self.first.close()
        self.second.close()
        self.path.unlink()

    @rule(num=st.integers(0, 6), owner=st.integers(1, 3))
    def allocate(self, num: int, owner: int) -> None:
        found = (self.first if owner == 1 else self.second).allocate(num, owner)
        if found is None:
            assert 12 - len(self.owners) < num
        else:
            assert len(found) == num
            assert not set(found) & set(self.owners)
            self.owners |= dict.fromkeys(found, owner)

    @rule(owner=st.integers(1, 3), to=st.integers(1, 3), data=st.data())
    def hand_over(self, owner: int, to: int, data: st.DataObject) -> None:
        mine = [block for block, who in self.owners.items() if who == owner]
        chosen = data.draw(st.lists(st.sampled_from(mine), unique=True)) if mine else []
        self.first.hand_over(chosen, owner, to)
        self.owners |= dict.fromkeys(chosen, to)

    @rule(owner=st.integers(1, 3), data=st.data())
    def free(self, owner: int, data: st.DataObject) -> None:
        mine = [block for block, who in self.owners.items() if who == owner]
        chosen = data.draw(st.lists(st.sampled_from(mine), unique=True)) if mine else []
        self.second.free(chosen, owner)
        for block in chosen:
            del self.owners[block]

    @rule(owner=st.integers(1, 3))
    def reap(self, owner: int) -> None:
        mine = [block for block, who in self.owners.items() if who == owner]
        assert self.first.reap(owner) == len(mine)
        for block in mine:
            del self.owners[block]

    @invariant()
    def all_is_accounted_for(self) -> None:
        assert self.second.num_free() + len(self.owners) == 12
        for owner in (1, 2, 3):
            assert self.first.blocks_of(owner) == sorted(b for b, who in self.owners.items() if who == owner)


SharedPool.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestSharedPool = SharedPool.TestCase


# Processes.

NUM_ROUNDS = 2000


def allocate_and_free(path: Path, owner: int, start: "multiprocessing.synchronize.Barrier") -> None:
    """Exits with the number of blocks that were somebody else's when they were to be freed, 100 at most."""
    pool = SharedBlocks(path)
    num_lost = 0
    start.wait()
    for number in range(NUM_ROUNDS):
        taken = pool.allocate(1 + number % 20, owner)
        try:
            pool.free(taken or [], owner)
        except ValueError:
            num_lost += 1
    os._exit(min(num_lost, 100))


def test_two_processes_never_get_the_same_block(path: Path, blocks: SharedBlocks) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    both = [context.Process(target=allocate_and_free, args=(path, owner, start)) for owner in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert blocks.num_free() == NUM_BLOCKS


def test_without_the_lock_they_would(
    path: Path, blocks: SharedBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, theirs = SharedBlocks(path), list[int]()
    look = np.flatnonzero

    def look_while_the_other_takes(found: NDArray[np.bool_]) -> NDArray[np.int64]:
        free = look(found)
        monkeypatch.setattr(shared_blocks.np, "flatnonzero", look)
        theirs.extend(other.allocate(3, 2) or [])
        return free

    monkeypatch.setattr(SharedBlocks, "_locked", lambda _: nullcontext())
    monkeypatch.setattr(shared_blocks.np, "flatnonzero", look_while_the_other_takes)
    assert blocks.allocate(3, 1) == theirs == [0, 1, 2]
    other.close()


def hold_and_die(path: Path) -> None:
    """Die with the lock held, in the middle of a change."""
    pool = SharedBlocks(path)
    pool.allocate(5, 7)
    with pool._locked():
        pool._owners[50:55] = 7
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_with_the_lock_stops_nobody_and_leaves_nothing(
    path: Path, blocks: SharedBlocks
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hold_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert blocks.allocate(1, 1) == [5]
    assert blocks.reap(7) == 10
    assert blocks.num_free() == NUM_BLOCKS - 1
