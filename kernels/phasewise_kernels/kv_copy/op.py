"""Bytes that are copied and checked in one pass over memory.

With numba and a CRC32C instruction (x86 with SSE 4.2, aarch64 with CRC) a kernel of ours does both; else numpy copies
and google_crc32c checks, with the same result. Neither holds the interpreter's lock for long, and neither starts
threads: one core already asks for as much as the memory gives.
"""

from collections.abc import Iterable
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from phasewise_kernels import jit

_KERNEL = "phasewise_kernels.kv_copy.kernel"
_INVERTED = 0xFFFFFFFF

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


def copy_pieces(
    source: Bytes,
    source_offsets: Offsets,
    target: Bytes,
    target_offsets: Offsets,
    lengths: Offsets,
    checksum: int = 0,
) -> int:
    """Copy pieces in order; returns the CRC32C over all of them, after bytes whose CRC32C is `checksum`.

    source, target: [bytes] uint8, contiguous; source may be read-only. Offsets and lengths: [num_pieces] int64. No piece
    of the target may overlap another or one of the source.

    Raises ValueError when a piece is not within its memory.
    """
    _check(source, source_offsets, lengths, "source")
    _check(target, target_offsets, lengths, "target")
    if not target.flags.writeable:
        raise ValueError("the target is read-only")
    kernels = _kernels()
    if kernels is None:
        for at, to, length in _pieces(source_offsets, target_offsets, lengths):
            target[to : to + length] = source[at : at + length]
            checksum = google_crc32c.extend(checksum, source[at : at + length])
        return checksum
    addresses = _address(source), source_offsets, _address(target), target_offsets
    return int(kernels.copy_pieces(*addresses, lengths, np.uint64(checksum ^ _INVERTED))) ^ _INVERTED


def checksum_pieces(source: Bytes, source_offsets: Offsets, lengths: Offsets, checksum: int = 0) -> int:
    """What `copy_pieces` of the same pieces returns, without a copy."""
    _check(source, source_offsets, lengths, "source")
    kernels = _kernels()
    if kernels is None:
        for at, _, length in _pieces(source_offsets, source_offsets, lengths):
            checksum = google_crc32c.extend(checksum, source[at : at + length])
        return checksum
    state = np.uint64(checksum ^ _INVERTED)
    return int(kernels.checksum_pieces(_address(source), source_offsets, lengths, state)) ^ _INVERTED


def crc32c(data: Bytes, checksum: int = 0) -> int:
    """CRC32C of all of `data`, after bytes whose CRC32C is `checksum`."""
    return checksum_pieces(data, np.zeros(1, np.int64), np.array([data.size], np.int64), checksum)


def has_kernel() -> bool:
    """Whether one pass does both here; compiles at the first call."""
    return _kernels() is not None


def _kernels() -> Any:
    module = jit.load(_KERNEL)
    return module if module is not None and module.has_instruction() else None


def _check(memory: Bytes, offsets: Offsets, lengths: Offsets, name: str) -> None:
    if memory.ndim != 1 or memory.dtype != np.uint8 or not memory.flags.c_contiguous:
        raise ValueError(f"the {name} is no row of bytes")
    if offsets.shape != lengths.shape or offsets.ndim != 1:
        raise ValueError(f"{offsets.shape} offsets of the {name} for {lengths.shape} lengths")
    if lengths.size == 0:
        return
    # Each alone first: a sum of two large numbers would be a negative one.
    if offsets.min() < 0 or lengths.min() < 0 or offsets.max() > memory.size or lengths.max() > memory.size:
        raise ValueError(f"a piece is not within the {memory.size} bytes of the {name}")
    if (offsets + lengths).max() > memory.size:
        raise ValueError(f"a piece is not within the {memory.size} bytes of the {name}")


def _address(memory: Bytes) -> np.uint64:
    return np.uint64(memory.__array_interface__["data"][0])


def _pieces(*columns: Offsets) -> Iterable[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)
