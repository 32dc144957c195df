"""What a worker does while it has nothing to compute: it looks whether its own books are right. Pure.

A violation is our bug. The worker goes on serving all the same: a leaked block costs room and nothing else, what could
give wrong tokens (a block that is freed twice, or while a transfer holds it) the pool refuses at once, and a worker that
ended itself would drop requests for what a restart at a quiet time puts right. So it is told instead: once in the log,
and in the status until the worker is started again.
"""

import logging

from workers.api import KvLedger
from workers.engine.engine import Engine
from workers.engine.ledger import ledger_text

logger = logging.getLogger(__name__)

#: An engine that has computed nothing for so long is checked, and again after as long, in seconds.
IDLE_CHECK_S = 30.0


class IdleCheck:
    """Told after each turn of the loop whether there was something to compute."""

    def __init__(self, engine: Engine) -> None:
        #: Checks that found something wrong.
        self.num_failures = 0
        #: As of the last look.
        self.leaked_blocks = 0
        self._engine = engine
        #: When it became idle, or was checked last; None while it computes.
        self._since_s: float | None = None
        #: What the last check found, so that it is logged once.
        self._problem = ""

    def busy(self) -> None:
        """There was something to compute."""
        self._since_s = None

    def idle(self, now_s: float) -> bool:
        """There was nothing to compute. True when that was so for long enough and the engine was checked."""
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < IDLE_CHECK_S:
            return False
        self._since_s = now_s
        self._check(now_s)
        return True

    def ledger(self, now_s: float) -> KvLedger:
        """The engine's, looked at for leaked blocks."""
        ledger = self._engine.ledger(now_s)
        self.leaked_blocks = ledger.leaked_blocks
        return ledger

    def _check(self, now_s: float) -> None:
        problem, text = "", ""
        try:
            ledger = self.ledger(now_s)
            text = ledger_text(ledger)
            if ledger.leaked_blocks:
                problem = f"{ledger.leaked_blocks} blocks are leaked"
            self._engine.check_invariants()
        except Exception as error:  # noqa: BLE001 - whatever a wrong state raises is what was found
            problem = "; ".join(part for part in (problem, f"{type(error).__name__}: {error}") if part)
        if problem:
            self.num_failures += 1
            if problem != self._problem:
                logger.error("invariants_violated problem=%s ledger=%s", problem, text or "cannot be made")
        self._problem = problem
