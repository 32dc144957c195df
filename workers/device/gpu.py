"""The GPU of a worker: is it there, is it new enough, how much memory is free; and the weights on it."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from kvtransfer.transports.cuda_mapping import device_uuid
from workers.api import WeightDtype
from workers.device.dtypes import MIN_CAPABILITY, computed_in
from workers.device.memory import GpuMemory
from workers.errors import GpuUnavailable, OutOfMemory
from workers.model.fp8 import is_matrix, quantised, weights_bytes


def open_gpu(
    index: int = 0, num_gpus: int = 1, needed_capability: tuple[int, int] = MIN_CAPABILITY
) -> torch.device:
    """GPU `index` of the first num_gpus that this process sees. Raises GpuUnavailable."""
    if torch.version.cuda is None:
        raise GpuUnavailable(
            f"torch {torch.__version__} was built without CUDA", "install torch with CUDA, or use device cpu"
        )
    if not torch.cuda.is_available():
        raise GpuUnavailable(
            "CUDA finds none",
            "see that nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it (Ray hides it from a worker whose "
            "resources.gpus is 0 where RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1), or use device cpu",
        )
    if torch.cuda.device_count() < num_gpus:
        raise GpuUnavailable(
            f"engine.tensorParallel is {num_gpus} and this process sees {torch.cuda.device_count()}",
            f"set resources.gpus: {num_gpus} on a node that has them, see what CUDA_VISIBLE_DEVICES hides, or lower "
            "engine.tensorParallel",
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < needed_capability:
        have, need = (".".join(map(str, one)) for one in (capability, needed_capability))
        is_enough = capability >= MIN_CAPABILITY
        raise GpuUnavailable(
            f"{torch.cuda.get_device_name(index)} has compute capability {have} and {need} is needed"
            + (" for fp8" if is_enough else ""),
            "use a newer GPU, or neither engine.weightDtype nor engine.kvDtype fp8 (kvDtype int4 works)"
            if is_enough
            else "use a newer GPU or device cpu",
        )
    try:
        torch.zeros(1, device=f"cuda:{index}")
    except RuntimeError as error:
        raise GpuUnavailable(str(error).splitlines()[0], "see whether other programs use it alone") from error
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_uuid(index: int = 0) -> str:
    """Of GPU `index` of those that this process sees, as NVML names it."""
    return f"GPU-{device_uuid(index)}"


def gpu_memory(device: torch.device) -> GpuMemory:
    """As of now."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return GpuMemory(free_bytes, total_bytes, torch.cuda.memory_reserved(device))


def check_room(need_bytes: int, device: torch.device, memory_fraction: float) -> None:
    """Raise OutOfMemory when weights of so many bytes do not fit in this share of the GPU's memory."""
    remedy = "use a smaller model, more or larger GPUs, end other programs on it, or raise engine.gpuMemoryFraction"
    require("the model's weights on the GPU", need_bytes, device, memory_fraction, remedy)


def require(purpose: str, need_bytes: int, device: torch.device, memory_fraction: float, remedy: str) -> None:
    """Raise OutOfMemory when so many bytes do not fit in this share of the GPU's memory."""
    left_bytes = gpu_memory(device).left_of(memory_fraction)
    if need_bytes > left_bytes:
        raise OutOfMemory(purpose, need_bytes, left_bytes, remedy)


def load_to_gpu(
    path: Path,
    device: torch.device,
    dtype: WeightDtype,
    memory_fraction: float,
    progress: Callable[[float], None],
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, converted one by one: the host holds no copy of all. With fp8 those of `fp8.quantised`.

    Raises OutOfMemory when they do not fit in this share of the GPU's memory.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dict
        check_room(weights_bytes(shapes, dtype, compute_dtype(dtype).itemsize), device, memory_fraction)
        num_values, num_done = sum(map(prod, shapes.values())), 0
        weights: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            weights |= placed(name, file.get_tensor(name), device, dtype)
            num_done += prod(shape)
            progress(num_done / num_values)
    return weights


def placed(
    name: str, tensor: torch.Tensor, device: torch.device, dtype: WeightDtype
) -> dict[str, torch.Tensor]:
    """A tensor of the converted file as the model reads it on a GPU, by name."""
    if dtype is WeightDtype.FP8 and is_matrix(name):
        return quantised(name, tensor, device)
    return {name: tensor.to(device=device, dtype=compute_dtype(dtype))}


def compute_dtype(dtype: WeightDtype) -> torch.dtype:
    """See dtypes.computed_in."""
    found: torch.dtype = getattr(torch, computed_in(dtype))
    return found
