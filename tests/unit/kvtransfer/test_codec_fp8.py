"""e4m3, bit by bit, and its scales."""

import torch

from kvtransfer.codecs.fp8 import FP8, FP16_FACTOR, from_e4m3
from tests.support.codec_kv import realistic_kv, round_trip


def test_every_e4m3_number_is_read_as_torch_reads_it() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    expected = packed.view(torch.float8_e4m3fn).float()
    found = from_e4m3(packed.view(torch.int8)) * FP16_FACTOR
    is_number = expected.isfinite()
    assert int(is_number.sum()) == 254
    assert torch.equal(found[is_number], expected[is_number])


def test_no_number_is_off_by_more_than_half_a_step_and_the_largest_of_a_head_is_exact() -> None:
    kv = realistic_kv(100)
    found = round_trip(FP8, kv)
    largest = kv.abs().amax(4, keepdim=True)
    is_largest = kv.abs() == largest
    # Scales are fp16.
    assert ((found - kv).abs() <= kv.abs() * 2**-10)[is_largest].all()
    # 3 bits of fraction; below 2**-6, of a largest number of 448, steps are 2**-9.
    assert ((found - kv).abs() <= kv.abs() * (2**-4 + 2**-10) + largest * (2**-10 / 448)).all()


def test_a_token_of_small_numbers_keeps_them_beside_one_of_large_numbers() -> None:
    kv = realistic_kv(64)
    kv[:, :, 5] *= 1000
    kv[:, :, 6] /= 1000
    error = (round_trip(FP8, kv) - kv).norm(dim=4) / kv.norm(dim=4)
    assert error.max() < 0.05
