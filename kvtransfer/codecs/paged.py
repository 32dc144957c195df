"""What all codecs share: chunks cut into pages, each head of a page brought to one range, a bounded piece at a time.

A packed chunk is [layer][page]: the pages of layer 0 in order, then those of layer 1. Each page begins with one signed
byte per K/V and head: the power of two that its numbers were divided by, so that their largest magnitude lies in
[128, 256). What follows is the codec's own. Nothing in a page depends on another page.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.codecs.codec import PAGE_TOKENS, CodecId, PageShape

Bytes: TypeAlias = NDArray[np.uint8]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
#: Numbers that are worked on at a time: they stay in a core's cache, and bound the memory for what is in between.
PIECE_NUMBERS = 2**18
#: The largest magnitude of a head in a page becomes less than 2**TOP_EXPONENT. Sums of 64 such numbers fit into fp16.
TOP_EXPONENT = 8
#: Of the exponents that are stored: their powers of two, and the reverse, are normal fp32 numbers.
MAX_SHIFT = 120
#: head_dim must be a multiple of it, so that whole bytes hold the codes of a token.
HEAD_DIM_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class PagedCodec:
    """Implements `Codec` for pages of one kind. Slow: call it in a thread.

    body_bytes(num_tokens, num_heads, head_dim): bytes of a page after its exponents.
    encode(x): x is [num_pages, 2, num_heads, num_tokens, head_dim] fp32, contiguous, its own to change; returns
    [num_pages, body_bytes] uint8.
    decode(bodies, num_tokens, num_heads, head_dim): the reverse; bodies is contiguous.
    """

    id: CodecId
    body_bytes: Callable[[int, int, int], int]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor, int, int, int], torch.Tensor]

    def packed_bytes(self, shape: PageShape) -> int:
        """See Codec. Raises ValueError for a shape that cannot be packed."""
        _check_shape(shape)
        num_pages, num_rest = divmod(shape.num_tokens, PAGE_TOKENS)
        per_layer = num_pages * self._page_bytes(shape, PAGE_TOKENS)
        if num_rest:
            per_layer += self._page_bytes(shape, num_rest)
        return shape.num_layers * per_layer

    def pack(self, kv: torch.Tensor, out: memoryview) -> None:
        """See Codec."""
        shape = _shape_of(kv)
        rows = self._rows(out, shape)
        with torch.no_grad():
            for pages, section in self._sections(kv, rows):
                for where in _pieces(pages.shape):
                    x = pages[where].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
                    bodies = self._encode(x.flatten(0, 1))
                    section[where] = bodies.view(*x.shape[:2], -1).numpy()

    def unpack(self, packed: memoryview, shape: PageShape) -> torch.Tensor:
        """See Codec."""
        rows = self._rows(packed, shape)
        kv = torch.empty(shape.num_layers, 2, shape.num_tokens, shape.num_heads, shape.head_dim)
        with torch.no_grad():
            for pages, section in self._sections(kv, rows):
                for where in _pieces(pages.shape):
                    into = pages[where]
                    # A copy: what is packed may be read-only, which torch cannot say of a tensor.
                    read = torch.from_numpy(section[where].reshape(-1, section.shape[2]).copy())
                    into.copy_(self._decode(read, into.shape).view(into.shape))
        return kv

    def _page_bytes(self, shape: PageShape, num_tokens: int) -> int:
        return 2 * shape.num_heads + self.body_bytes(num_tokens, shape.num_heads, shape.head_dim)

    def _sections(self, kv: torch.Tensor, rows: Bytes) -> Iterator[tuple[torch.Tensor, Bytes]]:
        """Full pages, then the short one, each with where their bytes are: [num_layers, num_pages, page bytes].

        Pages are [num_layers, num_pages, 2, num_heads, num_tokens, head_dim] in the memory of `kv`.
        """
        num_full, num_rest = divmod(kv.shape[2], PAGE_TOKENS)
        split, full_bytes = num_full * PAGE_TOKENS, 0
        if num_full:
            full_bytes = num_full * self._page_bytes(_shape_of(kv), PAGE_TOKENS)
            yield _pages(kv[:, :, :split], PAGE_TOKENS), rows[:, :full_bytes].reshape(len(rows), num_full, -1)
        if num_rest:
            yield _pages(kv[:, :, split:], num_rest), rows[:, None, full_bytes:]

    def _rows(self, packed: memoryview, shape: PageShape) -> Bytes:
        """The packed bytes as [num_layers, bytes of a layer]."""
        expected = self.packed_bytes(shape)
        if packed.nbytes != expected:
            raise ValueError(f"{packed.nbytes} bytes were given for {shape}, which takes {expected} packed")
        return np.frombuffer(packed, np.uint8).reshape(shape.num_layers, -1)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_pages, 2, num_heads, num_tokens, head_dim] fp32, changed. Returns [num_pages, page bytes] uint8."""
        largest = torch.maximum(x.amax((3, 4)), -x.amin((3, 4)))
        if not bool(largest.isfinite().all()):
            raise ValueError("the KV holds NaN or infinity, which no codec can pack")
        shifts = (torch.frexp(largest).exponent - TOP_EXPONENT).clamp(-MAX_SHIFT, MAX_SHIFT)
        x *= _power_of_two(-shifts)
        return torch.cat((bytes_of(shifts.to(torch.int8)), self.encode(x)), 1)

    def _decode(self, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """packed: [num_pages, page bytes]. shape: [num_layers, num_pages, 2, num_heads, num_tokens, head_dim]."""
        num_heads, num_tokens, head_dim = shape[3:]
        sections = Sections(packed)
        shifts = sections.take(torch.int8, 2, num_heads).int().clamp(-MAX_SHIFT, MAX_SHIFT)
        x = self.decode(sections.rest(), num_tokens, num_heads, head_dim)
        x *= _power_of_two(shifts)
        if int(shifts.max()) > MAX_SHIFT - 3:
            # What was rounded up from the largest fp32 would be infinite.
            x.clamp_(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
        return x


class Sections:
    """Reads [num_pages, num_bytes] uint8 from left to right, every page alike."""

    def __init__(self, packed: torch.Tensor) -> None:
        self._packed = packed
        self._next_byte = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next bytes as [num_pages, *shape] of this dtype, contiguous."""
        num_numbers = 1
        for size in shape:
            num_numbers *= size
        end = self._next_byte + num_numbers * dtype.itemsize
        taken = self._packed[:, self._next_byte : end]
        self._next_byte = end
        # A copy even where it is contiguous: a number must begin at a multiple of its size.
        taken = taken.clone(memory_format=torch.contiguous_format)
        return taken.flatten().view(dtype).view(len(self._packed), *shape)

    def rest(self) -> torch.Tensor:
        """All that was not taken, [num_pages, num_bytes] uint8, contiguous."""
        return self._packed[:, self._next_byte :].contiguous()


def bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    """[num_pages, ...] of any dtype as [num_pages, num_bytes] uint8."""
    return numbers.contiguous().flatten(1).view(torch.uint8)


def _check_shape(shape: PageShape) -> None:
    if min(shape.num_layers, shape.num_tokens, shape.num_heads, shape.head_dim) < 1:
        raise ValueError(f"{shape} is empty")
    if shape.head_dim % HEAD_DIM_MULTIPLE:
        raise ValueError(f"head_dim {shape.head_dim} is no multiple of {HEAD_DIM_MULTIPLE}: use no codec")


def _shape_of(kv: torch.Tensor) -> PageShape:
    if kv.dim() != 5 or kv.shape[1] != 2:
        raise ValueError(
            f"KV must be [num_layers, 2, num_tokens, num_heads, head_dim], and is {list(kv.shape)}"
        )
    if kv.dtype not in DTYPES or kv.device.type != "cpu":
        raise ValueError(f"KV must be fp32, fp16, bf16 or e4m3 on the CPU, and is {kv.dtype} on {kv.device}")
    return PageShape(kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[4])


def _pages(kv: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_layers, 2, tokens, num_heads, head_dim] as [num_layers, num_pages, 2, num_heads, num_tokens, head_dim]."""
    num_layers, _, _, num_heads, head_dim = kv.shape
    by_page = kv.view(num_layers, 2, -1, num_tokens, num_heads, head_dim)
    return by_page.permute(0, 2, 1, 4, 3, 5)


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Layers and pages to work on at a time. shape: [num_layers, num_pages, 2, num_heads, num_tokens, head_dim]."""
    num_layers, num_pages = shape[:2]
    at_once = max(1, PIECE_NUMBERS // shape[2:].numel())
    pages_step = min(num_pages, at_once)
    layers_step = max(1, at_once // pages_step)
    for layer in range(0, num_layers, layers_step):
        for page in range(0, num_pages, pages_step):
            yield slice(layer, layer + layers_step), slice(page, page + pages_step)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2**exponents exactly, in fp32, for [num_pages, 2, num_heads] within MAX_SHIFT; broadcasts over tokens and channels."""
    return ((exponents.int() + 127) << 23).view(torch.float32)[..., None, None]
