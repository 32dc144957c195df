"""The helpers must themselves catch what they are for."""

import pytest
import torch

from phasewise_kernels.testing import Tolerance, assert_close, poison_empty, shape_id

EXACT = Tolerance(0.0, 0.0, "equal")


def test_poison_survives_a_masked_weight() -> None:
    assert torch.isnan(poison_empty((2, 3)) * 0).all()


def test_nan_is_not_close_to_nan() -> None:
    with pytest.raises(AssertionError):
        assert_close(poison_empty((1,)), poison_empty((1,)), EXACT)


def test_a_difference_of_dtype_is_a_failure() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.zeros(1), torch.zeros(1, dtype=torch.float64), EXACT)


def test_shape_ids_are_short() -> None:
    assert shape_id((3, 17)) == "3x17"
    assert shape_id([]) == "none"
    assert shape_id(5) == "5"
