"""Block pools for tests of the GPU's copy, and its kernel under Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.support.block_copy_pools

runs the kernel on the CPU and compares it with the reference; it leaves with 0 when all agrees.
"""

import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.block_copy import op, reference
from phasewise_kernels.block_copy.reference import TokenRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def random_pool(
    dtype: torch.dtype,
    *,
    num_layers: int = 3,
    num_blocks: int = 12,
    block_size: int = 16,
    num_heads: int = 3,
    head_dim: int = 32,
    seed: int = 0,
) -> torch.Tensor:
    """Normal values on the CPU, the same for the same seed."""
    shape = (num_layers, 2, num_blocks, block_size, num_heads, head_dim)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def poisoned_pool(dtype: torch.dtype, **shape: int) -> torch.Tensor:
    """Every value NaN."""
    return torch.full_like(random_pool(dtype, **shape).float(), float("nan")).to(dtype)


def random_slots(kv_cache: torch.Tensor, num_tokens: int, seed: int = 0) -> NDArray[np.int64]:
    """Where the first `num_tokens` tokens of a sequence in shuffled blocks lie, from the third place on."""
    num_blocks, block_size = kv_cache.shape[2:4]
    blocks = np.random.default_rng(seed).permutation(num_blocks)
    places = np.arange(2, 2 + num_tokens)
    return blocks[places // block_size].astype(np.int64) * block_size + places % block_size


def bits_of(kv: torch.Tensor) -> torch.Tensor:
    """Equal for equal bytes, NaN included."""
    return kv.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Case:
    """What is copied from where to where."""

    dtype: torch.dtype
    source_block_size: int = 16
    target_block_size: int = 16
    num_tokens: int = 37
    head_dim: int = 32
    source_heads: tuple[int, int] = (0, 3)
    target_heads: tuple[int, int] = (0, 3)

    def rows(self, device: str = "cpu") -> tuple[TokenRows, TokenRows]:
        """Random source, poisoned target; layers 1 and 2 of the one become 0 and 1 of the other."""
        source = random_pool(self.dtype, block_size=self.source_block_size, head_dim=self.head_dim)
        target = poisoned_pool(
            self.dtype, block_size=self.target_block_size, head_dim=self.head_dim, num_layers=2
        )
        slots = random_slots(source, self.num_tokens)
        into = random_slots(target, self.num_tokens, seed=1)
        return (
            TokenRows(source.to(device), slots, (1, 3), self.source_heads),
            TokenRows(target.to(device), into, (0, 2), self.target_heads),
        )


KERNEL_CASES = (
    *(Case(dtype) for dtype in DTYPES),
    Case(torch.bfloat16, source_block_size=16, target_block_size=32, num_tokens=65),
    Case(torch.float16, source_block_size=8, target_block_size=4, num_tokens=1),
    Case(torch.float32, source_heads=(1, 3), target_heads=(0, 2)),
    Case(torch.float8_e4m3fn, head_dim=16, source_heads=(2, 3), target_heads=(1, 2)),
)


def interpret(case: Case, target_dtype: torch.dtype) -> None:
    """The kernel against the reference, on the CPU."""
    # Only where the interpreter is asked for: what it decorates is of no use to a GPU of the same process.
    from phasewise_kernels.block_copy import triton_kernel

    source, target = case.rows()
    expected = case.rows()[1]
    if target_dtype != case.dtype:
        target, expected = (
            TokenRows(rows.kv_cache.float().to(target_dtype), rows.slots, rows.layers, rows.heads)
            for rows in (target, expected)
        )
    checksum = reference.block_copy_reference(source, expected)
    view = op.words if target_dtype == case.dtype else op.numbers
    num_programs = 5
    partials = torch.zeros(num_programs, dtype=torch.int64)
    num_layers, _, num_tokens, *_ = source.shape
    triton_kernel.launch(
        view(source),
        view(target),
        torch.from_numpy(op.table_of(source, target)),
        partials,
        num_planes=2 * num_layers,
        num_tokens=num_tokens,
        row_vectors=source.row_bytes // reference.VECTOR_BYTES,
        num_programs=num_programs,
        tile_vectors=64,
        num_warps=4,
    )
    assert op.checksum_of(partials) == checksum, case
    assert torch.equal(bits_of(target.kv_cache), bits_of(expected.kv_cache)), (case, target_dtype)


if __name__ == "__main__":
    from tests.support.triton_checks.interpreter import round_as_a_gpu

    round_as_a_gpu()
    for kernel_case in KERNEL_CASES:
        interpret(kernel_case, kernel_case.dtype)
    for a_dtype, other_dtype in product(DTYPES, DTYPES):
        interpret(Case(a_dtype, source_block_size=8, target_heads=(0, 2), source_heads=(1, 3)), other_dtype)
    sys.exit(0)
