"""Waiting for another thread for a short while without sleeping: to be woken takes longer than most kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from phasewise_kernels.jit import EXACT, kernel


def _typed_read(_typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001 - numba asks by name
    """What another thread wrote at `index` of an int64 array: read from memory at each call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(array, types.intp), generate


_read: Any = intrinsic(_typed_read)


@kernel(EXACT)
def tell_and_wait(
    flags: Any, own: int, own_value: int, other: int, goal: int, max_reads: int, more_reads: int
) -> None:
    """Write own_value to flags[own], then read flags[other] until it is `goal`, at most max_reads times.

    After that, more_reads more. flags: int64; a flag has a cache line of its own.
    """
    flags[own] = own_value
    for _ in range(max_reads):
        if _read(flags, other) >= goal:
            break
    for _ in range(more_reads):
        _read(flags, other)


def compile_all(step: Callable[[], None]) -> None:
    """Compile."""
    tell_and_wait(np.zeros(2, np.int64), 0, 0, 1, 0, 1, 0)
    step()
