"""What a GPU computes in and keeps, by the settings of the engine. Pure."""

from kvtransfer.layout import INT4
from workers.api import EngineConfig, KvDtype, WeightDtype

#: bfloat16 products, and what the kernels are compiled for. Measured are those of 9.0 (Hopper) alone.
MIN_CAPABILITY = (8, 0)
#: Products of fp8, and its conversion.
FP8_CAPABILITY = (8, 9)


def computed_in(weights: WeightDtype) -> str:
    """The dtype of activations, embeddings and norms, as torch names it."""
    return WeightDtype.BFLOAT16 if weights is WeightDtype.FP8 else weights.value


def kv_dtype(engine: EngineConfig) -> str:
    """A key of kvtransfer.layout.DTYPE_BITS."""
    match engine.kv_dtype:
        case KvDtype.AUTO:
            return computed_in(engine.weight_dtype)
        case KvDtype.FP8:
            return "float8_e4m3fn"
        case KvDtype.INT4:
            return INT4


def needed_capability(engine: EngineConfig) -> tuple[int, int]:
    """The least compute capability of a GPU that does all that."""
    is_fp8 = engine.weight_dtype is WeightDtype.FP8 or engine.kv_dtype is KvDtype.FP8
    return FP8_CAPABILITY if is_fp8 else MIN_CAPABILITY
