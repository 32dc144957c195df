"""What settings of a worker may be, for its command line and for the manifest alike. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

from kvtransfer.config import TransportChoice

MIB = 2**20
KIB = 2**10


@dataclass(frozen=True, slots=True)
class Bounds:
    """Both ends are allowed."""

    least: int
    most: int


BLOCK_SIZE = Bounds(1, 512)
KV_CACHE_MIB = Bounds(1, 16 * MIB)
TOKEN_BUDGET = Bounds(1, MIB)
MAX_RUNNING_SEQUENCES = Bounds(1, 65536)
MAX_WAITING_REQUESTS = Bounds(1, MIB)
GPU_MEMORY_FRACTION = Bounds(0, 1)
THREADS = Bounds(1, 1024)
TENSOR_PARALLEL = Bounds(1, 64)
TILE_TOKENS = Bounds(1, 4096)
#: Rows of a product that a GPU computes together: a step with more tokens takes no longer up to the next multiple.
GPU_TILE_TOKENS = 128
GROWTH_RESERVE = Bounds(0, 1)
HOST_CACHE_MIB = Bounds(0, 16 * MIB)
IMAGE_CACHE_MIB = Bounds(1, 16 * MIB)
ENCODE_PATCH_BUDGET = Bounds(1, MIB)
SPAN_RECOMPUTE = Bounds(0, 1)
SPAN_MIN_TOKENS = Bounds(1, MIB)

LEASE_S = Bounds(1, 3600)
MAX_CHUNK_KIB = Bounds(64, 64 * KIB)
CREDITS = Bounds(1, 1024)
LAYER_GROUP_SIZE = Bounds(1, 1024)
RESUME_S = Bounds(0, 600)
STREAMS = Bounds(1, 16)

#: Ways by which chunks travel, packed by a codec and over several connections; by the others they are read in place.
CARRYING_TRANSPORTS = frozenset({TransportChoice.AUTO, TransportChoice.GRPC})


#: What matrices may be kept in, by where they are.
CPU_DTYPES = ("float32", "bfloat16", "int8")
GPU_DTYPES = ("float32", "bfloat16", "float16", "fp8")
#: Of one number of them.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "fp8": 1.0}


def is_computed_in(dtype: str, *, is_on_gpu: bool) -> bool:
    """Whether weights may be kept in it there."""
    return dtype in (GPU_DTYPES if is_on_gpu else CPU_DTYPES)


#: What is split.
SPLIT_PHASES = frozenset({"prefill", "decode"})


def why_mixed(
    *, is_on_gpu: bool, tensor_parallel: int, phases: Collection[str], step_budget: str
) -> str | None:
    """What keeps a worker from split steps, as the end of a sentence; None when nothing does. phases, step_budget: words of the manifest."""
    if not is_on_gpu:
        return "on a CPU, which has no SMs to divide"
    if tensor_parallel > 1:
        return f"over {tensor_parallel} devices, whose ranks compute one step at a time"
    if set(phases) != SPLIT_PHASES:
        # Batches of an encoder are captured before the layouts are checked, which frees workspaces that these have used.
        return "with phases other than prefill and decode, which are what is split"
    if step_budget == "fixed":
        return "with a fixed step budget: steps are split by the target for TPOT, at which only stepBudget predicted looks"
    return None


def min_token_budget(max_running_sequences: int, block_size: int) -> int:
    """Tokens in a step with which every running sequence gets its token and a prompt its next block."""
    return max_running_sequences + block_size


def default_tile_tokens(token_budget: int, *, is_on_gpu: bool) -> int:
    """Of an engine whose tileTokens nobody has said."""
    return min(GPU_TILE_TOKENS, token_budget) if is_on_gpu else 1
