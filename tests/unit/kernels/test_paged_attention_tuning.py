"""How kernels of a GPU are cut up; no GPU is needed for that."""

import pytest
import torch

from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from phasewise_kernels.kv_int4.rows import row_bytes
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
    query, k_cache = torch.empty(1, 4, head_dim, dtype=dtype), torch.empty(1, 16, 4, head_dim, dtype=dtype)
    assert cuda.chunk_tuning(query, k_cache, block_m=128).num_stages == num_stages


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "tile_tokens", "num_stages"),
    [(H100, 128, 128, 2), (A100, 128, 128, 2), (L4, 128, 64, 2), (H100, 64, 64, 4), (H100, 256, 32, 2)],
)
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, PACKED_DTYPE])
def test_what_is_converted_is_read_in_larger_tiles_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
    kv_dtype: torch.dtype,
    shared_bytes: int,
    head_dim: int,
    tile_tokens: int,
    num_stages: int,
) -> None:
    monkeypatch.setattr(cuda, "_shared_bytes", lambda _device: shared_bytes)
    query = torch.empty(1, 4, head_dim, dtype=torch.bfloat16)
    width = row_bytes(head_dim) if kv_dtype == PACKED_DTYPE else head_dim
    k_cache = torch.empty(1, 16, 4, width, dtype=torch.uint8).view(kv_dtype)
    tuning = cuda.chunk_tuning(query, k_cache, block_m=128)
    assert (tuning.tile_tokens, tuning.num_stages) == (tile_tokens, num_stages)


def fp8_cache(head_dim: int, stride: int = 0) -> torch.Tensor:
    """One block of 16 tokens. stride: of a token, where it is another one than they take."""
    stride = stride or 4 * head_dim
    memory = torch.empty(16 * stride, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return memory.as_strided((1, 16, 4, head_dim), (16 * stride, stride, head_dim, 1))


@pytest.mark.parametrize(
    ("cache", "num_rows", "is_read_so"),
    [
        (fp8_cache(128), 1, True),
        (fp8_cache(128), 16, True),
        (fp8_cache(128), 32, False),
        (fp8_cache(64), 4, False),
        (fp8_cache(256), 4, False),
        (fp8_cache(128, stride=528), 4, True),
        (fp8_cache(128, stride=520), 4, False),
        (torch.empty(1, 16, 4, 128, dtype=torch.bfloat16), 4, False),
    ],
)
def test_fp8_is_read_in_words_where_rows_are_few_and_words_lie_where_words_do(
    cache: torch.Tensor, num_rows: int, is_read_so: bool
) -> None:
    assert cuda.has_byte_tiles(cache, cache, num_rows) == is_read_so
    assert cuda.has_byte_tiles(cache, fp8_cache(128), num_rows) == is_read_so


def test_a_cache_that_begins_in_the_middle_of_a_word_is_not_read_in_words() -> None:
    memory = torch.empty(2 + 16 * 512, dtype=torch.uint8)[2:].view(torch.float8_e4m3fn)
    cache = memory.view(1, 16, 4, 128)
    assert not cuda.has_byte_tiles(cache, fp8_cache(128), 1)
    assert not cuda.has_byte_tiles(fp8_cache(128), cache, 1)
