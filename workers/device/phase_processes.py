"""The processes of one phase of a GPU, driven by `share_switch`: its actions become processes, and what these say its events.

While a phase rests a spare is kept for the next switch, which then waits for no interpreter and no import.
"""

import logging
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from workers.api import Phase
from workers.device.mps import MpsDaemon
from workers.device.share_process import (
    Adopt,
    Begin,
    Ended,
    HandedOver,
    HandOver,
    Opener,
    Ready,
    ShareProcess,
    Spare,
    Stepped,
    WorkMaker,
    open_gpu,
)
from workers.device.share_switch import ActionKind, EventKind, ShareAction, ShareSwitch, SwitchState
from workers.device.shared_blocks import SharedBlocks

logger = logging.getLogger(__name__)

#: Numbers of the processes of one phase; those of the phases of one pool must differ, as they own blocks by them.
NUMBERS_PER_PHASE = 1_000_000
_FIRST_NUMBER = {phase: index * NUMBERS_PER_PHASE for index, phase in enumerate(Phase)}


class PhaseProcesses:
    """Of one phase. Used by one thread, which calls `tick`.

    daemon: that parts the SMs; with None every process has all of them. steps: (number, seconds of the machine's monotonic clock) of the
    first step of each process; readies: how each got ready.
    """

    def __init__(
        self,
        phase: Phase,
        make: WorkMaker,
        manifest: bytes,
        blocks_path: Path,
        daemon: MpsDaemon | None,
        *,
        opener: Opener = open_gpu,
    ) -> None:
        self.switch = ShareSwitch()
        self.steps: list[tuple[int, float]] = []
        self.readies: dict[int, Ready] = {}
        self._phase = phase
        self._make, self._opener = make, opener
        self._manifest = manifest
        self._blocks_path = blocks_path
        self._blocks = SharedBlocks(blocks_path)
        self._daemon = daemon
        self._processes: dict[int, ShareProcess] = {}
        #: That are not needed any more, until they have ended.
        self._leaving: dict[int, ShareProcess] = {}
        self._states: dict[int, Any] = {}
        self._spare: ShareProcess | None = ShareProcess(make, opener)
        #: Whether its interpreter is up, as far as was heard.
        self.is_spare_ready = False

    def ask(self, percentage: float, reason: str) -> None:
        """Go to this share of the SMs; `tick` until it is there."""
        self._apply(self.switch.ask(percentage, reason))

    def tick(self, timeout_s: float) -> None:
        """Take what processes say, waiting for so long at most for the first of it."""
        pipes: dict[Any, int] = {process.pipe: number for number, process in self._processes.items()}
        ends: dict[Any, int] = {process.sentinel: number for number, process in self._leaving.items()}
        spares = [self._spare.pipe] if self._spare is not None and not self.is_spare_ready else []
        for one in wait([*pipes, *ends, *spares], timeout_s):
            if one in spares:
                self._spare_told()
            elif one in ends:
                self._left(ends[one])
            elif pipes[one] in self._processes:
                self._told(pipes[one], self._processes[pipes[one]])
        if self.switch.state is SwitchState.SERVING and self._spare is None:
            self._spare, self.is_spare_ready = ShareProcess(self._make, self._opener), False

    def settle(self, timeout_s: float) -> None:
        """Tick until the share is the one that was asked for last. Raises TimeoutError."""
        give_up_s = time.monotonic() + timeout_s
        while self.switch.state is not SwitchState.SERVING:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"{self._phase} is {self.switch.state} after {timeout_s:g} s")
            self.tick(left_s)

    def pid(self) -> int:
        """Of the process that serves; 0 when none does."""
        serving = self.switch.serving
        return self._processes[serving.number].pid if serving is not None else 0

    def owner(self, number: int) -> int:
        """By which process `number` of this phase owns blocks."""
        return _FIRST_NUMBER[self._phase] + number

    def close(self) -> None:
        """End all of them, and free what they owned. Closing twice does nothing."""
        self._leaving |= self._processes
        self._processes.clear()
        for process in self._leaving.values():
            process.release()
        for number in list(self._leaving):
            self._left(number)
        if self._spare is not None:
            # It holds nothing, and may be in the middle of its imports.
            self._spare.kill()
            self._spare.end()
            self._spare = None
        self._blocks.close()

    def _left(self, number: int) -> None:
        self._leaving.pop(number).end()
        self._blocks.reap(self.owner(number))

    def _spare_told(self) -> None:
        # Taken meanwhile, it is a process like any other, which says so first.
        if self._spare is not None:
            self.is_spare_ready = isinstance(self._spare.receive(), Spare)
            if not self.is_spare_ready:
                self._spare.end()
                self._spare = None

    def _told(self, number: int, process: ShareProcess) -> None:
        match process.receive():
            case Ready() as ready:
                self.readies[number] = ready
                self._apply(self.switch.handle(EventKind.READY, number))
            case HandedOver(state):
                self._states[number] = state
                self._apply(self.switch.handle(EventKind.HANDED_OVER, number))
            case Stepped(at_s):
                self.steps.append((number, at_s))
                self._apply(self.switch.handle(EventKind.STEPPED, number))
            case Ended(reason):
                logger.warning("share_process_died phase=%s number=%d reason=%s", self._phase, number, reason)
                self._processes.pop(number).end()
                self._apply(self.switch.handle(EventKind.DIED, number))
            case Spare():
                pass

    def _apply(self, actions: list[ShareAction]) -> None:
        for action in actions:
            logger.info(
                "share_switch phase=%s %s number=%d reason=%s",
                self._phase,
                action.kind,
                action.number,
                action.reason,
            )
            self._do(action)

    def _do(self, action: ShareAction) -> None:
        number, process = action.number, self._processes.get(action.number)
        match action.kind:
            case ActionKind.START:
                self._start(action)
            case ActionKind.HAND_OVER if process is not None:
                process.send(HandOver())
            case ActionKind.ADOPT if process is not None:
                process.send(Adopt(self._states.get(action.heir_of)))
            case ActionKind.TAKE:
                owned = self._blocks.blocks_of(self.owner(action.heir_of))
                self._blocks.hand_over(owned, self.owner(action.heir_of), self.owner(number))
                self._states.pop(action.heir_of, None)
            case ActionKind.END if process is not None:
                self._leaving[number] = self._processes.pop(number)
                process.release()
            case ActionKind.REAP:
                self._blocks.reap(self.owner(number))
                self._states.pop(number, None)

    def _start(self, action: ShareAction) -> None:
        process, self._spare = self._spare or ShareProcess(self._make, self._opener), None
        self.is_spare_ready = False
        environment = self._daemon.environment(action.percentage) if self._daemon is not None else {}
        self._processes[action.number] = process
        process.send(Begin(self.owner(action.number), environment, self._manifest, self._blocks_path))
