"""Gather and scatter against plain indexing."""

import pytest
import torch

from kvtransfer.layout import KvLayout
from kvtransfer.staging import CacheBytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_cache(dtype: torch.dtype, num_blocks: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    # [layers, K/V, blocks, block_size, heads, head_dim], odd sizes on purpose
    return torch.randn(5, 2, num_blocks, 3, 2, 7, generator=generator).to(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_read_gives_layer_then_k_and_v_then_block(name: str) -> None:
    cache = random_cache(DTYPES[name])
    payload = CacheBytes(cache).read([7, 0, 3], 1, 4)
    expected = cache[1:4][:, :, [7, 0, 3]].contiguous()
    assert bytes(payload) == expected.view(torch.uint8).numpy().tobytes()
    layout = KvLayout("d", name, 3, 5, 2, 7, "rope")
    assert len(payload) == layout.chunk_bytes(num_layers=3, num_blocks=3)


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_read_here_and_written_there_is_the_same_and_nothing_else_changes(name: str) -> None:
    source = random_cache(DTYPES[name])
    target = torch.zeros_like(source[:, :, :6]).contiguous()
    CacheBytes(target).write([5, 1], 2, 5, CacheBytes(source).read([0, 8], 2, 5))
    expected = torch.zeros_like(target)
    expected[2:5, :, [5, 1]] = source[2:5][:, :, [0, 8]]
    assert torch.equal(target, expected)


def test_a_payload_of_bytes_may_be_read_only() -> None:
    cache = random_cache(torch.float32)
    payload = bytes(CacheBytes(cache).read([2], 0, 1))
    CacheBytes(cache).write([4], 0, 1, memoryview(payload))
    assert torch.equal(cache[0, :, 4], cache[0, :, 2])


def test_what_was_read_does_not_follow_the_cache() -> None:
    cache = random_cache(torch.float32)
    payload = CacheBytes(cache).read([2], 0, 5)
    before = bytes(payload)
    cache.zero_()
    assert bytes(payload) == before


def test_a_payload_of_another_size_is_refused() -> None:
    staging = CacheBytes(random_cache(torch.float32))
    with pytest.raises(ValueError, match="reshape"):
        staging.write([1, 2], 0, 1, memoryview(bytes(12)))
