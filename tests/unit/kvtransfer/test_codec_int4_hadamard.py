"""The rotation, and what it is for."""

import pytest
import torch

from kvtransfer.codecs.int4_hadamard import INT4_HADAMARD, block_of, rotate
from kvtransfer.codecs.quantise import quantise
from tests.support.codec_kv import realistic_kv, round_trip


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's, over sqrt(size)."""
    matrix = torch.ones(1, 1)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix / size**0.5


@pytest.mark.parametrize(("head_dim", "block"), [(8, 8), (64, 64), (80, 16), (96, 32), (128, 64), (192, 64)])
def test_each_block_is_multiplied_by_the_hadamard_matrix(head_dim: int, block: int) -> None:
    assert block_of(head_dim) == block
    x = torch.randn((head_dim, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.block_diag(*[hadamard(block)] * (head_dim // block)) @ x
    rotated = rotate(x.clone(), block)
    assert (rotated - expected).abs().max() < 1e-5
    assert (rotate(rotated.clone(), block) - x).abs().max() < 1e-5


def test_a_column_is_rotated_to_the_same_bits_in_any_company() -> None:
    x = torch.randn((64, 1000), generator=torch.Generator().manual_seed(0))
    together = rotate(x.clone(), 64)
    for column in (0, 17, 999):
        alone = rotate(x[:, column : column + 1].clone(), 64)
        assert torch.equal(alone, together[:, column : column + 1])


def test_with_far_channels_the_error_is_smaller_than_without_the_rotation() -> None:
    kv = realistic_kv(128)
    plain = quantise(kv, 4, dim=4).numbers()
    rotated = round_trip(INT4_HADAMARD, kv)
    assert (rotated - kv).norm() < 0.8 * (plain - kv).norm()
