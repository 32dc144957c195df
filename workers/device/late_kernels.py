"""Kernels that Triton compiles once a worker is ready: all its sequences wait meanwhile, so there should be none."""

import logging
import time

logger = logging.getLogger(__name__)


def watch_late_kernels(worker_id: str) -> None:
    """Log each kernel that is compiled in this process from now on, and how long that takes."""
    from triton import knobs

    began_s: dict[str, float] = {}

    def begin(*, key: str, **_: object) -> bool:
        began_s[key] = time.monotonic()
        # Not to be left out.
        return False

    def end(*, key: str, repr: str, **_: object) -> None:  # noqa: A002 - Triton's names
        taken_s = time.monotonic() - began_s.pop(key, time.monotonic())
        logger.warning(
            "kernel_compiled_late worker_id=%s seconds=%.3f kernel=%s reason=no step before the worker was ready needed it; "
            "running sequences waited",
            worker_id,
            taken_s,
            repr,
        )

    knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = begin, end
