"""Spans of a pool in memory of the host: read, written, pulled and checked, against plain indexing."""

from dataclasses import replace
from typing import Any

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan, span_bytes, span_of
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transports import in_process
from tests.support.kv_dtypes import PLAIN_DTYPES

LAYOUT = KvLayout("model", "float32", 4, 3, 6, 8, "rope")
SPAN = KvSpan((5, 6, 1, 8), 2, 11, 1, 3, 0, 6)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def pool_of(layout: KvLayout, num_blocks: int = 9, seed: int = 0) -> tuple[HostPool, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(pool_shape(layout, num_blocks), generator=generator)
    cache = values.to(torch_dtype(layout.dtype))
    return HostPool(cache, layout), cache


def index_of(layout: KvLayout, span: KvSpan) -> tuple[Any, ...]:
    """Of the span in the cache with its blocks and tokens flattened: [layer, 2, slot, head, dim]."""
    places = range(span.first_token, span.first_token + span.num_tokens)
    size = layout.block_size
    slots = torch.tensor([span.block_ids[at // size] * size + at % size for at in places], dtype=torch.int64)
    first = layout.heads[0]
    heads = slice(span.head_lo - first, span.head_hi - first)
    return slice(span.layer_lo, span.layer_hi), slice(None), slots, heads


def gathered(cache: torch.Tensor, layout: KvLayout, span: KvSpan) -> torch.Tensor:
    # As bytes: not every dtype can be indexed.
    rows = cache.view(torch.uint8).flatten(2, 3)
    return rows[index_of(layout, span)].contiguous().view(cache.dtype)


def as_bytes(values: torch.Tensor) -> bytes:
    return bytes(values.contiguous().view(-1).view(torch.uint8).numpy())


def read(pool: HostPool, span: KvSpan) -> tuple[bytes, int]:
    out = bytearray(span_bytes(span, pool.layout))
    checksum = pool.read(span, memoryview(out))
    return bytes(out), checksum


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize(
    "span",
    [
        SPAN,
        replace(SPAN, first_token=0, num_tokens=16),
        replace(SPAN, head_lo=2, head_hi=3),
        replace(SPAN, num_tokens=1, block_ids=(0,)),
        replace(SPAN, num_tokens=0),
        replace(SPAN, num_tokens=0, block_ids=()),
        replace(SPAN, layer_lo=2, layer_hi=2),
        replace(SPAN, head_lo=4, head_hi=4),
    ],
)
def test_read_gives_layer_then_k_and_v_then_token(dtype: str, span: KvSpan) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    pool, cache = pool_of(layout)
    expected = as_bytes(gathered(cache, layout, span))
    payload, checksum = read(pool, span)
    assert payload == expected
    assert checksum == google_crc32c.value(expected) == pool.checksum(span, "grpc")


@pytest.mark.parametrize("span", [SPAN, replace(SPAN, head_lo=1, head_hi=4)])
def test_write_changes_the_span_and_nothing_else(span: KvSpan) -> None:
    source, source_cache = pool_of(LAYOUT)
    target, target_cache = pool_of(LAYOUT, seed=1)
    expected = target_cache.clone().flatten(2, 3)
    expected[index_of(LAYOUT, span)] = gathered(source_cache, LAYOUT, span)
    payload, checksum = read(source, span)
    assert target.write(span, memoryview(payload), "float32") == checksum
    assert torch.equal(target_cache.flatten(2, 3), expected)


@st.composite
def pulls(draw: st.DrawFn) -> tuple[KvLayout, KvSpan, KvLayout, KvSpan]:
    """A span of one pool and where it goes in another of other blocks and other heads."""
    dtype = draw(st.sampled_from(sorted(PLAIN_DTYPES)))
    head_dim = draw(st.sampled_from([1, 3, 8, 64]))
    num_heads = draw(st.integers(1, 4))
    layer_lo, layer_hi = sorted(draw(st.tuples(st.integers(0, 3), st.integers(0, 3))))
    head_lo, head_hi = sorted(draw(st.tuples(st.integers(0, num_heads), st.integers(0, num_heads))))
    num_tokens = draw(st.integers(0, 30))
    sides: list[Any] = []
    for _ in range(2):
        block_size = draw(st.sampled_from([1, 2, 4, 5, 16]))
        held_lo, held_hi = draw(st.integers(0, head_lo)), draw(st.integers(max(head_hi, 1), num_heads))
        layout = KvLayout("model", dtype, block_size, 3, num_heads, head_dim, "rope", held_lo, held_hi)
        if layout.heads[0] >= layout.heads[1]:
            layout = replace(layout, head_lo=0, head_hi=0)
        first = draw(st.integers(0, block_size - 1))
        needed = -(-(first + num_tokens) // block_size)
        ids = draw(st.permutations(range(needed + 2)))[:needed] if draw(st.booleans()) else range(needed)
        sides += [layout, KvSpan(tuple(ids), first, num_tokens, layer_lo, layer_hi, head_lo, head_hi)]
    return tuple(sides)  # type: ignore[return-value]


@settings(max_examples=150, deadline=None)
@given(pulls())
def test_a_pull_between_any_two_pools_is_plain_indexing(
    case: tuple[KvLayout, KvSpan, KvLayout, KvSpan],
) -> None:
    source_layout, source, target_layout, into = case
    num_blocks = max([0, *source.block_ids, *into.block_ids]) + 1
    source_pool, source_cache = pool_of(source_layout, num_blocks)
    target_pool, target_cache = pool_of(target_layout, num_blocks, seed=1)
    wanted = gathered(source_cache, source_layout, source)
    expected = target_cache.clone().view(torch.uint8).flatten(2, 3)
    expected[index_of(target_layout, into)] = wanted.view(torch.uint8)
    mapped = in_process.open_pool(source_pool.offers[0].descriptor)
    checksum = mapped.pull(source, target_pool, into)
    assert torch.equal(target_cache.view(torch.uint8).flatten(2, 3), expected)
    assert checksum == google_crc32c.value(as_bytes(wanted)) == source_pool.checksum(source, "in_process")


@pytest.mark.parametrize("target_dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("source_dtype", PLAIN_DTYPES)
def test_every_pair_of_dtypes_converts_by_rounding_to_the_nearest(
    source_dtype: str, target_dtype: str
) -> None:
    source_layout = replace(LAYOUT, dtype=source_dtype, block_size=3)
    source, source_cache = pool_of(source_layout)
    # 465 would be NaN without saturation; ties and subnormals of each narrower dtype are among the others.
    edges = torch.tensor([465.0, -1e4, 448.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 2.0**-10, -0.0])
    source_cache[:, :, 2, 1, 0] = edges.to(torch_dtype(source_dtype))
    into = KvSpan((1, 7, 3), 1, 9, 1, 3, 0, 6)
    span = replace(into, block_ids=(2, 4, 5), first_token=0)
    wanted = gathered(source_cache, source_layout, span)
    target_layout = replace(LAYOUT, dtype=target_dtype)
    target, target_cache = pool_of(target_layout, seed=1)
    checksum = in_process.open_pool(source.offers[0].descriptor).pull(span, target, into)
    assert checksum == google_crc32c.value(as_bytes(wanted))
    found = gathered(target_cache, target_layout, into)
    values = wanted.double()
    if target_dtype == "float8_e4m3fn":
        values = values.clamp(-448, 448)
    assert as_bytes(found) == as_bytes(nearest(values, torch_dtype(target_dtype)))


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 rounded once, by search among all values of a narrow dtype; ties go to the even one."""
    if dtype is torch.float32:
        return values.float()
    as_int = torch.int8 if dtype.itemsize == 1 else torch.int16
    bits = torch.arange(2 ** (8 * dtype.itemsize - 1)).to(as_int)
    magnitudes = bits.view(dtype).double()
    bits, magnitudes = bits[magnitudes.isfinite()], magnitudes[magnitudes.isfinite()]
    above = torch.searchsorted(magnitudes, values.abs().contiguous()).clamp(1, len(bits) - 1)
    middle = (magnitudes[above - 1] + magnitudes[above]) / 2
    is_up = (values.abs() > middle) | ((values.abs() == middle) & (bits[above] % 2 == 0))
    found = bits[torch.where(is_up, above, above - 1)].view(dtype)
    sign = torch.signbit(values)
    return torch.where(sign, (found.view(as_int) ^ torch.iinfo(as_int).min), found.view(as_int)).view(dtype)


def test_not_a_number_and_infinity_keep_their_meaning_where_the_dtype_has_them() -> None:
    source, cache = pool_of(LAYOUT)
    cache[0, 0, 0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    span = KvSpan((0,), 0, 1, 0, 1, 0, 1)
    payload, _ = read(source, span)
    for dtype, expected in (("float16", float("inf")), ("float8_e4m3fn", 448.0)):
        target, target_cache = pool_of(replace(LAYOUT, dtype=dtype))
        target.write(span, memoryview(payload), "float32")
        found = target_cache[0, 0, 0, 0, 0, :3].float()
        assert found[0].isnan()
        assert found[1:].tolist() == [expected, -expected]


BAD_SPANS = {
    "blocks 5 to 9 of 9": replace(SPAN, block_ids=(5, 9, 6, 8)),
    "blocks -1 to 8 of 9": replace(SPAN, block_ids=(5, -1, 6, 8)),
    "do not fit 4 blocks of 4": replace(SPAN, num_tokens=15),
    "from place 4 on in blocks of 4": replace(SPAN, first_token=4),
    "from place -1 on": replace(SPAN, first_token=-1),
    "-1 tokens": replace(SPAN, num_tokens=-1),
    r"layers \[1, 4\) of 3": replace(SPAN, layer_hi=4),
    r"layers \[-1, 3\)": replace(SPAN, layer_lo=-1),
    r"layers \[3, 1\)": replace(SPAN, layer_lo=3, layer_hi=1),
    r"heads \[0, 7\)": replace(SPAN, head_hi=7),
    r"heads \[5, 2\)": replace(SPAN, head_lo=5, head_hi=2),
}


@pytest.mark.parametrize("message", BAD_SPANS)
def test_a_span_outside_of_the_pool_is_refused_by_each_method(message: str) -> None:
    span, (pool, cache) = BAD_SPANS[message], pool_of(LAYOUT)
    before, room = cache.clone(), memoryview(bytearray(20_000))
    mapped = in_process.open_pool(pool.offers[0].descriptor)
    other, _ = pool_of(replace(LAYOUT, dtype="float16"))
    for act in (
        lambda: pool.read(span, room),
        lambda: pool.checksum(span, "shm"),
        lambda: pool.write(span, room[: max(0, span_bytes(span, LAYOUT))], "float32"),
        lambda: mapped.pull(span, pool, SPAN),
        lambda: mapped.pull(SPAN, pool, span),
        lambda: mapped.pull(span, other, span),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    assert torch.equal(cache, before)


def test_heads_of_another_rank_are_refused() -> None:
    layout = replace(LAYOUT, head_lo=2, head_hi=4)
    pool, _ = pool_of(layout)
    assert pool.checksum(replace(SPAN, head_lo=2, head_hi=4), "shm") >= 0
    with pytest.raises(ValueError, match=r"heads \[1, 3\) of a pool that holds \[2, 4\)"):
        pool.checksum(replace(SPAN, head_lo=1, head_hi=3), "shm")


def test_payloads_of_another_size_or_dtype_are_refused() -> None:
    pool, cache = pool_of(LAYOUT)
    before, room = cache.clone(), bytearray(span_bytes(SPAN, LAYOUT))
    with pytest.raises(ValueError, match="bytes for a span of"):
        pool.read(SPAN, memoryview(room)[1:])
    for dtype in ("float32", "float16"):
        with pytest.raises(ValueError, match="bytes for a span of"):
            pool.write(SPAN, memoryview(room)[1:], dtype)
    with pytest.raises(ValueError, match="'int8' is none of"):
        pool.write(SPAN, memoryview(room), "int8")
    with pytest.raises(ValueError, match="not by cuda_ipc"):
        pool.checksum(SPAN, "cuda_ipc")
    mapped = in_process.open_pool(pool.offers[0].descriptor)
    with pytest.raises(ValueError, match=r"\[2, 11, 6\] at the source and \[2, 10, 6\] at the target"):
        mapped.pull(SPAN, pool, replace(SPAN, num_tokens=10))
    assert torch.equal(cache, before)


def test_a_tensor_that_is_not_what_the_layout_says_is_refused() -> None:
    good = torch.zeros(pool_shape(LAYOUT, 3))
    for bad in (good.half(), good[:, :, :, :, :3], good[0], good[:2]):
        with pytest.raises(ValueError, match="the KV cache is"):
            HostPool(bad, LAYOUT)
    with pytest.raises(ValueError, match="not contiguous"):
        HostPool(torch.zeros(pool_shape(LAYOUT, 6))[:, :, ::2], LAYOUT)
    memory = SharedMemory.create(good.nbytes)
    with pytest.raises(ValueError, match="does not lie in the shared memory"):
        HostPool(good, LAYOUT, memory)
    memory.close()


def test_a_span_of_a_sequence_reads_its_tokens() -> None:
    pool, cache = pool_of(LAYOUT)
    blocks = (8, 2, 5, 0)
    span = span_of(blocks, 4, tokens=(5, 14), layers=(0, 3), heads=(0, 6))
    rows = cache.flatten(2, 3)[:, :, [blocks[t // 4] * 4 + t % 4 for t in range(5, 14)]]
    assert read(pool, span)[0] == as_bytes(rows)


def test_a_pool_in_this_process_is_reachable_as_long_as_it_lives() -> None:
    pool, _ = pool_of(LAYOUT)
    target, _ = pool_of(LAYOUT, seed=1)
    descriptor = pool.offers[0].descriptor
    mapped = in_process.open_pool(descriptor)
    mapped.pull(SPAN, target, SPAN)
    assert not in_process.is_owner_gone(descriptor)
    del pool
    assert in_process.is_owner_gone(descriptor)
    with pytest.raises(ConnectionError, match="not there any more"):
        mapped.pull(SPAN, target, SPAN)
