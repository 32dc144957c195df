"""Shapes of what a worker has loaded and of where it computes, and the latency model that it begins with. Pure."""

from dataclasses import asdict, replace
from pathlib import PurePath

from workers.api import WeightDtype
from workers.errors import ProfileError
from workers.known_gpu import H100
from workers.latency_model import LatencyModel
from workers.limits import WEIGHT_BYTES
from workers.model.config import ModelConfig
from workers.step_shape import DeviceShape, ModelShape, StepCosts

#: Of one output of a matrix in fp8.
SCALE_BYTES = 4
#: Of one number of the LM head, where it is kept otherwise than the layers.
FP8_HEAD_BYTES = 2.0
#: Of one thread, and of memory: what the factors start from. Steps tell soon how far off they are.
THREAD_FLOPS_PER_S, THREAD_ATTENTION_FLOPS_PER_S = 80e9, 20e9
BYTES_PER_S, TRANSFER_BYTES_PER_S = 12e9, 1e9
STEP_OVERHEAD_S = 2e-3
#: Prefill by benchmarks/serving/engine_gpu.py with weights in fp8, of one second, to that in bfloat16.
FP8_SPEED_UP = 1.6


def model_shape(
    config: ModelConfig, model_source: str, dtype: WeightDtype, *, kv_head_bytes: int | None = None
) -> ModelShape:
    """Of the text model. The name is the source's, without its folders. kv_head_bytes: of K or V of a head in the pool, None of fp32."""
    query_size = config.num_heads * config.head_dim
    layer = config.hidden_size * (config.qkv_size + query_size + 3 * config.intermediate_size)
    kv_heads = 2 * config.num_layers * config.num_kv_heads
    num_weights, num_head_weights = config.num_layers * layer, config.vocab_size * config.hidden_size
    weight_bytes = WEIGHT_BYTES[dtype]
    if dtype is WeightDtype.FP8:
        # On average: whoever reads the layers reads the LM head too.
        num_bytes = weight_bytes * num_weights + FP8_HEAD_BYTES * num_head_weights
        weight_bytes = num_bytes / (num_weights + num_head_weights)
    return ModelShape(
        PurePath(model_source).name,
        num_weights=num_weights,
        num_head_weights=num_head_weights,
        weight_bytes=weight_bytes,
        num_layers=config.num_layers,
        hidden_size=query_size,
        kv_token_bytes=kv_heads * (kv_head_bytes or 4 * config.head_dim),
    )


def cpu_shape(num_threads: int, memory_bytes: int) -> DeviceShape:
    """Of any CPU, before it was measured."""
    return DeviceShape(
        "cpu",
        flops_per_s=num_threads * THREAD_FLOPS_PER_S,
        attention_flops_per_s=num_threads * THREAD_ATTENTION_FLOPS_PER_S,
        bytes_per_s=BYTES_PER_S,
        step_overhead_s=STEP_OVERHEAD_S,
        memory_bytes=memory_bytes,
        transfer_bytes_per_s=TRANSFER_BYTES_PER_S,
        is_reading_hidden=False,
    )


def gpu_shape(name: str, memory_bytes: int, dtype: WeightDtype = WeightDtype.BFLOAT16) -> DeviceShape:
    """Of any GPU, before it was measured: an H100's, curves by share of the SMs included. dtype: of the weights that it multiplies."""
    speed_up = FP8_SPEED_UP if dtype is WeightDtype.FP8 else 1.0
    return replace(H100, name=name, memory_bytes=memory_bytes, flops_per_s=H100.flops_per_s * speed_up)


def first_latency(
    profile: StepCosts | None, model: ModelShape, device: DeviceShape
) -> tuple[LatencyModel, str | None]:
    """What a worker with this model on this device begins with, and why not with the profile; None with it, and where there is none.

    Raises ProfileError: one of another model is nobody's. One of another device may be another worker's of the same group.
    """
    if profile is None:
        return LatencyModel(model, device), None
    if not profile.is_of(model, profile.device):
        there, here = asdict(profile.model), asdict(model)
        parts = [
            f"{key} {there[key]} and not {here[key]}"
            for key in here
            if key != "name" and there[key] != here[key]
        ]
        remedy = "`phasewise calibrate` writes one, with the same model, --weight-dtype and --kv-dtype"
        raise ProfileError(
            f"profile of {profile.model.name}",
            (f"is of another model than {model.name}: {', '.join(parts)}; {remedy}",),
        )
    if not profile.is_of(model, device):
        return LatencyModel(model, device), f"it is of {profile.device.name}, and this is {device.name}"
    # How fast it is was measured there; how much memory it has is this one's.
    own_device = replace(profile.device, memory_bytes=device.memory_bytes)
    return LatencyModel.profiled(replace(profile, model=model, device=own_device)), None
