"""What a gateway remembers of a request, for `phasewise explain`. Pure.

A record is small whatever the request's size: it has numbers and names, and no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.control.encode_shards import EncodeRecord
from orchestrator.control.migration import Migration
from orchestrator.control.request_actions import Action, Fail, WantRoute
from orchestrator.control.request_machine import RequestMachine, RequestState
from orchestrator.control.router import Route
from workers.api import ImagesReduced, KvTransferred, RequestId

#: Requests that have ended and are remembered.
MAX_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class StateRecord:
    """A sample came to `state` at this time of the gateway's clock. reason: empty when it goes without saying."""

    state: RequestState
    at_s: float
    reason: str = ""


@dataclass(slots=True)
class AttemptRecord:
    """One time that a sample was given to workers."""

    attempt: int
    at_s: float
    #: The workers, and why these.
    route: Route
    #: None without a hand-off, and until its worker has reported.
    transfer: KvTransferred | None = None
    #: Why it failed; empty while it has not.
    problem: str = ""


@dataclass(slots=True)
class SampleRecord:
    """One sample. The numbers are those of its last change of state, or of the last `refresh`.

    Times are the gateway's clock, in seconds; None until there is a first token, or a second one.
    """

    states: list[StateRecord]
    #: At most MAX_ATTEMPTS, beside those that workers gave back since they changed their phases.
    attempts: list[AttemptRecord] = field(default_factory=list)
    num_tokens: int = 0
    #: Of the attempt that gave the first token, as are the next three, worker_queue_s and prefill_s.
    num_cached_tokens: int = 0
    num_fetched_tokens: int = 0
    prefix_fetch_s: float = 0.0
    num_reused_tokens: int = 0
    images_reduced: ImagesReduced | None = None
    first_token_at_s: float | None = None
    second_token_at_s: float | None = None
    last_token_at_s: float | None = None
    worker_queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Why its prompt did not begin in the order of arrival, in the same attempt; empty when it did.
    order_reason: str = ""
    #: Times that it went on at another worker, of all attempts.
    migrations: list[Migration] = field(default_factory=list)
    #: Shards of pictures, of all attempts; at most MAX_TRIES for each tile and attempt.
    encodes: list[EncodeRecord] = field(default_factory=list)

    @property
    def state(self) -> RequestState:
        """Its present one."""
        return self.states[-1].state

    def moved(self, machine: RequestMachine, actions: Sequence[Action], now_s: float) -> None:
        """Its machine came to another state, with these actions."""
        reason = next((one.reason for one in actions if isinstance(one, WantRoute | Fail)), "")
        if reason and self.state in (RequestState.PREFILL, RequestState.DECODE):
            self.attempts[-1].problem = reason
        self.states.append(StateRecord(machine.state, now_s, reason))
        is_given = machine.state is RequestState.PREFILL and machine.route is not None
        if is_given and not (self.attempts and self.attempts[-1].attempt == machine.attempt):
            assert machine.route is not None
            self.attempts.append(AttemptRecord(machine.attempt, now_s, machine.route))
        self.refresh(machine)

    def transferred(self, attempt: AttemptRecord, event: KvTransferred) -> None:
        """KV of this attempt has come to where it was sent: that of its prompt, then of each migration."""
        if attempt.transfer is None and not attempt.route.is_colocated:
            attempt.transfer = event
            return
        waiting = [one for one in self.migrations if one.attempt == attempt.attempt and one.transfer is None]
        if waiting:
            waiting[0].transfer = event

    def refresh(self, machine: RequestMachine) -> None:
        """Take the machine's numbers."""
        times = machine.times
        self.num_tokens = len(machine.delivered) + sum(map(len, machine.drafts))
        self.num_cached_tokens = machine.num_cached_tokens
        self.num_fetched_tokens = machine.num_fetched_tokens
        self.prefix_fetch_s = machine.prefix_fetch_s
        self.num_reused_tokens = machine.num_reused_tokens
        self.images_reduced = machine.images_reduced
        self.first_token_at_s = times.first_token_at_s
        self.second_token_at_s = times.second_token_at_s
        self.last_token_at_s = times.last_token_at_s
        self.worker_queue_s = times.worker_queue_s
        self.prefill_s = times.prefill_s
        self.order_reason = machine.order_reason
        # The lists themselves, which its machine goes on with.
        self.encodes = machine.encodes.records
        self.migrations = machine.migrations


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, which runs or has ended."""

    request_id: RequestId
    #: On the gateway's clock, in seconds.
    arrived_at_s: float
    num_prompt_tokens: int
    samples: tuple[SampleRecord, ...]

    @classmethod
    def of(cls, machines: Sequence[RequestMachine]) -> "RequestRecord":
        """Of a request that has just arrived."""
        first = machines[0]
        arrived_at_s = first.times.arrived_at_s
        samples = [SampleRecord([StateRecord(machine.state, arrived_at_s)]) for machine in machines]
        return cls(first.request_id, arrived_at_s, len(first.prompt_ids), tuple(samples))


class RequestRecords:
    """The records of all requests that run, and of the last MAX_RECORDS that ended.

    Those that run are bounded by the gateway's limits of running and waiting requests.
    """

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self.max_records = max_records
        self._running: dict[RequestId, tuple[RequestRecord, Sequence[RequestMachine]]] = {}
        #: The one that ended first is first.
        self._ended: dict[RequestId, RequestRecord] = {}

    def begin(self, record: RequestRecord, machines: Sequence[RequestMachine]) -> None:
        """The request runs, with these machines. An earlier one of this id is forgotten."""
        self._ended.pop(record.request_id, None)
        self._running[record.request_id] = record, machines

    def end(self, record: RequestRecord) -> None:
        """The request has ended; the one that did so longest ago is forgotten when there are too many."""
        del self._running[record.request_id]
        self._ended[record.request_id] = record
        if len(self._ended) > self.max_records:
            del self._ended[next(iter(self._ended))]

    def get(self, request_id: RequestId) -> RequestRecord | None:
        """The record as of now, if it is kept."""
        if request_id not in self._running:
            return self._ended.get(request_id)
        record, machines = self._running[request_id]
        for sample, machine in zip(record.samples, machines, strict=True):
            sample.refresh(machine)
        return record

    def transferred(self, event: KvTransferred) -> None:
        """A hand-off committed. It may be told of after the request has ended."""
        record = self.get(event.key.request_id)
        for sample in record.samples if record is not None else ():
            for attempt in sample.attempts:
                if attempt.attempt == event.key.attempt:
                    sample.transferred(attempt, event)

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)
