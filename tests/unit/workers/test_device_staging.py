"""Arrays arrive as they were, side by side in one buffer."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workers.device.staging import ALIGNMENT, Staging, layout, views

ARRAYS = st.lists(
    st.sampled_from([np.int64, np.int32, np.float32]).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=2, min_side=0, max_side=9))
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(ARRAYS, min_size=1, max_size=5))
def test_each_step_gets_its_own(steps: list[list[np.ndarray]]) -> None:
    staging = Staging(torch.device("cpu"))
    found = [staging.upload(step) for step in steps]
    for step, tensors in zip(steps, found, strict=True):
        for array, tensor in zip(step, tensors, strict=True):
            assert tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0
            np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_buffer_is_reused_and_views_of_it_stay() -> None:
    staging = Staging(torch.device("cpu"))
    first = [np.arange(3), np.arange(4, dtype=np.int32)]
    buffer = torch.zeros(layout(first)[1], dtype=torch.uint8)
    kept = views(buffer, first)
    staging.upload([first[0] + 10, first[1] + 20], buffer)
    assert kept[0].tolist() == [10, 11, 12]
    assert kept[1].tolist() == [20, 21, 22, 23]


def test_arrays_that_are_not_contiguous_are_put_in_order() -> None:
    table = np.arange(12, dtype=np.int32).reshape(3, 4)[:, :2]
    (found,) = Staging(torch.device("cpu")).upload([table])
    assert found.tolist() == table.tolist()
