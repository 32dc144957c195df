"""Runs the checks of modules under Triton's interpreter."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
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


def main() -> int:
    """For each module that stdin names, answer with what went wrong with its checks on the CPU: a line of JSON, empty if nothing did."""
    # Settings of hypothesis.
    import_module("tests.conftest")
    import torch

    round_as_a_gpu()
    for line in sys.stdin:
        module, problem = line.strip(), ""
        import_module(module)
        try:
            with redirect_stdout(sys.stderr):
                for name, check in checks_of(module).items():
                    print(name)
                    # The same numbers whichever checks came before.
                    torch.manual_seed(0)
                    check("cpu")
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps([module, problem]), flush=True)
    return 0


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A process of its own, as the variable is read when Triton is imported; one for all modules, as that takes a while."""

    process: "subprocess.Popen[str]"

    def problem(self, module: str) -> str:
        """What went wrong with the checks of this module."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(module, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            return "it has ended"
        # After a test that did not wait for its own answer the next one would get that.
        of, found = json.loads(answer)
        assert of == module, f"the answer is for {of}"
        return str(found)


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """Killed at the end."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Interpreter(process)
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
