"""The KV blocks of one pool, taken and given back by several processes: who owns which, in shared memory, behind one lock.

Prefill and decode both allocate while they run. Taking blocks is a look and a write; without the lock two processes take the same
blocks, or count them once (semi-PD, section on the unified memory manager: 50 in use, one takes 21 and one 10, and 60 are counted).

The only state is the owner of each block. How many are free is counted, not kept, so that no process can die between a change
and its count; the lock is the kernel's, which takes it back from a process that dies. What a dead process owned is freed by `reap`.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

_FREE = 0


class SharedBlocks:
    """The blocks of the pool whose state lies in this file. Any process may open it; threads of one may share it.

    An owner is a number above 0 that no other process has, now or later: not a pid, which comes again.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file is not there."""
        self._file = path.open("r+b")
        self._owners: NDArray[np.int32] = np.memmap(self._file, np.int32, "r+")
        # The kernel's lock is of the open file: it does not part the threads of one process.
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, num_blocks: int) -> Self:
        """All free. Put it on a file system in memory; who made it removes it. Raises OSError, FileExistsError too."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(4 * num_blocks))
        return cls(path)

    @property
    def num_blocks(self) -> int:
        """Of the pool."""
        return len(self._owners)

    def num_free(self) -> int:
        """As of now."""
        with self._locked():
            return int(np.count_nonzero(self._owners == _FREE))

    def blocks_of(self, owner: int) -> list[int]:
        """Ascending."""
        with self._locked():
            return self._owned(owner)

    def allocate(self, num: int, owner: int) -> list[int] | None:
        """So many blocks, or none at all where fewer are free. num >= 0."""
        assert owner > _FREE
        with self._locked():
            free = np.flatnonzero(self._owners == _FREE)[:num]
            if len(free) < num:
                return None
            self._owners[free] = owner
            return [int(block) for block in free]

    def free(self, block_ids: Sequence[int], owner: int) -> None:
        """Raises ValueError, and frees none, when one of them is not this owner's."""
        self._change(block_ids, owner, _FREE)

    def hand_over(self, block_ids: Sequence[int], owner: int, to: int) -> None:
        """To another process, which may read what was written before its stream was waited for. Raises ValueError likewise."""
        assert to > _FREE
        self._change(block_ids, owner, to)

    def reap(self, owner: int) -> int:
        """Free all blocks of a process that has died; returns how many."""
        with self._locked():
            owned = self._owned(owner)
            self._owners[owned] = _FREE
            return len(owned)

    def close(self) -> None:
        """Of this process; the others keep theirs. Closing twice does nothing."""
        if not self._file.closed:
            del self._owners
            self._file.close()

    def _owned(self, owner: int) -> list[int]:
        return [int(block) for block in np.flatnonzero(self._owners == owner)]

    def _change(self, block_ids: Sequence[int], owner: int, to: int) -> None:
        blocks = np.asarray(block_ids, np.int64)
        with self._locked():
            wrong = [int(block) for block in blocks if not self._is_owned(int(block), owner)]
            if wrong or len(set(block_ids)) != len(block_ids):
                raise ValueError(f"blocks {wrong or list(block_ids)} are not {owner}'s, or named twice")
            self._owners[blocks] = to

    def _is_owned(self, block: int, owner: int) -> bool:
        return 0 <= block < len(self._owners) and int(self._owners[block]) == owner

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
