"""Packed pages on the CPU: the specification against the codecs of kvtransfer, the op against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs.codec import PageShape
from kvtransfer.codecs.codecs import codec as codec_of
from phasewise_kernels.block_copy.reference import TokenRows, gather
from phasewise_kernels.kv_codec.op import decode_pages, encode_pages
from phasewise_kernels.kv_codec.reference import (
    CODECS,
    PageCodec,
    decode_reference,
    encode_reference,
    layer_bytes,
)
from phasewise_kernels.quantised_attention.op import quantised_attention
from tests.support.block_copy_pools import poisoned_pool, random_pool, random_slots
from tests.support.triton_checks.codecs import GEAR_TOLERANCE, IDS, a_pool, by_cpu


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    num_tokens=st.integers(1, 150),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 64, 80, 96, 128]),
    seed=st.integers(0, 2**32),
)
def test_the_specification_gives_the_bytes_of_the_codecs(
    codec: PageCodec, num_tokens: int, num_heads: int, head_dim: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kv = a_pool(torch.float32, num_tokens, num_heads, head_dim)[:, :, 0:1].flatten(2, 3)
    kv = torch.cat([kv] * (num_tokens // 16 + 1), 2)[:, :, :num_tokens].contiguous()
    packed, shape = by_cpu(kv, codec), PageShape(len(kv), num_tokens, num_heads, head_dim)
    assert packed.shape == (len(kv), layer_bytes(codec, num_tokens, num_heads, head_dim))
    ours = decode_reference(packed, codec, num_tokens, num_heads, head_dim)
    theirs = codec_of(IDS[codec]).unpack(memoryview(packed.numpy()), shape)
    if codec in ("fp8", "int4_hadamard"):
        assert torch.equal(encode_reference(kv, codec), packed)
        assert torch.equal(ours, theirs)
        return
    # Products of matrices are added in another order.
    limit = kv.abs().amax((2, 4), keepdim=True) * GEAR_TOLERANCE
    again = decode_reference(encode_reference(kv, codec), codec, num_tokens, num_heads, head_dim)
    assert bool(((ours - theirs).abs() <= limit).all())
    assert bool(((again - theirs).abs() <= limit).all())


@pytest.mark.parametrize("codec", CODECS)
def test_pages_come_back_where_they_belong_and_nothing_else_is_touched(codec: PageCodec) -> None:
    source_pool, target_pool = random_pool(torch.bfloat16), poisoned_pool(torch.float32, num_layers=2)
    source = TokenRows(source_pool, random_slots(source_pool, 100), (1, 3), (0, 2))
    target = TokenRows(target_pool, random_slots(target_pool, 100, seed=1), (0, 2), (1, 3))
    packed = encode_pages(source, codec)
    assert int(packed.num_unusable) == 0
    assert torch.equal(packed.pages, encode_reference(gather(source), codec))
    decode_pages(packed.pages, target, codec)
    assert torch.equal(gather(target), decode_reference(packed.pages, codec, 100, 2, 32))
    assert int((~target_pool.isnan()).sum()) == gather(target).numel()


def test_what_no_codec_can_pack_is_counted_and_wrong_sizes_are_refused() -> None:
    pool = random_pool(torch.float32)
    rows = TokenRows(pool, random_slots(pool, 20), (0, 2), (0, 2))
    pool.view(3, 2, -1, 3, 32)[1, 1, int(rows.slots[3]), 1, 0] = float("inf")
    packed = encode_pages(rows, "fp8")
    assert int(packed.num_unusable) == 1
    with pytest.raises(ValueError, match="and should be"):
        decode_pages(packed.pages[:, 1:].contiguous(), rows, "fp8")
    with pytest.raises(ValueError, match="no multiple of 8"):
        encode_pages(TokenRows(pool[..., :6].contiguous(), rows.slots, (0, 1), (0, 1)), "fp8")


@pytest.mark.parametrize("codec", CODECS)
def test_attention_over_packed_pages_is_near_attention_over_what_was_packed(codec: PageCodec) -> None:
    num_tokens, generator = 150, torch.Generator().manual_seed(0)
    kv = torch.randn(1, 2, num_tokens, 2, 64, generator=generator)
    pages = encode_reference(kv[:, :, :128], codec).view(2, -1)
    tail = tuple(torch.zeros(1, 64, 2, 64) for _ in "kv")
    for one, whole in zip(tail, kv[0], strict=True):
        one[0, :22] = whole[128:]
    query = torch.randn(1, 4, 64, generator=generator)
    table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([num_tokens], dtype=torch.int32)
    actual = quantised_attention(query, pages, table, lens, tail, codec=codec)
    k, v = (one.repeat_interleave(2, dim=1).transpose(0, 1) for one in kv[0])
    expected = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), k, v).transpose(0, 1)
    error = float((actual - expected).norm() / expected.norm())
    assert error < {"fp8": 0.05, "int4_hadamard": 0.15, "gear": 0.6, "gear_l": 0.7}[codec]
    with pytest.raises(ValueError, match="a page of"):
        quantised_attention(query, pages[:, 2:], table, lens, tail, codec=codec)
