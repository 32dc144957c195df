"""Threads that share the work of one kernel with its caller.

The caller works too, so `torch.get_num_threads()` threads need one less of ours. They start when first needed,
sleep between kernels, and end with the process. After a fork the child starts its own.
"""

import os
from collections.abc import Callable, Sequence
from threading import Lock, Thread
from typing import Any


class _Helper:
    """A thread that runs one call at a time."""

    def __init__(self, name: str) -> None:
        self._start, self._done = Lock(), Lock()
        self._start.acquire()
        self._done.acquire()
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._error: BaseException | None = None
        Thread(target=self._serve, name=name, daemon=True).start()

    def begin(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments
        self._start.release()

    def finish(self) -> BaseException | None:
        """Wait for the end of the call; returns what it failed with."""
        self._done.acquire()
        error, self._error = self._error, None
        return error

    def _serve(self) -> None:
        while True:
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


def _forget_helpers() -> None:
    """In a child: the parent's threads are not here."""
    global _in_use
    _helpers.clear()
    # The parent may have held it.
    _in_use = Lock()


os.register_at_fork(after_in_child=_forget_helpers)
