"""What holds for every codec: sizes, pages that stand alone, input that is refused, numbers of any magnitude."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs.codec import PAGE_TOKENS, Codec, CodecId, PageShape
from kvtransfer.codecs.codecs import codec
from tests.support.codec_kv import packed, realistic_kv, round_trip, shape_of

PACKING = [found for found in CodecId if found is not CodecId.NONE]
each_codec = pytest.mark.parametrize(
    "each", [codec(found) for found in PACKING], ids=[found.name.lower() for found in PACKING]
)
#: Largest error, as a share of the largest magnitude of the KV: of numbers spread evenly, worst case.
WORST = {CodecId.FP8: 0.04, CodecId.INT4_HADAMARD: 0.3, CodecId.GEAR: 0.5, CodecId.GEAR_L: 0.5}
FLOAT_MAX = torch.finfo(torch.float32).max


@each_codec
@settings(max_examples=25)
@given(
    num_layers=st.integers(1, 3),
    num_tokens=st.one_of(st.integers(1, 70), st.sampled_from([64, 127, 128, 129, 200])),
    num_heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    seed=st.integers(0, 1000),
)
def test_a_row_of_pages_is_its_pages_in_order_and_as_long_as_was_said(
    each: Codec, num_layers: int, num_tokens: int, num_heads: int, head_dim: int, seed: int
) -> None:
    kv = realistic_kv(num_tokens, num_heads, head_dim, num_layers=num_layers, seed=seed)
    whole = packed(each, kv)
    assert len(whole) == each.packed_bytes(shape_of(kv))
    pages = [
        kv[layer : layer + 1, :, token : token + PAGE_TOKENS]
        for layer in range(num_layers)
        for token in range(0, num_tokens, PAGE_TOKENS)
    ]
    assert b"".join(packed(each, page) for page in pages) == whole
    alone = torch.cat([round_trip(each, page) for page in pages], 2)
    assert torch.equal(
        alone.view(1, 2, num_layers, num_tokens, num_heads, head_dim).transpose(1, 2).squeeze(0),
        each.unpack(memoryview(whole), shape_of(kv)),
    )


@each_codec
@pytest.mark.parametrize("num_tokens", [15, 64, 150])
def test_more_than_is_worked_on_at_a_time_is_packed_alike(each: Codec, num_tokens: int) -> None:
    kv = realistic_kv(num_tokens, 8, 128, num_layers=3)
    kv = kv.repeat(1, 1, 4, 1, 1)
    whole = packed(each, kv)
    assert whole == b"".join(packed(each, kv[layer : layer + 1]) for layer in range(3))


@each_codec
def test_heads_of_grouped_queries_are_packed_each_by_itself(each: Codec) -> None:
    # 5 KV heads, as a model with grouped queries has: none is repeated, and none changes what becomes of another.
    kv = realistic_kv(80, num_heads=5)
    together = round_trip(each, kv)
    for head in range(5):
        assert torch.equal(together[:, :, :, head : head + 1], round_trip(each, kv[:, :, :, head : head + 1]))


@each_codec
def test_the_same_kv_gives_the_same_bytes_whatever_ran_before(each: Codec) -> None:
    kv = realistic_kv(100)
    torch.manual_seed(1)
    first = packed(each, kv)
    state = torch.random.get_rng_state()
    assert packed(each, kv) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert packed(each, kv) == first
    finally:
        torch.set_num_threads(num_threads)


@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_dtype_is_packed_as_the_numbers_it_holds(each: Codec, dtype: torch.dtype) -> None:
    kv = realistic_kv(70).to(dtype)
    kept = kv.clone()
    assert packed(each, kv) == packed(each, kv.float())
    assert torch.equal(kv, kept)
    unpacked = round_trip(each, kv)
    assert unpacked.dtype is torch.float32
    assert unpacked.is_contiguous()


@each_codec
def test_kv_may_lie_in_memory_in_any_order(each: Codec) -> None:
    kv = realistic_kv(70)
    elsewhere = kv.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    assert not elsewhere.is_contiguous()
    assert packed(each, elsewhere) == packed(each, kv)


@each_codec
@pytest.mark.parametrize("num_tokens", range(1, 66, 4))
def test_no_page_is_larger_than_in_fp16(each: Codec, num_tokens: int) -> None:
    for head_dim in (64, 96, 128):
        shape = PageShape(1, num_tokens, 3, head_dim)
        assert each.packed_bytes(shape) <= 2 * num_tokens * 3 * head_dim * 2 + 2 * 3


@each_codec
@pytest.mark.parametrize("num_tokens", [1, 20, 64, 65])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-4, 1.0, 1e6, 1e30, FLOAT_MAX])
def test_magnitudes_from_the_least_to_the_largest_stay_finite_and_near(
    each: Codec, num_tokens: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    kv = (2 * torch.rand((1, 2, num_tokens, 2, 64), generator=generator) - 1) * scale
    kv[0, :, 0, 0, 0] = scale
    found = round_trip(each, kv)
    assert found.isfinite().all()
    error = (found.double() - kv.double()).abs().max()
    assert error <= WORST[each.id] * scale + 1e-40


@each_codec
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-20, 60000.0, -FLOAT_MAX])
@pytest.mark.parametrize("num_tokens", [1, 40, 64])
def test_equal_numbers_come_back(each: Codec, value: float, num_tokens: int) -> None:
    kv = torch.full((2, 2, num_tokens, 2, 96), value)
    found = round_trip(each, kv)
    # Rotated, the numbers are one that is large and others that are zero, up to the rounding of their scale.
    relative = 2**-6 if each.id is CodecId.INT4_HADAMARD else 2**-9
    assert (found.double() - value).abs().max() <= abs(value) * relative


@each_codec
def test_a_head_without_a_number_beside_one_of_large_numbers_stays_zero(each: Codec) -> None:
    kv = realistic_kv(64)
    kv[:, :, :, 1] = 0
    assert round_trip(each, kv)[:, :, :, 1].eq(0).all()


@each_codec
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_tokens", [3, 64])
def test_nan_and_infinity_are_refused(each: Codec, bad: float, num_tokens: int) -> None:
    kv = realistic_kv(num_tokens)
    kv[1, 1, -1, 2, 63] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        packed(each, kv)


@each_codec
@pytest.mark.parametrize("num_extra", [-1, 1, 1000])
def test_another_size_is_refused(each: Codec, num_extra: int) -> None:
    kv = realistic_kv(70)
    expected = each.packed_bytes(shape_of(kv))
    other = memoryview(bytearray(expected + num_extra))
    message = f"{expected + num_extra} bytes were given .* takes {expected} packed"
    with pytest.raises(ValueError, match=message):
        each.unpack(other, shape_of(kv))
    with pytest.raises(ValueError, match=message):
        each.pack(kv, other)


@each_codec
def test_what_is_no_kv_is_refused(each: Codec) -> None:
    with pytest.raises(ValueError, match="num_layers, 2"):
        each.pack(torch.zeros(2, 3, 4, 1, 64), memoryview(b""))
    with pytest.raises(ValueError, match="fp32, fp16, bf16 or e4m3"):
        each.pack(torch.zeros(1, 2, 4, 1, 64, dtype=torch.float64), memoryview(b""))
    with pytest.raises(ValueError, match="head_dim 60"):
        each.packed_bytes(PageShape(1, 64, 1, 60))
    with pytest.raises(ValueError, match="empty"):
        each.packed_bytes(PageShape(1, 0, 1, 64))


@each_codec
@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_damaged_bytes_are_unpacked_to_something(each: Codec, seed: int) -> None:
    # Checksums are others' work; here nothing may raise or reach beyond the page.
    shape = PageShape(1, 70, 2, 64)
    size = (each.packed_bytes(shape),)
    damage = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert each.unpack(memoryview(damage.numpy()), shape).shape == (1, 2, 70, 2, 64)


def test_every_id_but_none_has_its_codec() -> None:
    assert [codec(found).id for found in PACKING] == PACKING
    with pytest.raises(ValueError, match="as they are"):
        codec(CodecId.NONE)
