"""How much of a GPU's memory a worker takes, and for what. Pure."""

from dataclasses import dataclass

from workers.api import EngineConfig, WeightDtype
from workers.device.buckets import MAX_MIXED_TOKENS
from workers.model.config import ModelConfig
from workers.model.vision.config import VisionConfig

#: What libraries, kernels and graphs take beside what is counted here, in bytes; parts of chunks' outputs among it, twice (docs/gpu-kernels.md).
CONTEXT_BYTES = 832 * 2**20
#: The same of one layout of the SMs beside its captured steps: contexts, workspaces for its two streams, graphs of many pieces, and parts of
#: chunks' outputs.
LAYOUT_CONTEXT_BYTES = 288 * 2**20
#: Logits that the sampler reads may be float32 in a copy, or sorted.
SAMPLER_COPIES_BYTES = 8
#: Bins and candidates of each row that is drawn, whatever the vocabulary (`phasewise_kernels/sample/triton_kernel.py`).
SAMPLER_ROW_BYTES = 144 * 2**10
#: What a layer of an encoder holds of each patch, in hidden and in intermediate sizes: Q, K and V as they are projected,
#: rotated in float32 and gathered by windows, and what comes before and after.
ENCODER_HIDDEN_SIZES, ENCODER_INNER_SIZES = 24, 3


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """free_bytes: now, of total_bytes. own_bytes: what this process holds of the rest; the others hold what remains."""

    free_bytes: int
    total_bytes: int
    own_bytes: int = 0

    def left_of(self, fraction: float) -> int:
        """What this process may still take so that it has no more than this share of the memory."""
        return max(0, min(self.free_bytes, int(fraction * self.total_bytes) - self.own_bytes))

    def held_of(self, fraction: float) -> int:
        """What others hold of this share: it is not free."""
        return max(0, int(fraction * self.total_bytes) - self.own_bytes - self.free_bytes)


def step_bytes(config: ModelConfig, engine: EngineConfig, value_bytes: int) -> int:
    """What the largest step needs beside weights and KV. value_bytes: of one number between the layers."""
    num_tokens = max(engine.token_budget, engine.max_running_sequences)
    logits = engine.max_running_sequences * config.vocab_size
    # Steps that are captured have memory of their own.
    num_captured = max(min(engine.token_budget, MAX_MIXED_TOKENS), engine.max_running_sequences)
    num_values = (num_tokens + num_captured) * _inner_values(config) + 2 * logits
    if config.vision is not None:
        num_values += num_captured * config.hidden_size
    num_bytes = CONTEXT_BYTES + num_values * value_bytes + logits * SAMPLER_COPIES_BYTES
    num_bytes += engine.max_running_sequences * SAMPLER_ROW_BYTES
    if engine.weight_dtype is WeightDtype.FP8:
        # What is multiplied is there in fp8 too.
        num_bytes += (num_tokens + num_captured) * max(config.intermediate_size, config.hidden_size)
    return num_bytes


def layout_bytes(config: ModelConfig, engine: EngineConfig, value_bytes: int) -> int:
    """What the captured prompts and decodes of one layout of the SMs take, an estimate from above. value_bytes: as for step_bytes.

    For Llama-3-8B's shape with 384 sequences and 2,048 tokens it is 0.88 GB, where an H100 took 0.81 before chunks left parts; no other shape was measured.
    """
    num_tokens = min(engine.token_budget, MAX_MIXED_TOKENS) + engine.max_running_sequences
    # As they are computed, and where they are copied to.
    logits = 2 * engine.max_running_sequences * config.vocab_size
    return LAYOUT_CONTEXT_BYTES + (num_tokens * _inner_values(config) + logits) * value_bytes


def _inner_values(config: ModelConfig) -> int:
    """Numbers that a layer holds of each token."""
    return 3 * config.intermediate_size + 2 * config.qkv_size + 6 * config.hidden_size


def encoder_step_bytes(vision: VisionConfig, patch_budget: int, value_bytes: int) -> int:
    """What the largest batch of the encoder needs beside weights, an estimate from above. value_bytes: as for step_bytes."""
    num_patches = max(patch_budget, vision.max_tile_patches)
    hidden = ENCODER_HIDDEN_SIZES * vision.hidden_size
    inner = ENCODER_INNER_SIZES * vision.intermediate_size
    pixels = 3 * vision.patch_size**2
    return num_patches * ((hidden + inner + pixels) * value_bytes + pixels * 4)


def kv_cache_bytes(memory: GpuMemory, engine: EngineConfig, needed_bytes: int) -> int:
    """What is taken for KV once the weights are there: what the engine says, or else what is left of its share.

    needed_bytes: see step_bytes. 0 or less when nothing is left.
    """
    if engine.kv_cache_bytes:
        return engine.kv_cache_bytes
    return memory.left_of(engine.gpu_memory_fraction) - needed_bytes
