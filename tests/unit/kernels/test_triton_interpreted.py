"""Triton kernels under Triton's interpreter, against their references: the checks that tests/gpu makes on a GPU."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.support.triton_checks.interpreter import Interpreter, interpreter

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves"),
]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    """For all modules."""
    with interpreter() as found:
        yield found


@pytest.mark.parametrize(
    "checks",
    [
        "paged_attention",
        "chunks",
        "small_ops",
        "linear_of_row",
        "fp8_linear",
        "codecs",
        "quantised",
        "sampling",
    ],
)
def test_the_kernels_equal_their_references_in_tritons_interpreter(
    checks: str, interpreted: Interpreter
) -> None:
    problem = interpreted.problem(f"tests.support.triton_checks.{checks}")
    assert problem == "", problem
