"""The management library of NVIDIA's driver, loaded when it is first needed: not every machine has one."""

from typing import Any


class NvmlUnavailable(Exception):  # noqa: N818 - named by what happened
    """NVML cannot be used here; the text says why and what to do."""


def open_nvml() -> Any:
    """The module pynvml (nvidia-ml-py), initialised; it counts, and stays so until the process ends. Raises NvmlUnavailable."""
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        problem = (
            f"NVML does not start ({error}); it comes with NVIDIA's driver, and containers need it mounted"
        )
        raise NvmlUnavailable(problem) from error
    return pynvml
