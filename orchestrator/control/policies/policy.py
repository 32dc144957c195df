"""What a scheduling policy decides, and from what. Pure.

Three decisions, and the order of a queue. Where a request runs (`place`), when it comes. What phases workers serve (`tick`), now and
then. What a device computes next (`step`), whenever it could begin something with prompts or pictures. `Order` sorts what
waits on a device, and any policy can have any order. A policy is told of each request's end where it learns from that.

What they are decided from is plain numbers, which the simulator keeps and which a controller can make of what workers report.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.control.slo import Slo
from workers.api import Phase, PhaseSet, WorkerId
from workers.prompt_order import Standing
from workers.step_choice import Head, Step

ANY_PHASES = frozenset(Phase)


@dataclass(slots=True)
class WorkerLoad:
    """What one worker has to do. Policies read it; whoever made it may change it between two decisions.

    Waiting and running count alike but where it is said. promised: to decode here, on their way through other phases or workers.
    """

    worker_id: WorkerId
    phases: PhaseSet
    #: Tokens whose KV it has room for; 0 on a worker that only encodes.
    kv_capacity: int
    #: Its phases are being changed: it takes nothing new.
    is_switching: bool = False
    #: Tiles of pictures that are not encoded yet.
    encode_tiles: int = 0
    #: Tokens of prompts that are not computed yet, and their prompts.
    prefill_tokens: int = 0
    num_prefills: int = 0
    #: Sequences that get a token in each step, and the tokens that they attend to.
    num_decoding: int = 0
    decode_context: int = 0
    num_promised: int = 0
    promised_context: int = 0
    #: Tokens whose KV is held, or has its place.
    kv_tokens: int = 0
    #: Steps in which sequences got a token, since it began.
    num_decode_steps: int = 0
    #: Phases that its process can serve; for others a new one takes its place.
    loaded: PhaseSet = ANY_PHASES


@dataclass(slots=True)
class Totals:
    """Counts since the cluster began, so that two looks give rates."""

    num_requests: int = 0
    #: Without those that were cached.
    prompt_tokens: int = 0
    #: Of pictures, without those that somebody has encoded already.
    tiles: int = 0
    num_finished: int = 0
    #: Of the requests that have finished.
    output_tokens: int = 0
    #: Of those, how many met their targets.
    num_met: int = 0


@dataclass(slots=True)
class ClusterLoad:
    """All workers, and those of each phase that take new work; `regroup` after phases or is_switching have changed."""

    workers: tuple[WorkerLoad, ...]
    totals: Totals = field(default_factory=Totals)
    encode: tuple[WorkerLoad, ...] = ()
    prefill: tuple[WorkerLoad, ...] = ()
    decode: tuple[WorkerLoad, ...] = ()

    def __post_init__(self) -> None:
        self.regroup()

    def regroup(self) -> None:
        """Find again who serves what."""
        free = [worker for worker in self.workers if not worker.is_switching]
        self.encode = tuple(worker for worker in free if Phase.ENCODE in worker.phases)
        self.prefill = tuple(worker for worker in free if Phase.PREFILL in worker.phases)
        self.decode = tuple(worker for worker in free if Phase.DECODE in worker.phases)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request that is to be placed.

    num_tiles: of its pictures, to be encoded. cached_at: how many of its tokens a worker has already.
    """

    number: int
    arrived_at_s: float
    num_tokens: int
    num_tiles: int
    slo: Slo
    tenant: str
    cached_at: Callable[[WorkerLoad], int]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which workers serve it; tiles are spread over `encode`, and fetched is what `prefill` gets of the prefix from `fetch_from`."""

    prefill: WorkerLoad
    decode: WorkerLoad
    encode: tuple[WorkerLoad, ...] = ()
    fetch_from: WorkerLoad | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """It cannot meet its targets. earliest_s: when one like it could come and would."""

    reason: str
    earliest_s: float


@dataclass(frozen=True, slots=True)
class Switch:
    """Let a worker serve these phases. predicted: goodput after it over that before, as far as the policy knows."""

    worker_id: WorkerId
    phases: PhaseSet
    reason: str
    predicted: float


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """From the beginning of a switch until the worker has the phases, in seconds, with and without a new process.

    As long as nothing else is known: what benchmarks/control/role_switch.py measured on CPUs (docs/performance.md).
    """

    change_s: float = 0.1
    replace_s: float = 9.0

    def of(self, *, needs_new_process: bool) -> float:
        """One of the two."""
        return self.replace_s if needs_new_process else self.change_s


FIRST_SWITCH_COST = SwitchCost()


@dataclass(slots=True, eq=False)
class Job:
    """A prompt in the queue of a device; an order may read it. num_left: tokens to compute, or tiles."""

    number: int
    arrived_at_s: float
    deadline_s: float
    tenant: str
    num_left: int
    num_done: int = 0
    is_begun: bool = False
    #: It was preempted, and waits for its next one.
    has_first_token: bool = False
    #: As its order found it last.
    standing: Standing = Standing.ON_TIME


class Order(Protocol):
    """Which prompt of a device's queue is first: the one of the smallest rank, and of those that have one rank of the smallest key."""

    def key(self, job: Job) -> float:
        """Asked when it comes, and when a part of it has been computed. Ageing is in it: now is the same for all."""
        ...

    def ranks(self, now_s: float, jobs: Iterable[Job], device: WorkerLoad) -> Sequence[int]:
        """Asked before each step, of all prompts of the device where there are several, by key; empty where keys alone decide."""
        ...

    def waits(self, job: Job) -> None:
        """It came to the queue; told again when it comes back to it after a part of it was computed."""
        ...

    def leaves(self, job: Job) -> None:
        """All of it was computed, or it goes elsewhere. It has waited here."""
        ...

    def charge(self, job: Job, num_tokens: int) -> None:
        """So much was computed for it."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has got all its tokens. decoded_by: the worker of its last one."""

    prefilled_by: WorkerId
    decoded_by: WorkerId
    ttft_s: float
    tpot_s: float | None
    slo: Slo


class Placing(Protocol):
    """Where a request runs."""

    def place(self, now_s: float, prompt: Prompt, cluster: ClusterLoad) -> Placement | Reject:
        """Of workers that take new work alone."""
        ...


class Stepping(Protocol):
    """What a device computes next."""

    def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
        """Asked whenever a prompt or a picture could begin; decodes alone go on without being asked for."""
        ...


def no_switches(_now_s: float, _cluster: ClusterLoad) -> Sequence[Switch]:
    """Phases stay as they are."""
    return ()


def learn_nothing(_now_s: float, _ended: Ended) -> None:
    """Ends are not listened to."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The parts of a policy. shape: the phases that its workers begin with."""

    name: str
    shape: tuple[PhaseSet, ...]
    make_order: Callable[[], Order]
    placing: Placing
    stepping: Stepping
    tick: Callable[[float, ClusterLoad], Sequence[Switch]] = no_switches
    told: Callable[[float, Ended], None] = learn_nothing
