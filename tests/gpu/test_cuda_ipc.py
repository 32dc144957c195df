"""CUDA IPC between two processes of one GPU, and its kernel against the reference.

    python -m pytest tests/gpu -q

needs torch with CUDA, Triton and numpy; the tests of `read` and `write` also google-crc32c.
"""

import time
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch

from kvtransfer.errors import PoolUnreachable
from kvtransfer.layout import DTYPE_BITS
from kvtransfer.pool import span_bytes
from kvtransfer.transports.cuda_ipc import CudaPool, MappedCudaPool, is_owner_gone, open_pool
from phasewise_kernels.block_copy import op
from phasewise_kernels.block_copy.op import block_checksum, block_copy, checksum_of, start_block_copy
from phasewise_kernels.block_copy.reference import (
    TokenRows,
    block_copy_reference,
    checksum_reference,
    convert,
)
from phasewise_kernels.kv_int4.op import PACKED_DTYPE, values_of
from tests.support.block_copy_pools import DTYPES as KV_DTYPES
from tests.support.block_copy_pools import KERNEL_CASES, Case, bits_of, random_pool
from tests.support.cuda_layouts import NUM_BLOCKS, a_span, kept_in, layout_of, pool_tensor, values_in
from tests.support.cuda_owner import BOUND_S, Owner, an_owner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
DTYPES = tuple(DTYPE_BITS)


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    with an_owner() as process:
        yield process


@pytest.fixture
def opened() -> Iterator[list[MappedCudaPool]]:
    """Closes what is put into it."""
    pools: list[MappedCudaPool] = []
    yield pools
    for pool in pools:
        pool.close()


def a_target(dtype: str, block_size: int = 16) -> tuple[CudaPool, torch.Tensor]:
    """Every value NaN."""
    layout = layout_of(dtype, block_size, (1, 4))
    like = pool_tensor(layout, 0)
    if like.dtype == PACKED_DTYPE:
        kv_cache = torch.full_like(like, 0xFF).cuda()
    else:
        kv_cache = torch.full_like(like.float(), float("nan")).to(like.dtype).cuda()
    return CudaPool(kv_cache, layout), kv_cache


def assert_only(kv_cache: torch.Tensor, expected: torch.Tensor) -> None:
    """As many values as were expected are there; the rest is NaN as before."""
    values, wanted = (values_of(one, torch.float32) for one in (kv_cache, expected))
    assert int((~values.isnan()).sum()) == wanted.numel()


# The kernel.


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_kernel_equals_the_reference(case: Case) -> None:
    source, target = case.rows("cuda")
    expected_source, expected = case.rows()
    checksum = block_copy_reference(expected_source, expected)
    assert block_copy(source, target) == checksum == block_checksum(source)
    assert torch.equal(bits_of(target.kv_cache.cpu()), bits_of(expected.kv_cache))
    _, unchecked = case.rows("cuda")
    start_block_copy(source, unchecked, is_checked=False)
    assert torch.equal(bits_of(unchecked.kv_cache), bits_of(target.kv_cache))


@pytest.mark.parametrize("tile_vectors", [64, 512, 2048])
def test_how_the_work_is_cut_up_changes_nothing(tile_vectors: int) -> None:
    source, target = KERNEL_CASES[0].rows("cuda")
    tuning = op.Tuning(tile_vectors=tile_vectors, num_warps=2, programs_per_sm=1)
    assert checksum_of(start_block_copy(source, target, tuning=tuning)) == block_checksum(source)


@pytest.mark.parametrize(("dtype", "target_dtype"), list(product(KV_DTYPES, KV_DTYPES)), ids=str)
def test_a_conversion_is_as_the_reference_and_has_the_checksum_of_what_was_read(
    dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    source, like = Case(dtype, source_block_size=8).rows("cuda")
    target = TokenRows(like.kv_cache.float().to(target_dtype), like.slots, like.layers, like.heads)
    expected = TokenRows(target.kv_cache.cpu(), like.slots, like.layers, like.heads)
    block_copy_reference(Case(dtype, source_block_size=8).rows()[0], expected)
    assert block_copy(source, target) == block_checksum(source)
    assert torch.equal(bits_of(target.kv_cache.cpu()), bits_of(expected.kv_cache))


@pytest.mark.parametrize(
    ("dtype", "own_dtype"), [("int4", "int4"), ("int4", "bfloat16"), ("bfloat16", "int4")]
)
def test_rows_in_four_bits_that_are_whole_vectors_go_by_the_kernel(dtype: str, own_dtype: str) -> None:
    """Of all four heads, 96 bytes; those of three are none."""
    layouts = [layout_of(name, size, (0, 4)) for name, size in ((dtype, 16), (own_dtype, 32))]
    caches = [pool_tensor(one, i) for i, one in enumerate(layouts)]
    spans = [a_span(one, seed=i, heads=(0, 4)) for i, one in enumerate(layouts)]
    source, target = (CudaPool(cache.cuda(), one) for cache, one in zip(caches, layouts, strict=True))
    rows, into = source.rows(spans[0]), target.rows(spans[1])
    assert op._is_in_vectors(rows)
    assert op._is_in_vectors(into)
    kept = kept_in(caches[0], layouts[0], spans[0])
    assert block_copy(rows, into) == checksum_reference(bits_of(kept).numpy().tobytes())
    found = kept_in(target.rows(spans[1]).kv_cache, layouts[1], spans[1])
    assert torch.equal(bits_of(found), bits_of(convert(kept, found.dtype)))


def test_a_pool_of_billions_of_words_is_addressed_rightly() -> None:
    # 16 GiB: more words than 32 bits count.
    num_blocks = 1 << 21
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("the GPU has not 20 GiB free")
    pool = torch.zeros((1, 2, num_blocks, 16, 1, 128), dtype=torch.bfloat16, device="cuda")
    slots = np.array([num_blocks * 16 - 1, 5, num_blocks * 8], np.int64)
    content = random_pool(torch.bfloat16, num_layers=1, num_blocks=1, num_heads=1, head_dim=128).cuda()
    source = TokenRows(content, np.arange(3, dtype=np.int64), (0, 1), (0, 1))
    target = TokenRows(pool, slots, (0, 1), (0, 1))
    assert block_copy(source, target) == block_checksum(target) == block_checksum(source)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(pool[0, :, slot // 16, slot % 16], content[0, :, 0, token])


# Two processes.


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("dtype", "own_dtype"), list(product(DTYPES, DTYPES)))
def test_a_pull_brings_the_values_and_the_checksum_that_the_owner_announces(
    owner: Owner, opened: list[MappedCudaPool], dtype: str, own_dtype: str, block_size: int
) -> None:
    layout = layout_of(dtype)
    number, descriptor = owner.ask("make", layout, 11)
    opened.append(open_pool(descriptor))
    target, kv_cache = a_target(own_dtype, block_size)
    poison = kv_cache.clone()
    for tokens in ((0, 1), (3, 40), (16, 48), (15, 97)):
        kv_cache.copy_(poison)
        span, into = a_span(layout, tokens), a_span(target.layout, tokens, seed=6)
        announced = owner.ask("checksum", number, span)
        assert opened[0].pull(span, target, into) == announced
        expected = convert(kept_in(pool_tensor(layout, 11), layout, span), kv_cache.dtype)
        assert torch.equal(bits_of(kept_in(kv_cache, target.layout, into)), bits_of(expected))
        assert_only(kv_cache, expected)


def test_several_pools_of_one_allocation_are_told_apart(owner: Owner, opened: list[MappedCudaPool]) -> None:
    # Small ones: torch puts them into one allocation, and its handle is opened more than once.
    layout = layout_of("float8_e4m3fn")
    target, kv_cache = a_target("float8_e4m3fn")
    span, into = a_span(layout), a_span(target.layout)
    for seed in range(3):
        _, descriptor = owner.ask("make", layout, seed)
        opened.append(open_pool(descriptor))
    opened[1].close()
    for seed in (0, 2):
        opened[seed].pull(span, target, into)
        expected = values_in(pool_tensor(layout, seed), layout, span)
        assert torch.equal(values_in(kv_cache, target.layout, into), expected)


def test_a_bit_that_is_changed_after_the_announcement_is_seen(
    owner: Owner, opened: list[MappedCudaPool]
) -> None:
    layout = layout_of("bfloat16")
    number, descriptor = owner.ask("make", layout, 3)
    opened.append(open_pool(descriptor))
    target, _ = a_target("bfloat16")
    span, into = a_span(layout), a_span(target.layout)
    announced = owner.ask("checksum", number, span)
    # A byte of the first token: layer 1, K, its block and place, head 1.
    slot = span.block_ids[0] * layout.block_size + span.first_token
    row = 2 * NUM_BLOCKS * layout.block_size + slot
    byte = (row * layout.num_heads + 1) * layout.head_dim * 2 + 5
    owner.ask("flip", number, byte)
    assert opened[0].pull(span, target, into) != announced
    owner.ask("flip", number, byte)
    assert opened[0].pull(span, target, into) == announced


def test_an_owner_that_is_killed_costs_bounded_time_and_no_wrong_byte() -> None:
    layout = layout_of("bfloat16")
    target, kv_cache = a_target("bfloat16")
    span, into = a_span(layout), a_span(target.layout)
    expected = values_in(pool_tensor(layout, 4), layout, span)
    with an_owner() as owner:
        number, descriptor = owner.ask("make", layout, 4)
        announced = owner.ask("checksum", number, span)
        pool = open_pool(descriptor)
        try:
            assert pool.pull(span, target, into) == announced
            assert not is_owner_gone(descriptor)
            owner.kill()
            began_s = time.monotonic()
            assert is_owner_gone(descriptor)
            try:
                # The driver keeps memory that somebody has mapped; were it otherwise, this must not be silent.
                if pool.pull(span, target, into) == announced:
                    assert torch.equal(values_in(kv_cache, target.layout, into), expected)
            except ConnectionError:
                pass
            with pytest.raises(PoolUnreachable):
                open_pool(descriptor).close()
        finally:
            pool.close()
        assert time.monotonic() - began_s < BOUND_S, "it hung"
    with pytest.raises(PoolUnreachable):
        open_pool(descriptor).close()


def test_a_process_does_not_open_its_own_pool(owner: Owner) -> None:
    number, _ = owner.ask("make", layout_of("float32"), 0)
    assert "this same process" in owner.ask("reopen", number)


# Through the host.


def test_what_is_written_is_read_again(owner: Owner, opened: list[MappedCudaPool]) -> None:
    google_crc32c = pytest.importorskip("google_crc32c", reason="google-crc32c is not installed")
    layout = layout_of("float32")
    source = CudaPool(pool_tensor(layout, 8).cuda(), layout)
    span = a_span(layout)
    payload = bytearray(span_bytes(span, layout))
    assert source.read(span, memoryview(payload)) == google_crc32c.value(bytes(payload))
    assert source.checksum(span, "cuda_ipc") == checksum_reference(bytes(payload))
    for dtype in DTYPES:
        target, kv_cache = a_target(dtype, 32)
        into = a_span(target.layout, seed=6)
        assert target.write(into, memoryview(payload), "float32") == google_crc32c.value(bytes(payload))
        expected = convert(kept_in(pool_tensor(layout, 8), layout, span), kv_cache.dtype)
        assert torch.equal(bits_of(kept_in(kv_cache, target.layout, into)), bits_of(expected))
        assert_only(kv_cache, expected)


def test_kernels_compile_ahead() -> None:
    target, _ = a_target("bfloat16")
    target.warm_up()
