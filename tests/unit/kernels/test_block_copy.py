"""The copy between pools of a GPU: its reference against definitions, its kernel (interpreted) against the reference."""

import importlib.util
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phasewise_kernels.block_copy import reference
from phasewise_kernels.block_copy.op import block_checksum, block_copy, checksum_of, start_block_copy
from phasewise_kernels.block_copy.reference import TokenRows, checksum_reference, contiguous_rows
from tests.support.block_copy_pools import (
    DTYPES,
    KERNEL_CASES,
    Case,
    bits_of,
    poisoned_pool,
    random_pool,
    random_slots,
)

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def payload_of(rows: TokenRows) -> bytes:
    """In the order of the wire, by indexing alone."""
    block_size = rows.kv_cache.shape[3]
    tokens = [
        rows.kv_cache[layer, kv, slot // block_size, slot % block_size, slice(*rows.heads)]
        for layer, kv, slot in product(range(*rows.layers), range(2), rows.slots.tolist())
    ]
    return torch.stack(tokens).view(torch.uint8).numpy().tobytes()


def checksum_of_bytes(payload: bytes) -> int:
    return checksum_of(reference.partial_checksums(torch.frombuffer(bytearray(payload), dtype=torch.uint8)))


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_bytes_arrive_and_nothing_else_is_touched(case: Case) -> None:
    source, target = case.rows()
    checksum = block_copy(source, target)
    assert checksum == checksum_reference(payload_of(source)) == block_checksum(source)
    assert payload_of(target) == payload_of(source)
    untouched = target.kv_cache.float().isnan()
    assert untouched.sum() == untouched.numel() - np.prod(target.shape)


@pytest.mark.parametrize(("dtype", "target_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_dtypes_are_converted_as_one_value_alone(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    source_pool, target_pool = random_pool(dtype), poisoned_pool(target_dtype, block_size=32)
    source = TokenRows(source_pool, random_slots(source_pool, 21), (0, 3), (1, 3))
    target = TokenRows(target_pool, random_slots(target_pool, 21, seed=1), (0, 3), (0, 2))
    assert block_copy(source, target) == checksum_reference(payload_of(source))
    expected = reference.gather(source).float().to(target_dtype)
    assert torch.equal(bits_of(reference.gather(target)), bits_of(expected))


def test_what_fp8_cannot_hold_saturates_and_nan_stays() -> None:
    values = torch.tensor([449.0, -1e30, float("inf"), float("nan"), 1.0])
    converted = reference.convert(values, torch.float8_e4m3fn).float()
    assert converted[[0, 1, 2, 4]].tolist() == [448, -448, 448, 1]
    assert converted[3].isnan()


@given(st.binary(min_size=1, max_size=70))
def test_the_checksum_in_torch_is_the_one_that_is_defined(payload: bytes) -> None:
    assert checksum_of_bytes(payload) == checksum_reference(payload)


@pytest.mark.parametrize("num_bytes", [16, 47, 48, 49, 200])
def test_a_checksum_of_several_pieces_is_that_of_one(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    payload = bytes(range(num_bytes))
    monkeypatch.setattr(reference, "_PIECE_VECTORS", 3)
    assert checksum_of_bytes(payload) == checksum_reference(payload)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_single_wrong_byte_is_always_seen(payload: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(payload) - 1))
    changed = bytearray(payload)
    changed[place] ^= data.draw(st.integers(1, 255))
    assert checksum_of_bytes(bytes(changed)) != checksum_of_bytes(payload)


def test_two_pieces_in_each_others_place_are_seen() -> None:
    payload = torch.randint(0, 256, (64 * 16,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pieces = payload.view(64, 16)
    checksum = checksum_of(reference.partial_checksums(payload))
    for one, other in combinations(range(64), 2):
        order = list(range(64))
        order[one], order[other] = other, one
        assert checksum_of(reference.partial_checksums(pieces[order])) != checksum
    # And words of one vector, which share their coefficient.
    words = payload.view(torch.int32).view(-1, 4)
    for one, other in combinations(range(4), 2):
        order = list(range(4))
        order[one], order[other] = other, one
        assert checksum_of(reference.partial_checksums(words[:, order].contiguous())) != checksum


def test_parts_of_a_checksum_add_up() -> None:
    kv = random_pool(torch.float32)[:, :, 0].contiguous()
    parts = []
    for position in range(0, kv.nbytes // 16, 100):
        part = bytearray(kv.nbytes)
        part[position * 16 : (position + 100) * 16] = (
            bits_of(kv).numpy().tobytes()[position * 16 : (position + 100) * 16]
        )
        parts.append(checksum_of_bytes(bytes(part)))
    assert sum(parts) % 2**64 == block_checksum(contiguous_rows(kv))


def test_nothing_to_copy_has_the_checksum_zero_and_changes_nothing() -> None:
    source, target = Case(torch.float32, num_tokens=0).rows()
    assert block_copy(source, target) == 0
    assert target.kv_cache.isnan().all()


def test_rows_that_are_no_whole_vectors_are_copied_too() -> None:
    pools = random_pool(torch.float16, head_dim=6), poisoned_pool(torch.float16, head_dim=6)
    source, target = (TokenRows(pool, random_slots(pool, 5), (0, 3), (0, 1)) for pool in pools)
    assert block_copy(source, target) == checksum_reference(payload_of(source))
    assert payload_of(target) == payload_of(source)


def test_a_copy_without_a_checksum_copies() -> None:
    source, target = Case(torch.bfloat16).rows()
    assert start_block_copy(source, target, is_checked=False).numel() == 0
    assert payload_of(target) == payload_of(source)


@pytest.mark.parametrize(
    ("slots", "layers", "heads"),
    [
        ([-1], (0, 1), (0, 1)),
        ([192], (0, 1), (0, 1)),
        ([0], (0, 4), (0, 1)),
        ([0], (-1, 1), (0, 1)),
        ([0], (0, 1), (0, 4)),
        ([0], (1, 0), (0, 1)),
    ],
)
def test_what_lies_outside_the_pool_is_refused(
    slots: list[int], layers: tuple[int, int], heads: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="of a pool that has"):
        TokenRows(random_pool(torch.float32), np.array(slots, np.int64), layers, heads)


def test_two_shapes_are_refused() -> None:
    source, _ = Case(torch.float32, num_tokens=3).rows()
    _, target = Case(torch.float32, num_tokens=4).rows()
    with pytest.raises(ValueError, match="the source is"):
        block_copy(source, target)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself")
def test_the_kernel_equals_the_reference_in_tritons_interpreter() -> None:
    # In a process of its own: the variable is read when Triton is imported.
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.block_copy_pools"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
            ),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
