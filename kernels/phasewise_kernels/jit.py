"""Kernels compiled on the user's machine, by numba, for the processor that it has.

A file `kernel.py` of an op holds functions under `@kernel` and a `compile_all(step)` that calls each once, which
compiles it. Ops reach them by `load`, which answers None where numba cannot be used; ops then take torch's way.

Compiled code is kept beside the source in `__pycache__`, or, where that cannot be written, in the user's cache
folder (`~/.cache/numba` on Linux) or in `NUMBA_CACHE_DIR`, and is told apart by processor and source. Where
nothing can be written it is compiled in every process. numba's own threads are not used: see `threads.py`.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from threading import RLock
from typing import Any

_log = logging.getLogger(__name__)

#: What floating-point arithmetic may be changed in: the order of sums and fused products. NaN and infinity keep
#: their meaning.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
#: For functions whose order of operations matters.
EXACT = {"contract"}

#: Modules of kernels in the order in which they are compiled.
KERNEL_MODULES = (
    "phasewise_kernels.linear.kernel",
    "phasewise_kernels.paged_attention.kernel",
    "phasewise_kernels.handover.kernel",
    "phasewise_kernels.rms_norm.kernel",
    "phasewise_kernels.rope_write.kernel",
    "phasewise_kernels.swiglu.kernel",
    "phasewise_kernels.kv_copy.kernel",
)

_lock = RLock()
_loaded: dict[str, Any] = {}


def kernel(fastmath: set[str], *, is_inlined: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compiled at the first call, runs without the interpreter's lock.

    is_inlined: for what other kernels call, in the same file: a call that stays one would count references of
    each array, atomically.
    """
    # Takes half a second, and may be missing.
    from numba import njit

    compiled: Any = njit
    # A division by zero gives what floats give: a check for it would keep a loop from being vectorised. numba does
    # not see a change of these options: delete compiled code (`*.nbi`) after one.
    options = {"nogil": True, "fastmath": fastmath, "forceinline": is_inlined, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return compiled(cache=not is_inlined, **options)(function)
        except RuntimeError as error:  # numba's answer when no folder for compiled code can be written
            _log.warning("kernel_cache_off kernel=%s reason=%s", function.__name__, error)
            return compiled(**options)(function)

    return decorate


def load(name: str) -> Any:
    """The compiled module `name`, of KERNEL_MODULES, or None when it cannot be had; compiles at the first call."""
    found = _loaded.get(name, _loaded)
    return _load(name, lambda: None) if found is _loaded else found


def warm_up(on_progress: Callable[[str, float], None]) -> bool:
    """Compile all kernels, or load what was compiled before; returns whether they can be used.

    on_progress(what, done) is called with done from 0 to 1. Takes a quarter of a minute on a machine that has
    not compiled them yet, else a second.
    """
    for number, name in enumerate(KERNEL_MODULES):
        op = name.split(".")[1]
        steps = 0

        def step(op: str = op, number: int = number) -> None:
            nonlocal steps
            steps += 1
            done = number + 1 - 0.8**steps
            on_progress(f"compile {op}", done / len(KERNEL_MODULES))

        if _load(name, step) is None:
            on_progress("compile", 1.0)
            return False
    on_progress("compile", 1.0)
    return True


def _load(name: str, step: Callable[[], None]) -> Any:
    is_stopped = False

    def tell() -> None:
        # What it raises ends the compilation, and says nothing of the compiler.
        nonlocal is_stopped
        is_stopped = True
        step()
        is_stopped = False

    with _lock:
        if name not in _loaded:
            try:
                module = import_module(name)
                module.compile_all(tell)
            except Exception as error:
                if is_stopped:
                    raise
                _log.warning("kernels_off module=%s reason=%r; slower ways of torch are used", name, error)
                _loaded[name] = None
            else:
                _loaded[name] = module
        return _loaded[name]
