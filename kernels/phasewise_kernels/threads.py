"""Threads that share the work of one kernel with its caller.

The caller works too, so `torch.get_num_threads()` threads need one less of ours. They start when first needed, and end
with the process. After a fork the child starts its own.

To wake a thread takes about as long as a kernel for one row. So both sides first look for each other's flag for some
ten microseconds, without the interpreter's lock, and sleep only then. Flags are hints: the locks decide.
"""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock, Thread
from typing import Any

import numpy as np
import torch

from phasewise_kernels import jit

#: To read less than this is not worth waking other threads for.
MIN_SHARED_BYTES = 1 << 19


#: Reads of a flag before sleeping: a helper waits as long as other work of a decode step takes, 0.1 ms.
HELPER_READS = 200_000
CALLER_READS = 100_000
#: Reads after a helper saw its flag, until the caller is in its own part: else it would meet the interpreter's lock.
HANDOVER_READS = 6_000
#: Places of flags: that a call began, that it ended, and one that nobody reads.
_BEGUN, _ENDED, _UNREAD = 0, 16, 32


class _Helper:
    """A thread that runs one call at a time."""

    def __init__(self, name: str) -> None:
        handover = jit.load("phasewise_kernels.handover.kernel")
        self._tell_and_wait = None if handover is None else handover.tell_and_wait
        self._flags = np.zeros(48, np.int64)
        self._num_begun = 0
        self._start, self._done = Lock(), Lock()
        self._start.acquire()
        self._done.acquire()
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._error: BaseException | None = None
        Thread(target=self._serve, name=name, daemon=True).start()

    def begin(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments
        self._start.release()
        self._num_begun += 1
        self._flags[_BEGUN] = self._num_begun

    def finish(self) -> BaseException | None:
        """Wait for the end of the call; returns what it failed with."""
        if self._tell_and_wait is not None:
            self._tell_and_wait(self._flags, _UNREAD, 0, _ENDED, self._num_begun, CALLER_READS, 0)
        self._done.acquire()
        error, self._error = self._error, None
        return error

    def _serve(self) -> None:
        num_ended = 0
        while True:
            if self._tell_and_wait is not None:
                self._tell_and_wait(
                    self._flags, _ENDED, num_ended, _BEGUN, num_ended + 1, HELPER_READS, HANDOVER_READS
                )
            self._start.acquire()
            assert self._call is not None
            function, arguments = self._call
            # The arguments hold tensors: they must not outlive the call.
            self._call = None
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised by `finish`'s caller
                self._error = error
            del function, arguments
            num_ended += 1
            self._done.release()


_helpers: list[_Helper] = []
#: Held while the helpers work; a second caller at the same time does all the work itself.
_in_use = Lock()


def run_parts(function: Callable[..., object], parts: Sequence[tuple[Any, ...]]) -> None:
    """Call function(*part) for each part, the first in this thread and the others in helpers, and wait.

    Parts must not depend on each other. Raises what a part raised, after all have ended.
    """
    if len(parts) == 1 or not _in_use.acquire(blocking=False):
        for part in parts:
            function(*part)
        return
    try:
        while len(_helpers) < len(parts) - 1:
            _helpers.append(_Helper(f"kernel-{len(_helpers) + 1}"))
        working = _helpers[: len(parts) - 1]
        for helper, part in zip(working, parts[1:], strict=True):
            helper.begin(function, part)
        errors: list[BaseException | None] = []
        try:
            function(*parts[0])
        finally:
            errors.extend(helper.finish() for helper in working)
        for error in errors:
            if error is not None:
                raise error
    finally:
        _in_use.release()


def run_ranges(function: Callable[..., object], fixed: tuple[Any, ...], count: int, num_bytes: int) -> None:
    """Call function(*fixed, first, last) for ranges that together are 0..count-1.

    num_bytes: what all of them read; less than MIN_SHARED_BYTES is left to the caller's thread.
    """
    num_parts = min(torch.get_num_threads(), count) if num_bytes >= MIN_SHARED_BYTES else 1
    if num_parts <= 1:
        function(*fixed, 0, count)
        return
    ends = [count * i // num_parts for i in range(num_parts + 1)]
    run_parts(function, [(*fixed, first, last) for first, last in pairwise(ends)])


def _forget_helpers() -> None:
    """In a child: the parent's threads are not here."""
    global _in_use
    _helpers.clear()
    # The parent may have held it.
    _in_use = Lock()


os.register_at_fork(after_in_child=_forget_helpers)
