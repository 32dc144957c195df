"""The other ranks of a group, as rank 0 has them: child processes that are told what to compute.

A rank that ends, or does not take part in a step for long, is the end of the group: rank 0 ends the others, whoever
waits for one waits no more, and the worker says why it cannot serve.
"""

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from workers.api import WorkerSpec
from workers.errors import PhasewiseWorkerError, RankLost
from workers.launch_environment import LAUNCH_ENVIRONMENT
from workers.model.forward_batch import ForwardBatch
from workers.model.prepare import PreparedModel
from workers.tensor_parallel.cutting import Rank
from workers.tensor_parallel.messages import (
    CopyBlocks,
    Failed,
    FromFollower,
    Moved,
    MoveSlots,
    Progress,
    Start,
    Step,
    ToFollower,
    pack,
)
from workers.tensor_parallel.ranks import Ranks, join, open_store

logger = logging.getLogger(__name__)

#: How long a rank may keep the others waiting in a step before the group is given up, in seconds.
STEP_TIMEOUT_S = 60.0
#: How often it is looked whether all are there, and how long a reason is looked for, in seconds.
WATCH_S = 0.1
REASON_S = 2.0
#: How long ranks may take to end by themselves, in seconds.
END_S = 5.0

Told = TypeVar("Told", bound=FromFollower)


@dataclass(frozen=True, slots=True)
class _Child:
    rank: int
    process: "subprocess.Popen[bytes]"
    connection: "Connection[bytes, FromFollower]"


class Followers:
    """Ranks 1 and up. One thread at a time starts them and runs steps; `watch` and `close` may come from others.

    timeout_s: see STEP_TIMEOUT_S.
    """

    def __init__(
        self, spec: WorkerSpec, prepared: PreparedModel, *, timeout_s: float = STEP_TIMEOUT_S
    ) -> None:
        degree = spec.engine.tensor_parallel
        self._timeout_s = timeout_s
        self._degree = degree
        self._store = open_store(degree)
        self._ranks: Ranks | None = None
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._is_closed = threading.Event()
        self._lost: str | None = None
        #: Which rank ended and why, once it is known.
        self._dead: str | None = None
        self._on_lost: Callable[[str], None] | None = None
        #: Since when rank 0 waits for an answer, or for room to write; and what is on its GPU's stream behind the last step.
        self._began_s: float | None = None
        self._launched: tuple[float, torch.cuda.Event] | None = None
        self._children = [_start(rank) for rank in range(1, degree)]
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()
        for child in self._children:
            rank = Rank(child.rank, degree)
            self._send(child, _packed(Start(spec, prepared, rank, self._store.port, timeout_s)))

    # Start.

    def gather(self, kind: type[Told], progress: Callable[[str, float], None]) -> list[Told]:
        """The next message of this kind from each, in order of rank. Raises RankLost and what a rank failed with."""
        return [self._next(child, kind, progress) for child in self._children]

    def tell(self, messages: list[ToFollower]) -> None:
        """One to each. Raises RankLost."""
        for child, message in zip(self._children, messages, strict=True):
            self._send(child, _packed(message))

    def join(self, device: torch.device) -> Ranks:
        """Rank 0's end of the collectives. Raises RankLost."""
        try:
            self._ranks = join(Rank(0, self._degree), self._store, device, self._timeout_s)
        except RuntimeError as error:
            raise self.lose(f"the ranks did not find each other: {error}") from error
        return self._ranks

    # Steps.

    @contextmanager
    def step(
        self, batch: ForwardBatch, *, is_shared: bool, layer_group_size: int | None = None
    ) -> Iterator[None]:
        """All ranks compute this, rank 0 within. is_shared: see Ranks.share. Raises RankLost."""
        self.check()
        try:
            self._tell_all(Step(pack(batch), is_shared, layer_group_size))
            yield
            self._note_launched()
        except RankLost:
            raise
        except BaseException as error:
            # The others go on to wait for what does not come.
            raise self.lose(f"rank 0 did not end a step: {error}") from error

    def copy_blocks(self, blocks: Mapping[int, int]) -> None:
        """Before the next step. blocks: target -> source."""
        if blocks:
            self._tell_all(CopyBlocks(dict(blocks)))

    def move_slots(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """See kv_moves; done when it returns. Raises RankLost."""
        self._tell_all(MoveSlots(tuple(targets.tolist()), tuple(sources.tolist())))
        with self._watched():
            self.gather(Moved, lambda _what, _done: None)

    def check(self) -> None:
        """Raise RankLost when a rank is gone: what was computed since then is worth nothing."""
        if self._lost is not None:
            raise RankLost(self._lost)

    # End.

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """on_lost: told why the group ended, once, from any thread; not after `close`."""
        with self._lock:
            self._on_lost = on_lost
        if self._lost is not None:
            on_lost(self._lost)

    def close(self) -> None:
        """End the ranks, when no step runs any more. Closing twice does nothing."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        for child in self._children:
            child.connection.close()
        for child in self._children:
            try:
                child.process.wait(END_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._watcher.join()
        if self._ranks is not None:
            self._ranks.close(END_S)

    # What happens.

    def _watch(self) -> None:
        while not self._is_closed.wait(WATCH_S):
            reason = self._death() or self._delay()
            if reason is not None:
                self.lose(reason)
                return

    def _death(self) -> str | None:
        """Of the first rank that ended."""
        with self._read_lock:
            for child in self._children if self._dead is None else ():
                code = child.process.poll()
                if code is not None:
                    words = _last_words(child)
                    self._dead = f"rank {child.rank} of {self._degree} {_ending(code)}{words}"
                    break
            return self._dead

    def _delay(self) -> str | None:
        # Collectives on a CPU give up by themselves, and a step there may take longer than this.
        began_s, now_s = self._began_s, time.monotonic()
        is_stuck = began_s is not None and now_s - began_s > self._timeout_s
        if self._launched is not None:
            launched_s, event = self._launched
            is_stuck = is_stuck or (now_s - launched_s > self._timeout_s and not event.query())  # type: ignore[no-untyped-call]
        return f"a rank did not answer within {self._timeout_s:g} s" if is_stuck else None

    def lose(self, reason: str) -> RankLost:
        """The group has ended; the error says of what. Whoever comes first says so to the worker."""
        if self._is_closed.is_set():
            return RankLost("it was closed")
        deadline_s = time.monotonic() + REASON_S
        found = self._death()
        # A collective breaks a moment before the process that broke it has ended.
        while found is None and self._ranks is not None and time.monotonic() < deadline_s:
            if self._lost is not None or self._is_closed.wait(WATCH_S / 4):
                break
            found = self._death()
        with self._lock:
            is_first = self._lost is None
            self._lost = self._lost or found or reason
            on_lost = self._on_lost
        if is_first:
            logger.error("rank_lost reason=%s", self._lost)
            for child in self._children:
                child.process.kill()
            if self._ranks is not None:
                self._ranks.abort()
            if on_lost is not None:
                on_lost(str(RankLost(self._lost)))
        return RankLost(self._lost)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._began_s = time.monotonic()
        try:
            yield
        finally:
            self._began_s = None

    def _note_launched(self) -> None:
        if self._ranks is not None and self._ranks.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._launched = time.monotonic(), event

    # Messages.

    def _tell_all(self, message: ToFollower) -> None:
        packed = _packed(message)
        with self._watched():
            for child in self._children:
                self._send(child, packed)

    def _send(self, child: _Child, packed: bytes) -> None:
        self.check()
        try:
            child.connection.send_bytes(packed)
        except OSError as error:
            raise self.lose(f"rank {child.rank} does not listen: {error}") from error

    def _next(self, child: _Child, kind: type[Told], progress: Callable[[str, float], None]) -> Told:
        said = Progress("starting", 0.0)
        while True:
            progress(f"rank {child.rank}: {said.what}", said.fraction)
            self.check()
            try:
                if not child.connection.poll(WATCH_S):
                    continue
                with self._read_lock:
                    message = child.connection.recv()
            except (EOFError, OSError) as error:
                raise self.lose(f"rank {child.rank} of {self._degree} does not answer") from error
            if isinstance(message, Progress):
                said = message
            elif isinstance(message, kind):
                return message
            elif isinstance(message, Failed) and isinstance(message.error, PhasewiseWorkerError):
                raise message.error
            elif isinstance(message, Failed):
                raise RankLost(f"rank {child.rank} of {self._degree} failed: {message.error}")


def _start(rank: int) -> _Child:
    ours, theirs = socket.socketpair()
    # As here, wherever this process has its code from.
    environment = {**LAUNCH_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "workers.tensor_parallel.follower", str(theirs.fileno())],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # What a terminal sends to all is for the worker to act on.
            start_new_session=True,
        )
    return _Child(rank, process, Connection(ours.detach()))


def _last_words(child: _Child) -> str:
    try:
        while child.connection.poll():
            message = child.connection.recv()
            if isinstance(message, Failed):
                return f": {message.error}"
    except (EOFError, OSError):
        pass
    return ""


def _packed(message: ToFollower) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
