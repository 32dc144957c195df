"""Everything that goes wrong in the orchestrator, as one tree.

    PhasewiseOrchestratorError
    ├── CallerError             what we were given is at fault
    │   ├── ManifestError       the manifest, or the faults of a simulation: a list of problems, each with its line
    │   ├── InvalidRequest      a field of a request, with its value and what is allowed
    │   ├── UnknownModel        a request for a model that is not served
    │   ├── RequestTooLarge     a request that no worker's KV cache can ever hold
    │   ├── MessageTooLarge     a request whose message is too long
    │   ├── DuplicateRequest    a request whose id another one has that still runs
    │   ├── UnknownRequest      the id of a request that is not remembered (any more)
    │   ├── UnknownWorker       a worker that is not declared
    │   ├── AddressInUse        another process listens where the gateway should
    │   ├── AddressUnusable     the gateway cannot listen at its address
    │   ├── TraceError          a request trace: a line that is none, or too few rows
    │   ├── LooksError          a file of what a policy saw: a line that is none
    │   ├── AlreadyRunning      a deployment of that name runs already
    │   └── DeploymentNotFound  no deployment of that name runs, or it is not clear which one is meant
    ├── OwnError                we could not do our part
    │   ├── GatewayFull         too many requests wait already
    │   ├── TooLate             the first token would come after its target
    │   ├── ImagesFull          too many bytes of pictures are here already
    │   ├── GatewayStopping     the gateway takes no more requests
    │   ├── NoModelYet          no worker has loaded the model yet
    │   ├── ControllerSuperseded another controller of the deployment has taken over
    │   └── LaunchFailed        a deployment could not be started
    └── PeerError               the other side is at fault
        ├── UnusableModel       a worker has loaded a model whose texts the gateway cannot handle
        ├── GatewayUnreachable  no gateway answers at an address
        ├── WorkerUnreachable   no worker answers at an address
        └── BrokenAnswer        an answer ended without a finish reason

A leaf passes its fields to `Exception`, so that it survives pickling; its message is built from them.
`retryable` says whether the same act may succeed later without a change to what was asked.
"""

# ruff: noqa: N818 - leaves are named by what happened; the forks above them end in Error.

from dataclasses import dataclass
from typing import ClassVar


class PhasewiseOrchestratorError(Exception):
    """Base of all errors of this package."""

    retryable: ClassVar[bool] = False


class CallerError(PhasewiseOrchestratorError):
    """What we were given is at fault: it fails again until that is changed."""


@dataclass(frozen=True, slots=True)
class ManifestProblem:
    """One thing that is wrong in a manifest; `line` counts from 1 and is None when it is the whole file."""

    file: str
    line: int | None
    #: As `spec.workers[0].replicas`; empty for the whole document.
    key_path: str
    #: What is wrong, what is allowed, and a guess at what was meant.
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key_path, self.message) if part)


class ManifestError(CallerError):
    """The manifest, or a file that is written like one, cannot be used; `problems` are all that was found, sorted by line."""

    def __init__(self, problems: tuple[ManifestProblem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class TraceError(CallerError):
    """The trace in `file` cannot be used; `line` counts from 1 and is None when it is the whole file."""

    def __init__(self, file: str, line: int | None, problem: str) -> None:
        super().__init__(file, line, problem)
        self.file = file
        self.line = line
        self.problem = problem

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.problem}"


class LooksError(CallerError):
    """The looks in `file` cannot be used; `line` counts from 1 and is None when it is the whole file."""

    def __init__(self, file: str, line: int | None, problem: str) -> None:
        super().__init__(file, line, problem)
        self.file = file
        self.line = line
        self.problem = problem

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.problem}"


class DeploymentNotFound(CallerError):
    """No deployment `name` runs on this machine; with None, not exactly one of `running` could be meant."""

    def __init__(self, name: str | None, running: tuple[str, ...]) -> None:
        super().__init__(name, running)
        self.name = name
        self.running = running

    def __str__(self) -> str:
        if not self.running:
            what = "no deployment runs" if self.name is None else f"no deployment {self.name!r} runs"
            return f"{what} on this machine; start one with `phasewise up MANIFEST`"
        names = ", ".join(self.running)
        if self.name is None:
            return f"{len(self.running)} deployments run, {names}: choose one by its name"
        return f"no deployment {self.name!r} runs on this machine; running: {names}"


class AlreadyRunning(CallerError):
    """A deployment called `name` runs already; its gateway is at `address`."""

    def __init__(self, name: str, address: str) -> None:
        super().__init__(name, address)
        self.name = name
        self.address = address

    def __str__(self) -> str:
        return (
            f"deployment {self.name!r} runs already, with its gateway at {self.address}; "
            f"stop it with: phasewise down {self.name}"
        )


class OwnError(PhasewiseOrchestratorError):
    """We could not do our part, on this machine and now."""


class LaunchFailed(OwnError):
    """A deployment could not be started; `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"


class PeerError(PhasewiseOrchestratorError):
    """The other side of a connection is at fault; it may do better later."""

    retryable: ClassVar[bool] = True


class GatewayUnreachable(PeerError):
    """No gateway answers at `address`."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(address, problem)
        self.address = address
        self.problem = problem

    def __str__(self) -> str:
        return f"no gateway answers at {self.address}: {self.problem}"


class WorkerUnreachable(PeerError):
    """No worker answers at `address`."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(address, problem)
        self.address = address
        self.problem = problem

    def __str__(self) -> str:
        return f"no worker answers at {self.address}: {self.problem}"


class BrokenAnswer(PeerError):
    """The gateway at `address` ended an answer without an error and without a finish reason."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"{self.address} ended the answer without saying why; it is not complete"


class InvalidRequest(CallerError):
    """A request cannot be run as it is: `field` has `value`, and `allowed` says what it may have."""

    def __init__(self, field: str, value: str, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field = field
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.field} is {self.value}; allowed: {self.allowed}"


class UnknownModel(CallerError):
    """A request names a model that this gateway does not serve."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(model, served)
        self.model = model
        self.served = served

    def __str__(self) -> str:
        return f"model is {self.model!r}; served is {self.served!r} alone (an empty name means that one)"


class RequestTooLarge(CallerError):
    """Prompt and output need KV for `num_tokens`; the smallest worker holds `max_sequence_tokens`."""

    def __init__(self, num_prompt_tokens: int, num_tokens: int, max_sequence_tokens: int) -> None:
        super().__init__(num_prompt_tokens, num_tokens, max_sequence_tokens)
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = num_tokens
        self.max_sequence_tokens = max_sequence_tokens

    def __str__(self) -> str:
        return (
            f"the prompt of {self.num_prompt_tokens} tokens needs KV for {self.num_tokens} with the output, and a "
            f"worker's KV cache holds {self.max_sequence_tokens}; shorten the prompt, lower "
            "sampling.max_tokens, or raise engine.kvCacheMiB in the manifest"
        )


class MessageTooLarge(CallerError):
    """A request's message, without its pictures, has more bytes than are read."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(num_bytes, max_bytes)
        self.num_bytes = num_bytes
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return (
            f"the message has {self.num_bytes} bytes without its pictures; at most {self.max_bytes} are read: "
            "shorten it"
        )


class DuplicateRequest(CallerError):
    """A request of this id is running; ids are unique among running requests."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            f"request_id is {self.request_id!r}, which a running request has; use another, or leave it empty"
        )


class UnknownRequest(CallerError):
    """No request of this id is remembered: all that run are, and the last `max_records` that ended."""

    def __init__(self, request_id: str, max_records: int) -> None:
        super().__init__(request_id, max_records)
        self.request_id = request_id
        self.max_records = max_records

    def __str__(self) -> str:
        return (
            f"no request {self.request_id!r} is remembered: the gateway keeps those that run and the last "
            f"{self.max_records} that ended since it started; one that it refused has no record"
        )


class UnknownWorker(CallerError):
    """No worker of this id is declared; `declared` are."""

    def __init__(self, worker_id: str, declared: tuple[str, ...]) -> None:
        super().__init__(worker_id, declared)
        self.worker_id = worker_id
        self.declared = declared

    def __str__(self) -> str:
        return f"no worker {self.worker_id!r} is declared; declared: {', '.join(self.declared) or 'none'}"


class AddressInUse(CallerError):
    """Another process listens at `address`, which `manifest_key` gives."""

    def __init__(self, address: str, manifest_key: str) -> None:
        super().__init__(address, manifest_key)
        self.address = address
        self.manifest_key = manifest_key

    def __str__(self) -> str:
        return (
            f"{self.address} is in use by another process; stop that one (another deployment? "
            f"`phasewise status` lists them), or set {self.manifest_key} in the manifest to another port, "
            "0 for any that is free"
        )


class AddressUnusable(CallerError):
    """The gateway cannot listen at `address`, which `manifest_key` gives."""

    def __init__(self, address: str, manifest_key: str, problem: str) -> None:
        super().__init__(address, manifest_key, problem)
        self.address = address
        self.manifest_key = manifest_key
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"cannot listen at {self.address}: {self.problem}; set {self.manifest_key} in the manifest to an "
            "address of this machine"
        )


class GatewayFull(OwnError):
    """The gateway's queue is full."""

    retryable: ClassVar[bool] = True

    def __init__(self, num_waiting: int) -> None:
        super().__init__(num_waiting)
        self.num_waiting = num_waiting

    def __str__(self) -> str:
        return (
            f"{self.num_waiting} requests are waiting already (gateway.maxWaitingRequests); try again later"
        )


class TooLate(OwnError):
    """The first token of a request is predicted to come after its target; one like it would be taken in `retry_after_s`."""

    retryable: ClassVar[bool] = True

    def __init__(self, predicted_s: float, target_s: float, retry_after_s: float) -> None:
        super().__init__(predicted_s, target_s, retry_after_s)
        self.predicted_s = predicted_s
        self.target_s = target_s
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return (
            f"predicted TTFT {self.predicted_s:.2g} s, target {self.target_s:.2g} s (slo.ttftMs); one like it would be "
            f"taken in about {self.retry_after_s:.2g} s (gateway.admission)"
        )


class ImagesFull(OwnError):
    """The gateway has as many bytes of pictures as it may."""

    retryable: ClassVar[bool] = True

    def __init__(self, num_bytes: int, num_held_bytes: int, max_bytes: int) -> None:
        super().__init__(num_bytes, num_held_bytes, max_bytes)
        self.num_bytes = num_bytes
        self.num_held_bytes = num_held_bytes
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return (
            f"the request brings pictures of {self.num_bytes} bytes, and requests that are here have "
            f"{self.num_held_bytes} of {self.max_bytes} (gateway.maxImageMiB); try again later"
        )


class GatewayStopping(OwnError):
    """The gateway ends and takes no more requests."""

    def __str__(self) -> str:
        return "the gateway is stopping"


class NoModelYet(OwnError):
    """No worker has loaded the model yet, so that its tokenizer is not known."""

    retryable: ClassVar[bool] = True

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"no worker has loaded the model yet: {self.detail}"


class ControllerSuperseded(OwnError):
    """The gateway listens to a later controller than this one, of `epoch`."""

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch

    def __str__(self) -> str:
        return f"another controller has taken over from this one, of epoch {self.epoch}"


class UnusableModel(PeerError):
    """A worker has loaded a model whose texts the gateway cannot handle."""

    retryable: ClassVar[bool] = False

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"the model cannot be served: {self.problem}"
