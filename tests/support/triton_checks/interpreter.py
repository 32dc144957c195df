"""Runs the checks of a module under Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def checks_of(module: str) -> dict[str, Callable[[str], None]]:
    """The functions `check_...` of this module, by name."""
    names = vars(sys.modules[module])
    return {name: value for name, value in names.items() if name.startswith("check_")}


def round_as_a_gpu() -> None:
    """What the interpreter computes is what a GPU does, and in half the time.

    The interpreter of Triton 3.6 cuts what bf16 and fp8 have no room for off, and does not round it to the nearest.

    Its numbers cannot be bounds of a `range` where numpy makes no scalar of an array of one.
    """
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtypes |= {"fp64": torch.float64, "fp8e4nv": torch.float8_e4m3fn}

    def convert(values: Any, source: Any, target: Any, rounding: object) -> Any:
        given = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8))
        converted = given.view(dtypes[source.name]).to(dtypes[target.name]).view(torch.uint8).numpy()
        return converted.view(f"u{target.primitive_bitwidth // 8}").reshape(values.shape)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        # Else every call of a function in a kernel puts in place anew what the kernel's has put there.
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        is_patched = seen and not any(tl.core.is_builtin(language.load) for language in seen)
        return interpreter._LangPatchScope() if is_patched else patch_language(function)

    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
    interpreter._patch_lang = patch_once


def main(module: str) -> int:
    """Run the checks of the module on the CPU; returns the exit status."""
    round_as_a_gpu()
    for name, check in checks_of(module).items():
        print(name, flush=True)
        check("cpu")
    return 0


def run_interpreted(module: str, timeout_s: float = 240) -> None:
    """In a process of its own: the variable is read when Triton is imported."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    ran = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
