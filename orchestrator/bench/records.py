"""What a benchmark was asked to do, and what became of each request. Pure."""

from dataclasses import dataclass

from orchestrator.bench.plan import PlannedRequest
from orchestrator.control.slo import Slo

OK = "OK"
#: Statuses of our own, beside those of gRPC.
NOT_SENT = "NOT_SENT"
INTERRUPTED = "INTERRUPTED"
BROKEN_STREAM = "BROKEN_STREAM"


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What was asked for; with the trace and the seed it fixes the load completely."""

    rate_rps: float
    duration_s: float
    first_row: int
    slo: Slo
    seed: int
    #: Deadline of each request.
    timeout_s: float
    max_in_flight: int
    #: Longer prompts and outputs are clipped; None clips to the context alone.
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as the gateway describes it."""

    name: str
    model_digest: str
    max_context_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class GatewayTimings:
    """What the gateway measured of a finished request."""

    ttft_s: float
    queue_s: float
    prefill_s: float
    #: What the second token waited for its KV; None when prefill and decode ran on one worker.
    kv_exposed_s: float | None
    prefill_worker_id: str
    decode_worker_id: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request. `token_times_s` count from when it was sent, one for each token."""

    planned: PlannedRequest
    #: OK, one of the statuses above, or the name of a gRPC status.
    status: str
    message: str = ""
    #: How long after its time it was sent: the load generator's own lateness.
    send_lag_s: float | None = None
    token_times_s: tuple[float, ...] = ()
    #: Sent to the end of its stream.
    total_s: float | None = None
    gateway: GatewayTimings | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Records in order of the plan; those after an interruption are missing."""

    records: tuple[RequestRecord, ...]
    #: The time over which requests arrived.
    arrivals_duration_s: float
    #: From the first arrival's due time to the last answer.
    elapsed_s: float
    was_interrupted: bool
