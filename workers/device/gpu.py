"""The GPU of a worker: is it there, is it new enough, how much memory is free; and the weights on it."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from kvtransfer.transports.cuda_mapping import device_uuid
from workers.device.memory import GpuMemory
from workers.errors import GpuUnavailable, OutOfMemory

#: bfloat16 products, and what the kernels are compiled for. Measured are those of 9.0 (Hopper) alone.
MIN_CAPABILITY = (8, 0)


def open_gpu(index: int = 0, num_gpus: int = 1) -> torch.device:
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
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, one)) for one in (capability, MIN_CAPABILITY))
        raise GpuUnavailable(
            f"{torch.cuda.get_device_name(index)} has compute capability {have} and {need} is needed",
            "use a newer GPU or device cpu",
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
    dtype: torch.dtype,
    memory_fraction: float,
    progress: Callable[[float], None],
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, converted one by one: the host holds no copy of all.

    Raises OutOfMemory when they do not fit in this share of the GPU's memory.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        sizes = [_num_values(file.get_slice(name).get_shape()) for name in names]
        check_room(sum(sizes) * dtype.itemsize, device, memory_fraction)
        weights, num_done = {}, 0
        for name, size in zip(names, sizes, strict=True):
            weights[name] = file.get_tensor(name).to(device=device, dtype=dtype)
            num_done += size
            progress(num_done / sum(sizes))
    return weights


def _num_values(shape: list[int]) -> int:
    num = 1
    for size in shape:
        num *= size
    return num
