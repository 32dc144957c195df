"""The specification: which bytes a copy moves, how they are converted, and what their checksum is.

In plain torch, on any device. It is also what runs where the kernel cannot: on the CPU, and for rows that are not
whole vectors of 16 bytes.

The checksum. The bytes are taken in the order of the wire, filled up with zeros to whole vectors of 16 bytes; vector
p holds the little-endian words w[0..3] of 32 bits:

    checksum = sum over p of coefficient(p) * (B[0] * w[0] + B[1] * w[1] + B[2] * w[2] + B[3] * w[3])   mod 2**64

All factors are odd, so none loses a bit: a single wrong word is always seen. The sum has no order, so parts of it may
be computed anywhere, by anyone, and added. What it misses is chance: were the factors drawn at random, two contents
that differ would agree with a probability below 2**-56, when some words differ in their lowest bits, as other content
does; and below 2**-26 when the only bits that differ are the highest ones of several words. It is no defence against
somebody who wants to deceive: the factors are known. The number of bytes is not part of it.
Sources: multilinear hashing as in Lemire and Kaser 2014 (Strongly universal string hashing is fast), with factors that
are products; coefficient(p) is SplitMix64 (Steele, Lea and Flood 2014), the B are the primes of xxHash64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, head_dim_of, pack_kv, unpack_kv

VECTOR_BYTES = 16
WORD_FACTORS = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63)
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
#: Vectors whose words are 64-bit numbers at a time: they take several times the room.
_PIECE_VECTORS = 2**18
#: Largest finite float8_e4m3fn.
_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Some tokens of a block pool, in some of its layers and heads.

    kv_cache: [num_layers, 2 (K, V), num_blocks, block_size, num_heads, head_dim], contiguous. slots: [num_tokens]
    int64, where each token lies: block id * block_size + its place in the block. Layers and heads are counted from
    the first one of this tensor.
    Raises ValueError when something of it lies outside the tensor.
    """

    kv_cache: torch.Tensor
    slots: NDArray[np.int64]
    layers: tuple[int, int]
    heads: tuple[int, int]

    def __post_init__(self) -> None:
        num_layers, _, num_blocks, block_size, num_heads, _ = self.kv_cache.shape
        for name, (lo, hi), limit in (("layers", self.layers, num_layers), ("heads", self.heads, num_heads)):
            if not 0 <= lo <= hi <= limit:
                raise ValueError(f"{name} [{lo}, {hi}) of a pool that has {limit}")
        num_slots = num_blocks * block_size
        if len(self.slots) and (self.slots.min() < 0 or self.slots.max() >= num_slots):
            raise ValueError(
                f"slots from {self.slots.min()} to {self.slots.max()} of a pool that has {num_slots}"
            )
        assert self.kv_cache.is_contiguous()

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[num_layers, 2, num_tokens, num_heads, head_dim], as on the wire; of rows in four bits the last is their bytes."""
        num_layers, num_heads = self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]
        return num_layers, 2, len(self.slots), num_heads, self.kv_cache.shape[-1]

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """The same of the numbers, whatever they are kept in."""
        return *self.shape[:4], head_dim_of(self.kv_cache)

    @property
    def row_bytes(self) -> int:
        """K or V of one token in one layer."""
        return self.shape[3] * self.shape[4] * self.kv_cache.itemsize


def contiguous_rows(kv: torch.Tensor) -> TokenRows:
    """All of kv: [num_layers, 2, num_tokens, num_heads, head_dim], contiguous, as a pool of one block."""
    num_layers, _, num_tokens, num_heads, _ = kv.shape
    return TokenRows(kv.unsqueeze(2), np.arange(num_tokens, dtype=np.int64), (0, num_layers), (0, num_heads))


def block_copy_reference(source: TokenRows, target: TokenRows | None) -> int:
    """Copy and convert, unless target is None; returns the checksum of what was read, in the source's dtype."""
    kv = gather(source)
    if target is not None:
        assert source.kv_shape == target.kv_shape, (source.kv_shape, target.kv_shape)
        scatter(convert(kv, target.kv_cache.dtype), target)
    partials = partial_checksums(kv)
    return int(sum(partials.tolist())) & _MASK


def gather(rows: TokenRows) -> torch.Tensor:
    """A copy, [num_layers, 2, num_tokens, num_heads, head_dim]."""
    slots = torch.from_numpy(rows.slots).to(rows.kv_cache.device)
    taken = _all_heads(rows).index_select(2, slots)
    return _of_heads(taken, rows).contiguous().view(rows.kv_cache.dtype)


def scatter(kv: torch.Tensor, rows: TokenRows) -> None:
    """The reverse of `gather`; kv has the dtype of the pool."""
    slots = torch.from_numpy(rows.slots).to(rows.kv_cache.device)
    _of_heads(_all_heads(rows), rows).index_copy_(2, slots, kv.view(torch.uint8))


def convert(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """kv: [num_layers, 2 (K, V), ..., head_dim]. Rounded to the nearest, ties to even. Beyond what float8_e4m3fn holds it saturates; NaN
    stays NaN. uint8 is rows in four bits: see `kv_int4/op.py`."""
    if kv.dtype == dtype:
        return kv
    if dtype == PACKED_DTYPE:
        return pack_kv(kv)
    if kv.dtype == PACKED_DTYPE:
        kv = unpack_kv(kv)
    if dtype == torch.float8_e4m3fn:
        return kv.float().clamp(-_FP8_MAX, _FP8_MAX).to(dtype)
    return kv.to(dtype)


def partial_checksums(kv: torch.Tensor) -> torch.Tensor:
    """[at least 1] int64, on the device of kv (contiguous), whose sum mod 2**64 is its checksum."""
    data = kv.reshape(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % VECTOR_BYTES))
    factors = torch.tensor([_signed(factor) for factor in WORD_FACTORS], device=kv.device)
    sums = []
    vectors = data.view(torch.int32).view(-1, 4)
    for first in range(0, max(1, len(vectors)), _PIECE_VECTORS):
        words = vectors[first : first + _PIECE_VECTORS].long() & 0xFFFFFFFF
        positions = first + torch.arange(len(words), device=kv.device)
        # Products and sums of int64 wrap.
        sums.append(((words * factors).sum(1) * _coefficients(positions)).sum())
    return torch.stack(sums)


def checksum_reference(payload: bytes) -> int:
    """The definition, in whole numbers."""
    payload += bytes(-len(payload) % VECTOR_BYTES)
    checksum = 0
    for position in range(len(payload) // VECTOR_BYTES):
        for i, factor in enumerate(WORD_FACTORS):
            start = position * VECTOR_BYTES + 4 * i
            word = int.from_bytes(payload[start : start + 4], "little")
            checksum += coefficient(position) * factor * word
    return checksum & _MASK


def coefficient(position: int) -> int:
    """The odd factor of the vector at this position >= 0; < 2**64."""
    z = (position + 1) * GOLDEN & _MASK
    z = (z ^ z >> 30) * MIX_1 & _MASK
    z = (z ^ z >> 27) * MIX_2 & _MASK
    return z ^ z >> 31 | 1


def _coefficients(positions: torch.Tensor) -> torch.Tensor:
    """The same, of int64."""
    z = (positions + 1) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_2)
    return z ^ _shifted(z, 31) | 1


def _shifted(z: torch.Tensor, num_bits: int) -> torch.Tensor:
    """To the right, as if int64 had no sign."""
    return (z >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _all_heads(rows: TokenRows) -> torch.Tensor:
    """A view of the layers as bytes, which every dtype has operations for: [num_layers, 2, slot, head, byte]."""
    return rows.kv_cache[slice(*rows.layers)].view(torch.uint8).flatten(2, 3)


def _of_heads(view: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    return view[:, :, :, slice(*rows.heads)]
