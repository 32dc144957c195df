"""What a worker says of itself to whoever asks: its state, its work, and its counts of KV, pictures and GPU."""

from dataclasses import dataclass
from enum import StrEnum

from workers.api.keys import WorkerId
from workers.api.phases import Phase, PhaseSet
from workers.step_shape import EncodeCosts, StepCosts


class WorkerState(StrEnum):
    """What a worker says of itself."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


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
