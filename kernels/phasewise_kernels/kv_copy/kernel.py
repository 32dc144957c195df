"""One pass over memory that copies and computes CRC32C by the processor's instruction.

A piece is worked on in tiles of four lanes:

    | lane 0: LANE_BYTES | lane 1 | lane 2 | lane 3 |   states a (goes on from what came before), b, c, d (from zero)

The instruction takes three cycles and one can begin in each, so the states are advanced in turn; three would do, but
blocks are multiples of a power of two. A lane's state is then moved past the lane after it by `_shift`, four table
look-ups: CRC is linear. What does not fill a tile is worked on eight bytes, then one, at a time.

Copies bypass the caches where the target's alignment allows: an ordinary store reads the line first, which costs a
third of the memory's bandwidth, and the pages of a pool are too far apart for the processor to foresee, so tiles are
asked for two ahead. A tile's bytes are loaded twice, for the copy and for the checksum, the second time from the
fastest cache.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from phasewise_kernels.jit import EXACT, kernel
from phasewise_kernels.kv_copy.reference import POLYNOMIAL

LANE_BYTES = 512
TILE_BYTES = 4 * LANE_BYTES
LINE_BYTES = 64
#: How far ahead memory is asked for: in tiles, and in pieces where these are smaller than a tile.
TILES_AHEAD = 2
SMALL_AHEAD = 8

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE = ir.VectorType(_LONG, LINE_BYTES // 8)
#: For unsigned arithmetic: with a signed number numba would make floats of both.
_U = np.uint64
_LANE, _TILE, _LINE_STEP, _WORD, _ONE, _ZERO = map(_U, (LANE_BYTES, TILE_BYTES, LINE_BYTES, 8, 1, 0))
_TILES_AHEAD = _U(TILES_AHEAD)
_LOW_BYTE = np.uint64(0xFF)


@dataclass(frozen=True, slots=True)
class _Instruction:
    """LLVM's names for it. feature: that a processor must have. Types are of the second argument."""

    feature: str
    for_8: str
    type_8: ir.Type
    for_1: str
    type_1: ir.Type


_INSTRUCTIONS = {
    "x86_64": _Instruction("sse4.2", "llvm.x86.sse42.crc32.64.64", _LONG, "llvm.x86.sse42.crc32.32.8", _BYTE),
    "aarch64": _Instruction("crc", "llvm.aarch64.crc32cx", _LONG, "llvm.aarch64.crc32cb", _INT),
}


@cache
def has_instruction() -> bool:
    """Whether code for this processor may use a CRC32C instruction."""
    found = _INSTRUCTIONS.get(platform.machine())
    numba_config: Any = config
    list_features: Any = get_host_cpu_features
    features = numba_config.CPU_FEATURES
    enabled: str = list_features() if features is None else features
    return found is not None and f"+{found.feature}" in enabled.split(",")


def _shift_tables(num_bytes: int) -> npt.NDArray[np.uint64]:
    """[4, 256]: what each byte of a state becomes when `num_bytes` zero bytes, a power of two, follow."""
    column = [(1 << bit) >> 1 for bit in range(32)]
    column[0] = POLYNOMIAL
    for _ in range((8 * num_bytes).bit_length() - 1):
        column = [_applied(column, state) for state in column]
    rows = [[_applied(column, byte << 8 * place) for byte in range(256)] for place in range(4)]
    return np.array(rows, np.uint64)


def _applied(column: list[int], state: int) -> int:
    out = 0
    for bit in range(32):
        if state >> bit & 1:
            out ^= column[bit]
    return out


_T0, _T1, _T2, _T3 = _shift_tables(LANE_BYTES)


def _typed_crc(state: Any, data: Any, *, num_bytes: int) -> Any:
    """The state of a CRC32C after eight bytes of data or one; both uint64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = _INSTRUCTIONS[platform.machine()]
        name, data_type = (found.for_8, found.type_8) if num_bytes == 8 else (found.for_1, found.type_1)
        # x86's for eight bytes keeps the state in 64 bits.
        state_type = _LONG if name.endswith("64.64") else _INT
        function_type = ir.FunctionType(state_type, [state_type, data_type])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        cut = [
            value if size is _LONG else builder.trunc(value, size)
            for value, size in zip(arguments, (state_type, data_type), strict=True)
        ]
        result = builder.call(function, cut)
        return result if state_type is _LONG else builder.zext(result, _LONG)

    return types.uint64(state, data), generate


def _typed_crc_8(_typing: Any, state: Any, data: Any) -> Any:
    return _typed_crc(state, data, num_bytes=8)


def _typed_crc_1(_typing: Any, state: Any, data: Any) -> Any:
    return _typed_crc(state, data, num_bytes=1)


def _typed_load_8(_typing: Any, address: Any) -> Any:
    """Eight bytes at any address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _LONG.as_pointer()), align=1)

    return types.uint64(address), generate


def _typed_load_1(_typing: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.load(builder.inttoptr(arguments[0], _BYTE.as_pointer())), _LONG)

    return types.uint64(address), generate


def _typed_store_8(_typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _LONG.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(address, value), generate


def _typed_store_1(_typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = builder.trunc(arguments[1], _BYTE)
        builder.store(byte, builder.inttoptr(arguments[0], _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(address, value), generate


def _typed_move(target: Any, source: Any, *, is_past_cache: bool) -> Any:
    """Copy one line; past the caches, the target must be aligned to it."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = builder.load(builder.inttoptr(arguments[1], _LINE.as_pointer()), align=1)
        place = builder.inttoptr(arguments[0], _LINE.as_pointer())
        if is_past_cache:
            store = builder.store(line, place, align=LINE_BYTES)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT, 1)]))
        else:
            builder.store(line, place, align=1)
        return context.get_dummy_value()

    return types.void(target, source), generate


def _typed_move_past_cache(_typing: Any, target: Any, source: Any) -> Any:
    return _typed_move(target, source, is_past_cache=True)


def _typed_move_line(_typing: Any, target: Any, source: Any) -> Any:
    return _typed_move(target, source, is_past_cache=False)


def _typed_ask_for(_typing: Any, address: Any) -> Any:
    """Bring a line into the fastest cache; any address will do, also one that is not mapped."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        name, pointer = "llvm.prefetch.p0", _BYTE.as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        # To read; near; data.
        builder.call(function, [builder.inttoptr(arguments[0], pointer), _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(address), generate


def _typed_fence(_typing: Any) -> Any:
    """Stores past the caches are seen by other threads after it."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_crc_8: Any = intrinsic(_typed_crc_8)
_crc_1: Any = intrinsic(_typed_crc_1)
_load_8: Any = intrinsic(_typed_load_8)
_load_1: Any = intrinsic(_typed_load_1)
_store_8: Any = intrinsic(_typed_store_8)
_store_1: Any = intrinsic(_typed_store_1)
_move_past_cache: Any = intrinsic(_typed_move_past_cache)
_move_line: Any = intrinsic(_typed_move_line)
_ask_for: Any = intrinsic(_typed_ask_for)
_fence: Any = intrinsic(_typed_fence)

#: What a tile is for; a constant in each call, so that one function becomes three.
_CHECKSUM, _COPY, _COPY_ALIGNED = 0, 1, 2


@kernel(EXACT, is_inlined=True)
def _shift(state: Any) -> Any:
    low = _T0[state & _LOW_BYTE] ^ _T1[(state >> _U(8)) & _LOW_BYTE]
    return low ^ _T2[(state >> _U(16)) & _LOW_BYTE] ^ _T3[state >> _U(24)]


@kernel(EXACT, is_inlined=True)
def _move(target: Any, source: Any, purpose: int) -> None:
    if purpose == _COPY_ALIGNED:
        _move_past_cache(target, source)
    elif purpose == _COPY:
        _move_line(target, source)


@kernel(EXACT, is_inlined=True)
def _tile(state: Any, source: Any, target: Any, ahead: Any, purpose: int) -> Any:
    a, b, c, d = state, _ZERO, _ZERO, _ZERO
    for at in range(_ZERO, _LANE, _LINE_STEP):
        for lane in range(_ZERO, _TILE, _LANE):
            _move(target + lane + at, source + lane + at, purpose)
            # In the order in which they lie, not as they will be read: the memory likes it better.
            _ask_for(ahead + _U(4) * at + lane // _LANE * _LINE_STEP)
        for word in range(at, at + _LINE_STEP, _WORD):
            place = source + word
            a = _crc_8(a, _load_8(place))
            b = _crc_8(b, _load_8(place + _LANE))
            c = _crc_8(c, _load_8(place + _LANE + _LANE))
            d = _crc_8(d, _load_8(place + _LANE + _LANE + _LANE))
    return _shift(_shift(_shift(a) ^ b) ^ c) ^ d


@kernel(EXACT, is_inlined=True)
def _piece(state: Any, source: Any, target: Any, length: Any, following: Any, purpose: int) -> Any:
    """following: where the piece begins that will be needed next, or some other one."""
    num_tiles, done = length // _TILE, _ZERO
    for i in range(_ZERO, num_tiles, _ONE):
        ahead = i + _TILES_AHEAD
        asked = source if ahead < num_tiles else following
        place = ahead if ahead < num_tiles else min(ahead - num_tiles, num_tiles - _ONE)
        state = _tile(state, source + done, target + done, asked + place * _TILE, purpose)
        done += _TILE
    while length - done >= _LINE_STEP:
        _move(target + done, source + done, purpose)
        _ask_for(following + done)
        for word in range(_ZERO, _LINE_STEP, _WORD):
            state = _crc_8(state, _load_8(source + done + word))
        done += _LINE_STEP
    while length - done >= _WORD:
        data = _load_8(source + done)
        state = _crc_8(state, data)
        if purpose != _CHECKSUM:
            _store_8(target + done, data)
        done += _WORD
    while done < length:
        byte = _load_1(source + done)
        state = _crc_1(state, byte)
        if purpose != _CHECKSUM:
            _store_1(target + done, byte)
        done += _ONE
    return state


@kernel(EXACT, is_inlined=True)
def _following(source: Any, offsets: Any, lengths: Any, i: int) -> Any:
    """Where to look ahead during piece i: far enough in small ones."""
    ahead = 1 if lengths[i] >= TILE_BYTES else SMALL_AHEAD
    return source + _U(offsets[min(i + ahead, offsets.size - 1)])


@kernel(EXACT)
def copy_pieces(
    source: Any, source_offsets: Any, target: Any, target_offsets: Any, lengths: Any, state: Any
) -> Any:
    """Copy, and return the state of the CRC32C after it.

    source, target: addresses, uint64. offsets, lengths: [num_pieces] int64, in bytes. state: uint64, not inverted.
    """
    for i in range(lengths.size):
        from_, to = source + _U(source_offsets[i]), target + _U(target_offsets[i])
        length, following = _U(lengths[i]), _following(source, source_offsets, lengths, i)
        if to % _LINE_STEP == _ZERO:
            state = _piece(state, from_, to, length, following, _COPY_ALIGNED)
        else:
            state = _piece(state, from_, to, length, following, _COPY)
    _fence()
    return state


@kernel(EXACT)
def checksum_pieces(source: Any, source_offsets: Any, lengths: Any, state: Any) -> Any:
    """The same without a copy."""
    for i in range(lengths.size):
        following, from_ = _following(source, source_offsets, lengths, i), source + _U(source_offsets[i])
        state = _piece(state, from_, from_, _U(lengths[i]), following, _CHECKSUM)
    return state


def compile_all(step: Callable[[], None]) -> None:
    """Compile, where the processor has the instruction; without it LLVM would end the process."""
    if has_instruction():
        data, offsets = np.zeros(16, np.uint8), np.array([0, 8], np.int64)
        address = np.uint64(data.ctypes.data)
        copy_pieces(address, offsets[:1], address, offsets[1:], offsets[1:], np.uint64(0))
        step()
        checksum_pieces(address, offsets[:1], offsets[1:], np.uint64(0))
    step()
