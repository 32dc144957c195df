"""The life of one declared worker across its processes: events in, state out. Pure.

A process is named by its incarnation. The machine speaks for the newest one; what earlier ones do is
nothing to it. When to start, and which process must go, `controller` reads off its state.
"""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control.view import LifecycleState
from workers.api import WorkerId, WorkerStatus

#: Longest wait before a lost worker is started again, in seconds.
MAX_BACKOFF_S = 30.0
#: A worker that was ready for so long has a clean record again, in seconds.
GOOD_RECORD_S = 60.0
#: Wait before a failed worker is tried again, in seconds.
FAILED_RETRY_S = 60.0


class WorkerEvent(StrEnum):
    """What can happen to a declared worker."""

    #: A start of its next incarnation is being asked for.
    PLACEMENT_ASKED = "placement_asked"
    #: A process was found that this controller did not start.
    ADOPTED = "adopted"
    #: The cluster told what its process waits for.
    PLACEMENT_REPORTED = "placement_reported"
    #: Its process has an address, or another one than before.
    BOUND = "bound"
    HEARD_LOADING = "heard_loading"
    HEARD_READY = "heard_ready"
    HEARD_FAILED = "heard_failed"
    #: It said nothing for too long.
    SILENT = "silent"
    EXITED = "exited"
    #: The wait before the next start is over.
    RETRY_DUE = "retry_due"
    #: A new process is to take the place of one that serves, with other phases.
    REPLACE = "replace"


_PENDING = LifecycleState.PENDING
_STARTING = LifecycleState.STARTING
_READY = LifecycleState.READY
_LOST = LifecycleState.LOST
_FAILED = LifecycleState.FAILED

_ROWS: dict[WorkerEvent, tuple[LifecycleState | None, ...]] = {
    # where it is:                   PENDING    STARTING   READY      LOST       FAILED
    WorkerEvent.PLACEMENT_ASKED:    (_STARTING, None,      None,      None,      None),
    WorkerEvent.ADOPTED:            (_STARTING, _STARTING, _STARTING, _STARTING, _STARTING),
    WorkerEvent.PLACEMENT_REPORTED: (None,      _STARTING, None,      None,      None),
    WorkerEvent.BOUND:              (None,      _STARTING, _STARTING, None,      None),
    WorkerEvent.HEARD_LOADING:      (None,      _STARTING, _STARTING, None,      None),
    WorkerEvent.HEARD_READY:        (None,      _READY,    _READY,    None,      None),
    WorkerEvent.HEARD_FAILED:       (None,      _FAILED,   _LOST,     None,      None),
    WorkerEvent.SILENT:             (None,      _LOST,     _LOST,     None,      None),
    WorkerEvent.EXITED:             (None,      _LOST,     _LOST,     None,      None),
    WorkerEvent.RETRY_DUE:          (None,      None,      None,      _PENDING,  _PENDING),
    WorkerEvent.REPLACE:            (None,      None,      _PENDING,  None,      None),
}  # fmt: skip

#: Next state by (state, event), for every pair; None: the event changes nothing there. A worker that was
#: ready and says that it failed is LOST and not FAILED: it served before, so a new process probably can.
TRANSITIONS: dict[tuple[LifecycleState, WorkerEvent], LifecycleState | None] = {
    (state, event): next_state
    for event, row in _ROWS.items()
    for state, next_state in zip(LifecycleState, row, strict=True)
}


@dataclass(slots=True)
class WorkerMachine:
    """One declared worker. `handle` changes it; everything else is read."""

    worker_id: WorkerId
    state: LifecycleState = LifecycleState.PENDING
    #: Why it is in this state.
    reason: str = "first start"
    #: Of the newest process; 0 before the first.
    incarnation: int = 0
    #: Of any process of this worker that was ever seen; at least `incarnation`.
    highest_incarnation: int = 0
    #: host:port of the newest process; empty while it has none.
    address: str = ""
    #: What the newest process said last.
    status: WorkerStatus | None = None
    #: For how long the newest process was listened to and said nothing.
    silent_s: float = 0.0
    #: The cluster has listed the newest process.
    is_listed: bool = False
    #: When a lost or failed worker is to be started again.
    retry_at_s: float = 0.0
    #: Why the last process had to be replaced; empty before that.
    last_loss: str = ""
    #: Losses since its record was clean.
    num_losses: int = 0
    #: Processes after the first, as far as is known.
    num_restarts: int = 0
    _ready_since_s: float = 0.0

    @property
    def wants_process(self) -> bool:
        """The newest process is wanted. In every other state none is."""
        return self.state is _READY or self.state is _STARTING

    @property
    def waits_for_place(self) -> bool:
        """A process is to run, now or soon, and no node has taken it yet."""
        return not self.address and self.state is not _FAILED

    def handle(self, event: WorkerEvent, reason: str, now_s: float) -> None:
        """Apply one event. `reason` says why it happened and becomes the reason of the state."""
        assert reason, event
        next_state = TRANSITIONS[self.state, event]
        if next_state is None:
            return
        if event is WorkerEvent.PLACEMENT_ASKED:
            self._new_process(self.highest_incarnation + 1)
        elif next_state is LifecycleState.READY and self.state is not LifecycleState.READY:
            self._ready_since_s = now_s
        elif next_state is LifecycleState.LOST:
            self.retry_at_s = now_s + self._backoff_s(now_s)
        elif next_state is LifecycleState.FAILED:
            self.retry_at_s = now_s + FAILED_RETRY_S
        if event is WorkerEvent.REPLACE:
            self.address, self.status, self.silent_s = "", None, 0.0
        self.state = next_state
        self.reason = reason
        if next_state in (LifecycleState.LOST, LifecycleState.FAILED):
            self.last_loss = reason
            self.address, self.status, self.silent_s = "", None, 0.0

    def adopt(self, incarnation: int, reason: str, now_s: float) -> None:
        """Speak for this process from now on; it was not started by us, or not in this life."""
        assert incarnation >= self.incarnation, f"{self.worker_id}: {incarnation} < {self.incarnation}"
        self._new_process(incarnation)
        self.handle(WorkerEvent.ADOPTED, reason, now_s)

    def saw_incarnation(self, incarnation: int) -> None:
        """A process of this number exists or existed: the number is used up."""
        if incarnation > self.highest_incarnation:
            self.highest_incarnation = incarnation

    def check_invariants(self) -> None:
        """What holds between events."""
        assert 0 <= self.incarnation <= self.highest_incarnation, self
        assert self.reason, self
        assert self.silent_s >= 0, self
        assert self.wants_process or not (self.address or self.status), self
        assert self.incarnation > 0 or self.state is LifecycleState.PENDING, self

    def _new_process(self, incarnation: int) -> None:
        if self.incarnation > 0:
            self.num_restarts += 1
        self.incarnation = incarnation
        self.saw_incarnation(incarnation)
        self.address, self.status, self.silent_s, self.is_listed = "", None, 0.0, False

    def _backoff_s(self, now_s: float) -> float:
        """Wait before the next start: 0 s after a first loss of a ready worker, then 1, 2, 4 and so on."""
        was_ready = self.state is LifecycleState.READY
        if was_ready and now_s - self._ready_since_s >= GOOD_RECORD_S:
            self.num_losses = 0
        if not was_ready:
            # A process that never served gets no start for free.
            self.num_losses = max(1, self.num_losses)
        self.num_losses += 1
        # The exponent is kept small: a power of a long record would overflow.
        return 0.0 if self.num_losses == 1 else min(MAX_BACKOFF_S, 2.0 ** min(self.num_losses - 2, 10))
