"""How kernels of a GPU are cut up; no GPU is needed for that."""

import pytest
import torch

from phasewise_kernels.paged_attention import cuda

H100, A100, L4 = 232_448, 166_912, 101_376


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "dtype", "num_stages"),
    [
        (H100, 128, torch.bfloat16, 4),
        (A100, 128, torch.bfloat16, 4),
        (L4, 128, torch.bfloat16, 2),
        (L4, 64, torch.float16, 4),
        (L4, 256, torch.bfloat16, 1),
        (H100, 96, torch.float32, 2),
        (49_152, 256, torch.float32, 1),
    ],
)
def test_chunks_have_as_many_stages_as_fit(
    monkeypatch: pytest.MonkeyPatch, shared_bytes: int, head_dim: int, dtype: torch.dtype, num_stages: int
) -> None:
    monkeypatch.setattr(cuda, "_shared_bytes", lambda _device: shared_bytes)
    tuning = cuda.chunk_tuning(torch.empty(1, 4, head_dim, dtype=dtype), block_m=128)
    assert tuning.num_stages == num_stages
