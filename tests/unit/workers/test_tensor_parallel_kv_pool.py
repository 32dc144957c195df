"""KV of all ranks as one pool: read and written as if one process held it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan, span_bytes
from kvtransfer.pool_tensor import pool_shape
from workers.tensor_parallel.kv_pool import GroupPool

LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=3, num_kv_heads=4, head_dim=2, position_encoding="r"
)
HEADS = {
    1: [(0, 4)],
    2: [(0, 2), (2, 4)],
    4: [(0, 1), (1, 2), (2, 3), (3, 4)],
    8: [(i // 2, i // 2 + 1) for i in range(8)],
}


def group_pool(
    degree: int, dtype: str = "float32", num_blocks: int = 6
) -> tuple[GroupPool, list[torch.Tensor]]:
    caches = [
        torch.full((3, 2, num_blocks, 4, hi - lo, 2), float("nan"), dtype=getattr(torch, dtype))
        for lo, hi in HEADS[degree]
    ]
    reach = [partial(torch.Tensor.view_as, one, one) for one in caches]
    return GroupPool(reach, HEADS[degree], replace(LAYOUT, dtype=dtype), num_blocks, lambda: None), caches


@given(
    degree=st.sampled_from([1, 2, 4, 8]),
    blocks=st.permutations(range(6)),
    first=st.integers(0, 3),
    num_tokens=st.integers(0, 20),
    layers=st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted),
    heads=st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 100),
)
def test_kv_of_a_group_is_read_and_written_as_that_of_one_pool(
    degree: int,
    blocks: list[int],
    first: int,
    num_tokens: int,
    layers: list[int],
    heads: list[int],
    dtype: str,
    seed: int,
) -> None:
    span = KvSpan(tuple(blocks), first, num_tokens, layers[0], layers[1], heads[0], heads[1])
    cache = torch.randn((3, 2, 6, 4, 4, 2), generator=torch.Generator().manual_seed(seed))
    whole_pool = HostPool(cache.to(getattr(torch, dtype)), replace(LAYOUT, dtype=dtype))
    payload = memoryview(bytearray(span_bytes(span, whole_pool.layout)))
    checksum = whole_pool.read(span, payload)
    pool, caches = group_pool(degree)
    assert pool.write(span, payload, dtype) == checksum
    read = memoryview(bytearray(span_bytes(span, pool.layout)))
    crc = pool.read(span, read)
    back = HostPool(torch.full((3, 2, 6, 4, 4, 2), float("nan")), LAYOUT)
    assert back.write(span, read, "float32") == crc
    out = memoryview(bytearray(len(read)))
    assert back.read(span, out) == crc
    assert out == read
    assert np.array_equal(
        np.frombuffer(read, np.float32),
        torch.frombuffer(payload, dtype=getattr(torch, dtype)).float().numpy()
        if len(payload)
        else np.zeros(0),
    )
    num_values = 2 * (layers[1] - layers[0]) * num_tokens * 2
    held = [max(0, min(hi, heads[1]) - max(lo, heads[0])) for lo, hi in HEADS[degree]]
    assert [int((~one.isnan()).sum()) for one in caches] == [num_values * num for num in held]


def test_a_group_keeps_kv_in_fp8_as_one_pool_does() -> None:
    name = "float8_e4m3fn"
    span = KvSpan((4, 0, 2), 1, 9, 0, 3, 0, 4)
    # Some are beyond what fp8 holds.
    source = HostPool((300 * torch.randn(3, 2, 6, 4, 4, 2)).bfloat16(), replace(LAYOUT, dtype="bfloat16"))
    payload = memoryview(bytearray(span_bytes(span, source.layout)))
    source.read(span, payload)
    whole = HostPool(torch.zeros(3, 2, 6, 4, 4, 2).to(torch.float8_e4m3fn), replace(LAYOUT, dtype=name))
    pool, _ = group_pool(2, name)
    found = []
    for one in (whole, pool):
        one.write(span, payload, "bfloat16")
        found.append(bytearray(span_bytes(span, one.layout)))
        one.read(span, memoryview(found[-1]))
    assert found[0] == found[1]
    assert torch.frombuffer(found[0], dtype=torch.float8_e4m3fn).float().abs().max() == 448


def test_a_group_keeps_kv_in_four_bits_as_one_pool_does() -> None:
    layout = replace(LAYOUT, dtype="int4", head_dim=16)
    span = KvSpan((4, 0, 2), 1, 9, 0, 3, 0, 4)
    wide = replace(layout, dtype="bfloat16")
    source = HostPool(torch.randn(pool_shape(wide, 6)).bfloat16(), wide)
    payload = memoryview(bytearray(span_bytes(span, wide)))
    source.read(span, payload)
    parts = [replace(layout, head_lo=lo, head_hi=hi) for lo, hi in HEADS[2]]
    caches = [torch.zeros(pool_shape(one, 6), dtype=torch.uint8) for one in parts]
    reach = [partial(torch.Tensor.view_as, one, one) for one in caches]
    pools = [
        HostPool(torch.zeros(pool_shape(layout, 6), dtype=torch.uint8), layout),
        GroupPool(reach, HEADS[2], layout, 6, lambda: None),
    ]
    found = []
    for one in pools:
        one.write(span, payload, "bfloat16")
        found.append(bytearray(span_bytes(span, one.layout)))
        one.read(span, memoryview(found[-1]))
    assert found[0] == found[1]
    assert any(found[0])


def test_nothing_is_written_before_what_rank_0_has_launched_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, caches = group_pool(2)
    waits = list[tuple[int, bool]]()

    def wait(index: int) -> None:
        waits.append((index, all(bool(one.isnan().all()) for one in caches)))

    monkeypatch.setattr(pool, "_wait", wait)
    span = KvSpan((0, 1), 0, 8, 0, 3, 0, 4)
    pool.write(span, memoryview(bytearray(span_bytes(span, LAYOUT))), "float32")
    assert waits[0] == (0, True)
    assert {index for index, was_untouched in waits if not was_untouched} == {0, 1}


def test_a_span_or_payload_that_does_not_fit_is_refused() -> None:
    pool, _ = group_pool(2)
    span = KvSpan((0, 1), 0, 8, 0, 3, 0, 4)
    with pytest.raises(ValueError, match="bytes for a span"):
        pool.read(span, memoryview(bytearray(3)))
    with pytest.raises(ValueError, match="bytes for a span"):
        pool.write(span, memoryview(bytearray(3)), "float32")
    with pytest.raises(ValueError, match="none of float32"):
        pool.write(span, memoryview(bytearray(3)), "int3")
    with pytest.raises(ValueError, match="do not fit"):
        pool.read(replace(span, num_tokens=9), memoryview(bytearray(9)))
    with pytest.raises(ValueError, match="are read by grpc, not by shm"):
        pool.checksum(span, "shm")
    assert pool.offers == ()
