"""The specification of packed pages: the wire format of docs/kv-codecs.md, page by page and head by head.

It gives the bytes that the codecs of the CPU give, but for the factors of `gear` and `gear_l`: these are sums of
products, which every library adds in an order of its own. It is also what runs on the CPU, and for a head_dim that is
no power of two.
"""

from functools import cache
from typing import Literal, get_args

import torch

PageCodec = Literal["fp8", "int4_hadamard", "gear", "gear_l"]
CODECS: tuple[PageCodec, ...] = get_args(PageCodec)
PAGE_TOKENS = 64
MAX_BLOCK = 64
E4M3_MAX = 448.0
MIN_SCALE = 2.0**-14
#: Of `gear`: a shorter page is fp16.
MIN_TOKENS = 16
RANK = 2
NUM_ITERATIONS = 3
MIN_INDEPENDENT = 1e-4


def block_of(head_dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides head_dim, at most MAX_BLOCK."""
    return min(head_dim & -head_dim, MAX_BLOCK)


def outlier_count(codec: PageCodec, length: int) -> int:
    """Outliers at each end of a vector: 1 %, to the nearest whole number."""
    return int(0.01 * length + 0.5) if codec == "gear" else 0


def page_bytes(codec: PageCodec, num_tokens: int, num_heads: int, head_dim: int) -> int:
    """Bytes of a page of so many tokens, 1 to PAGE_TOKENS, its exponents with it."""
    n, d = num_tokens, head_dim
    if codec == "fp8":
        of_head = 2 * n * (d + 2)
    elif codec == "int4_hadamard":
        of_head = 2 * n * (d // 2 + d // block_of(d) * 4)
    elif n < MIN_TOKENS:
        of_head = 2 * n * d * 2
    else:
        rank, groups = RANK * n // PAGE_TOKENS, groups_of(d)
        of_head = 2 * (d * n // 4 + rank * (n + d) * 2)
        of_head += d * (4 + 6 * outlier_count(codec, n)) + n * (4 * groups + 6 * outlier_count(codec, d))
    return num_heads * (2 + of_head)


def groups_of(head_dim: int) -> int:
    """Groups of channels of `gear`'s V."""
    return next(g for g in range(-(-head_dim // MAX_BLOCK), head_dim + 1) if head_dim % g == 0)


def layer_bytes(codec: PageCodec, num_tokens: int, num_heads: int, head_dim: int) -> int:
    """Bytes of all pages of a layer, the last one possibly short."""
    num_full, rest = divmod(num_tokens, PAGE_TOKENS)
    full = num_full * page_bytes(codec, PAGE_TOKENS, num_heads, head_dim)
    return full + (page_bytes(codec, rest, num_heads, head_dim) if rest else 0)


def encode_reference(kv: torch.Tensor, codec: PageCodec) -> torch.Tensor:
    """kv: [num_layers, 2, num_tokens, num_heads, head_dim], finite. Returns [num_layers, layer_bytes] uint8."""
    layers = []
    for layer in kv.float():
        pages = [_encode_page(page.transpose(1, 2), codec) for page in layer.split(PAGE_TOKENS, dim=1)]
        layers.append(torch.cat(pages) if kv.shape[2] else kv.new_empty(0, dtype=torch.uint8))
    empty = kv.new_empty(0, layer_bytes(codec, kv.shape[2], *kv.shape[3:]), dtype=torch.uint8)
    return torch.stack(layers) if layers else empty


def decode_reference(
    packed: torch.Tensor, codec: PageCodec, num_tokens: int, num_heads: int, head_dim: int
) -> torch.Tensor:
    """The reverse: [num_layers, 2, num_tokens, num_heads, head_dim] fp32."""
    kv = torch.empty(len(packed), 2, num_tokens, num_heads, head_dim, device=packed.device)
    for layer, row in zip(kv, packed, strict=True):
        start = 0
        for page in layer.split(PAGE_TOKENS, dim=1):
            end = start + page_bytes(codec, page.shape[1], num_heads, head_dim)
            page.copy_(
                _decode_page(row[start:end], codec, page.shape[1], num_heads, head_dim).transpose(1, 2)
            )
            start = end
    return kv


def _encode_page(x: torch.Tensor, codec: PageCodec) -> torch.Tensor:
    """x: [2, num_heads, num_tokens, head_dim] fp32."""
    shifts = (torch.frexp(x.abs().amax((2, 3))).exponent - 8).clamp(-120, 120)
    x = x * _power(-shifts)
    if codec == "fp8":
        scales = (x.abs().amax(3, keepdim=True) / E4M3_MAX).clamp(min=MIN_SCALE).half()
        sections = [(x * scales.float().reciprocal()).to(torch.float8_e4m3fn), scales]
    elif codec == "int4_hadamard":
        block = block_of(x.shape[3])
        # [head_dim, 2, num_heads, num_tokens]
        codes, scales, minima = _quantise(rotate(x, block).movedim(3, 0).contiguous(), block, 4)
        sections = [codes[: len(codes) // 2] | codes[len(codes) // 2 :] << 4, scales, minima]
    elif x.shape[2] < MIN_TOKENS:
        sections = [x.half()]
    else:
        sections = _encode_gear(x[0].mT, codec, 1) + _encode_gear(x[1], codec, 2)
    return torch.cat([_bytes(part) for part in (shifts.to(torch.int8), *sections)])


def _decode_page(packed: torch.Tensor, codec: PageCodec, n: int, num_heads: int, d: int) -> torch.Tensor:
    """[2, num_heads, n, d] fp32."""
    parts = _Parts(packed)
    shifts = parts.take(torch.int8, 2, num_heads).int().clamp(-120, 120)
    if codec == "fp8":
        numbers = parts.take(torch.float8_e4m3fn, 2, num_heads, n, d).float()
        x = numbers * parts.take(torch.float16, 2, num_heads, n, 1).float()
    elif codec == "int4_hadamard":
        block = block_of(d)
        codes = parts.take(torch.uint8, d // 2, 2, num_heads, n)
        codes = torch.cat((codes & 15, codes >> 4)).view(d // block, block, 2, num_heads, n)
        scales, minima = (parts.take(torch.float16, d // block, 1, 2, num_heads, n).float() for _ in "sm")
        x = rotate((codes.float() * scales + minima).flatten(0, 1).movedim(0, 3).contiguous(), block)
    elif n < MIN_TOKENS:
        x = parts.take(torch.float16, 2, num_heads, n, d).float()
    else:
        rank = RANK * n // PAGE_TOKENS
        k = _decode_gear(parts, codec, (num_heads, d, n), rank, 1, 1)
        x = torch.stack((k.mT, _decode_gear(parts, codec, (num_heads, n, d), rank, 2, groups_of(d))))
    limit = torch.finfo(torch.float32).max
    return (x * _power(shifts)).clamp(-limit, limit)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """The last axis in blocks, each times its Hadamard matrix over the root of its size, by sums and differences."""
    half = block // 2
    while half:
        first, second = x.view(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        half //= 2
    rotated: torch.Tensor = x * block**-0.5
    return rotated


def _quantise(x: torch.Tensor, group: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of the first axis. Codes as x, uint8; scales and minima: [groups, ...] fp16."""
    x = x.reshape(-1, group, *x.shape[1:])
    top = 2**bits - 1
    minima = x.amin(1, keepdim=True)
    scales = ((x.amax(1, keepdim=True) - minima) / top).half()
    minima = minima.half()
    per_scale = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    codes = ((x - minima.float()) * per_scale).round().clamp(0, top)
    return codes.to(torch.uint8).flatten(0, 1), scales.squeeze(1), minima.squeeze(1)


def _encode_gear(x: torch.Tensor, codec: PageCodec, channel_dim: int) -> list[torch.Tensor]:
    """x: [num_heads, num_vectors, length]. channel_dim: the axis of the channels, in which codes are packed."""
    x = x.contiguous()
    length, channels = x.shape[2], x.shape[channel_dim]
    num_tokens = x.numel() // len(x) // channels
    count, group = outlier_count(codec, length), length if channel_dim == 1 else length // groups_of(length)
    places = torch.cat([_extreme(x * sign, count) for sign in (1.0, -1.0)], 2)
    outliers = x.gather(2, places)
    if count:
        largest, smallest = (
            x.scatter(2, places, -torch.inf).amax(2, True),
            x.scatter(2, places, torch.inf).amin(2, True),
        )
        x = x.clamp(smallest, largest)
    codes, scales, minima = _quantise(x.movedim(2, 0), group, 2)
    codes, scales, minima = (part.movedim(0, 2) for part in (codes, scales, minima))
    numbers = (
        codes.reshape(*codes.shape[:2], -1, group).float() * scales[..., None].float()
        + minima[..., None].float()
    )
    error = (x - numbers.flatten(2)).scatter(2, places, 0.0)
    left, right = _factors(error, RANK * num_tokens // PAGE_TOKENS)
    first, *rest = codes.chunk(4, channel_dim)
    for number, part in enumerate(rest, 1):
        first = first | part << 2 * number
    return [first, scales, minima, left.half(), right.half(), outliers.half(), places.to(torch.uint8)]


def _extreme(x: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest of each vector, the first of equals first: [..., count] int64."""
    found = [x.new_empty((*x.shape[:2], 0), dtype=torch.int64)]
    for _ in range(count):
        found.append(x.argmax(2, keepdim=True))
        x = x.scatter(2, found[-1], -torch.inf)
    return torch.cat(found, 2)


def _factors(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left: [heads, rank, n], orthonormal; right: [heads, rank, m]. Source: PowerSGD (arXiv 1905.13727)."""
    if not rank:
        return error.new_empty(len(error), 0, error.shape[1]), error.new_empty(len(error), 0, error.shape[2])
    right = start(rank, error.shape[2]).to(error.device).expand(len(error), -1, -1)
    for _ in range(NUM_ITERATIONS):
        done: list[torch.Tensor] = []
        for row in (right @ error.mT).unbind(1):
            across = row
            for _ in range(2 if done else 0):
                across = across - (across * done[0]).sum(1, keepdim=True) * done[0]
            length, was = across.norm(dim=1, keepdim=True), row.norm(dim=1, keepdim=True)
            done.append(torch.where(length > was * MIN_INDEPENDENT, across / length, 0.0))
        left = torch.stack(done, 1)
        right = left @ error
    return left, right


@cache
def start(rank: int, length: int) -> torch.Tensor:
    """Where the power iteration begins, on the CPU: the same for every matrix and in every process."""
    return torch.randn(rank, length, generator=torch.Generator().manual_seed(0))


def _decode_gear(
    parts: "_Parts",
    codec: PageCodec,
    shape: tuple[int, int, int],
    rank: int,
    channel_dim: int,
    num_groups: int,
) -> torch.Tensor:
    num_heads, num_vectors, length = shape
    packed_shape = [num_heads, num_vectors, length]
    packed_shape[channel_dim] //= 4
    packed = parts.take(torch.uint8, *packed_shape)
    codes = torch.cat([packed >> 2 * number & 3 for number in range(4)], channel_dim)
    scales, minima = (parts.take(torch.float16, num_heads, num_vectors, num_groups, 1).float() for _ in "sm")
    x = (codes.view(*codes.shape[:2], num_groups, -1).float() * scales + minima).flatten(2)
    left = parts.take(torch.float16, num_heads, rank, num_vectors).float()
    right = parts.take(torch.float16, num_heads, rank, length).float()
    count = 2 * outlier_count(codec, length)
    outliers = parts.take(torch.float16, num_heads, num_vectors, count)
    places = parts.take(torch.uint8, num_heads, num_vectors, count).long().clamp(max=length - 1)
    return (x + left.mT @ right).scatter(2, places, outliers.float())


class _Parts:
    """Reads bytes from left to right."""

    def __init__(self, packed: torch.Tensor) -> None:
        self._packed = packed
        self._next = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next bytes, contiguous."""
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = self._packed[self._next : self._next + size].clone()
        self._next += size
        return taken.view(dtype).view(shape)


def _bytes(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().flatten().view(torch.uint8)


def _power(shifts: torch.Tensor) -> torch.Tensor:
    """2**shifts exactly, for [2, num_heads]; broadcasts over tokens and channels."""
    return ((shifts.int() + 127) << 23).view(torch.float32)[..., None, None]
