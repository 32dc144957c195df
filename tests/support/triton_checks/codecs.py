"""Packed pages made and read on a GPU or interpreted, against their specification and the codecs of the CPU."""

from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs.codec import CodecId, PageShape
from kvtransfer.codecs.codecs import codec as codec_of
from phasewise_kernels.block_copy.reference import TokenRows, convert, gather
from phasewise_kernels.kv_codec import op
from phasewise_kernels.kv_codec.reference import (
    CODECS,
    PageCodec,
    decode_reference,
    encode_reference,
    layer_bytes,
)
from phasewise_kernels.testing import poisoned_memory
from tests.support.block_copy_pools import bits_of, poisoned_pool, random_slots

IDS = {
    "fp8": CodecId.FP8,
    "int4_hadamard": CodecId.INT4_HADAMARD,
    "gear": CodecId.GEAR,
    "gear_l": CodecId.GEAR_L,
}
#: Of what comes back, to the largest number of a head: where a factor's fp16 rounds to the other side.
GEAR_TOLERANCE = 2e-3


def a_pool(dtype: torch.dtype, num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
    """Fresh numbers, in channels of different sizes, with a head of zeros, a constant one, and sizes far from 1."""
    num_blocks = -(-(num_tokens + 2) // 16) + 2
    x = torch.randn(3, 2, num_blocks, 16, num_heads, head_dim) * torch.rand(num_heads, head_dim) * 8
    x[1, 0, :, :, 0] = 0
    x[1, 1, :, :, 0] = 1.5
    x[2] *= 2.0 ** int(torch.randint(-12, 6, ()))
    return x.to(dtype)


def by_cpu(kv: torch.Tensor, codec: PageCodec) -> torch.Tensor:
    """The bytes of kvtransfer's codec."""
    shape = PageShape(kv.shape[0], *kv.shape[2:])
    out = bytearray(codec_of(IDS[codec]).packed_bytes(shape))
    codec_of(IDS[codec]).pack(kv.float(), memoryview(out))
    return torch.frombuffer(out, dtype=torch.uint8).view(len(kv), -1)


def encoded(rows: TokenRows, codec: PageCodec) -> op.Packed:
    """By the op on a GPU, else by what it launches there."""
    with poisoned_memory():
        if rows.kv_cache.device.type != "cpu":
            return op.encode_pages(rows, codec)
        packed = torch.empty(rows.shape[0], layer_bytes(codec, *rows.shape[2:]), dtype=torch.uint8)
        num_unusable = torch.zeros(1, dtype=torch.int32)
        op.launch(rows, codec, packed, num_unusable)
        return op.Packed(packed, num_unusable)


def decode(packed: torch.Tensor, rows: TokenRows, codec: PageCodec) -> None:
    """The same."""
    if rows.kv_cache.device.type != "cpu":
        op.decode_pages(packed, rows, codec)
    else:
        op.launch(rows, codec, packed, None)


def a_round(
    codec: PageCodec,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    target_dtype: torch.dtype = torch.float32,
) -> None:
    """Pack tokens of shuffled blocks, in some layers and heads; unpack them elsewhere; nothing else is touched."""
    pool = a_pool(dtype, num_tokens, num_heads + 1, head_dim)
    source = TokenRows(pool.to(device), random_slots(pool, num_tokens), (1, 3), (0, num_heads))
    found = encoded(source, codec)
    kv = gather(source).cpu()
    expected = encode_reference(kv.float(), codec)
    assert int(found.num_unusable) == 0
    pages = found.pages.cpu()
    assert pages.shape == expected.shape
    if codec in ("fp8", "int4_hadamard"):
        assert torch.equal(pages, expected)
        assert torch.equal(pages, by_cpu(kv, codec))
    else:
        # Of other factors, both readings differ by little; everything else is the same.
        ours, theirs = (
            decode_reference(p, codec, num_tokens, num_heads, head_dim) for p in (pages, expected)
        )
        limit = kv.float().abs().amax((2, 4), keepdim=True) * GEAR_TOLERANCE
        assert bool(((ours - theirs).abs() <= limit).all())
        assert float((pages != expected).float().mean()) < 0.03
    target_pool = poisoned_pool(
        target_dtype, num_layers=2, num_blocks=pool.shape[2], num_heads=num_heads + 2, head_dim=head_dim
    )
    target = TokenRows(
        target_pool.to(device), random_slots(target_pool, num_tokens, seed=1), (0, 2), (1, num_heads + 1)
    )
    decode(found.pages, target, codec)
    wanted = decode_reference(pages, codec, num_tokens, num_heads, head_dim)
    actual = gather(target).cpu()
    if codec in ("fp8", "int4_hadamard"):
        assert torch.equal(bits_of(actual), bits_of(convert(wanted, target_dtype)))
    else:
        # What is in bounds before it is rounded to the pool's dtype is so after it.
        error = 1e-2 * wanted.abs() + 1e-5
        low, high = (convert(end, target_dtype).float() for end in (wanted - error, wanted + error))
        assert bool(((low <= actual.float()) & (actual.float() <= high)).all())
    untouched = target.kv_cache.float().isnan()
    assert int(untouched.sum()) == untouched.numel() - np.prod(target.shape)


def check_pages_of_all_codecs(device: str) -> None:
    """Full and short pages, one token, one page and one token, head sizes."""
    for codec in CODECS:
        # Full pages are in the third.
        for num_tokens in (1, 16, 129) if device == "cpu" else (64, 1, 129, 45, 16):
            a_round(codec, num_tokens, 2, 64, device)
        a_round(codec, 100, 1, 128, device)
        a_round(codec, 65, 3, 16, device)


def check_dtypes(device: str) -> None:
    """Of both pools."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    pairs = tuple(zip(product(dtypes[:3], dtypes), CODECS * 3, strict=True))
    # Interpreted each codec, and each dtype, but not all pairs of these.
    for (dtype, target_dtype), codec in pairs[::5] + pairs[3:4] if device == "cpu" else pairs:
        a_round(codec, 70, 2, 64, device, dtype, target_dtype)


def check_what_no_codec_can_pack_is_counted(device: str) -> None:
    """NaN and infinity, in two pages' heads; the other pages are as ever."""
    for codec in CODECS:
        pool = a_pool(torch.bfloat16, 130, 2, 64)
        slots = random_slots(pool, 130)
        pool[1].view(2, -1, 2, 64)[0, int(slots[3]), 1, 5] = float("nan")
        pool[2].view(2, -1, 2, 64)[1, int(slots[129]), 0, 31] = -float("inf")
        source = TokenRows(pool.to(device), slots, (1, 3), (0, 2))
        assert int(encoded(source, codec).num_unusable) == 2


def check_odd_shapes(device: str) -> None:
    """Whatever hypothesis thinks of."""

    @settings(max_examples=6 if device == "cpu" else 20, deadline=None, database=None)
    @given(st.sampled_from(CODECS), st.integers(1, 140), st.sampled_from([(2, 64), (3, 16)]))
    def rounds(codec: PageCodec, num_tokens: int, shape: tuple[int, int]) -> None:
        a_round(codec, num_tokens, *shape, device)

    rounds()
