"""GEAR: codes of few bits, thin matrices whose product is most of what these leave out, and a few outliers kept.

A page of MIN_TOKENS or more, after its exponents, is its K and then its V. K is taken as [head, channel, token] and V as
[head, token, channel]; the last axis, of length L, is a vector, and there are N of them:

    codes     [head, N, L] of `bits` each, as `quantise.pack_bits` packs them along the channels
    scales    [head, N, groups] fp16; K has one group for all tokens of the page, V groups of channels
    minima    [head, N, groups] fp16
    left      [head, rank, N] fp16, orthonormal
    right     [head, rank, L] fp16: transposed left times right is added to what the codes stand for
    outliers  [head, N, 2 * count] fp16, the largest first, then the smallest; they replace all that
    places    [head, N, 2 * count] uint8, of the outliers in their vector

A shorter page is fp16, [K/V, head, token, channel].

Sources: GEAR (arXiv 2403.05527); KIVI (arXiv 2402.02750) for the groups. docs/kv-codecs.md says where this differs.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as functional

from kvtransfer.codecs.codec import PAGE_TOKENS, CodecId
from kvtransfer.codecs.paged import PagedCodec, Sections, bytes_of
from kvtransfer.codecs.quantise import Quantised, pack_bits, quantise, unpack_bits

#: Channels of V that share a scale, at most.
MAX_GROUP = 64
#: Shorter pages are kept in fp16: a channel's scale and minimum would take more than its codes save.
MIN_TOKENS = 16
NUM_ITERATIONS = 3
SEED = 0
#: fp32 numbers in 64 bytes, of which torch's memory begins at a multiple.
LINE_NUMBERS = 16
#: A row whose part across the others is a smaller share of it than this is made of rounding errors.
MIN_INDEPENDENT = 1e-4


@dataclass(frozen=True, slots=True)
class Recipe:
    """bits: of a code, 2, 4 or 8. rank: of the factors of a page of PAGE_TOKENS. outlier_share: of a vector, 0 to 1."""

    bits: int
    rank: int
    outlier_share: float


@dataclass(frozen=True, slots=True)
class _Side:
    """How K or V of one head of a page is packed."""

    bits: int
    num_vectors: int
    #: Of a vector.
    length: int
    num_groups: int
    rank: int
    #: Outliers at each end of a vector.
    count: int
    #: Axis of the channels in [num_pages, num_heads, num_vectors, length].
    channel_dim: int


def outlier_count(length: int, share: float) -> int:
    """Outliers at each end of a vector of `length` numbers: half of the share, to the nearest whole number."""
    return int(share * length / 2 + 0.5)


def rank_of(num_tokens: int, rank: int) -> int:
    """Rank for a page of so many tokens. Factors take nearly as much in a short page, and save less."""
    return rank * num_tokens // PAGE_TOKENS


def num_groups_of(head_dim: int) -> int:
    """Equal groups of channels, as few as keep each within MAX_GROUP."""
    num_groups = -(-head_dim // MAX_GROUP)
    while head_dim % num_groups:
        num_groups += 1
    return num_groups


def _sides(recipe: Recipe, num_tokens: int, head_dim: int) -> tuple[_Side, _Side]:
    """Of K and of V."""
    bits, rank = recipe.bits, rank_of(num_tokens, recipe.rank)
    k_count, v_count = (outlier_count(length, recipe.outlier_share) for length in (num_tokens, head_dim))
    return (
        _Side(bits, head_dim, num_tokens, 1, rank, k_count, channel_dim=2),
        _Side(bits, num_tokens, head_dim, num_groups_of(head_dim), rank, v_count, channel_dim=3),
    )


def _body_bytes(recipe: Recipe, num_tokens: int, num_heads: int, head_dim: int) -> int:
    if num_tokens < MIN_TOKENS:
        return 2 * num_heads * num_tokens * head_dim * 2
    return num_heads * sum(
        side.num_vectors * side.length * side.bits // 8
        + side.num_vectors * (side.num_groups * 4 + side.count * 2 * 3)
        + side.rank * (side.num_vectors + side.length) * 2
        for side in _sides(recipe, num_tokens, head_dim)
    )


def _encode(recipe: Recipe, x: torch.Tensor) -> torch.Tensor:
    """See PagedCodec."""
    num_tokens, head_dim = x.shape[3:]
    if num_tokens < MIN_TOKENS:
        return bytes_of(x.half())
    k, v = _sides(recipe, num_tokens, head_dim)
    sections = _encode_side(k, x[:, 0].transpose(2, 3).contiguous()) + _encode_side(v, x[:, 1].contiguous())
    return torch.cat([bytes_of(section) for section in sections], 1)


def _encode_side(side: _Side, x: torch.Tensor) -> list[torch.Tensor]:
    """x: [num_pages, num_heads, num_vectors, length] fp32, changed. Returns the sections."""
    outliers, places, low, high = _take_outliers(x, side.count)
    if side.count:
        # Each outlier goes to the nearest number that is none: no group's range is wider than that of the others.
        torch.minimum(torch.maximum(x, low, out=x), high, out=x)
    groups = quantise(x.view(*x.shape[:3], side.num_groups, -1), side.bits, dim=4)
    error = x.sub_(groups.numbers().flatten(3)).scatter_(3, places, 0.0)
    left, right = factors(error.flatten(0, 1), side.rank)
    return [
        pack_bits(groups.codes.flatten(3), side.bits, side.channel_dim),
        groups.scales,
        groups.minima,
        left.reshape(*x.shape[:2], *left.shape[1:]).half(),
        right.reshape(*x.shape[:2], *right.shape[1:]).half(),
        outliers.half(),
        places.to(torch.uint8),
    ]


def _take_outliers(
    x: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` largest and smallest of each vector, their places, and the smallest and largest of the others."""
    places = []
    ends = []
    for sign in (1.0, -1.0):
        rest = x * sign
        # One by one: topk takes six times longer.
        for _ in range(count):
            place = rest.argmax(3, keepdim=True)
            rest.scatter_(3, place, -torch.inf)
            places.append(place)
        ends.append(rest.amax(3, keepdim=True) * sign)
    found = torch.cat(places, 3) if places else x.new_empty((*x.shape[:3], 0), dtype=torch.int64)
    return x.gather(3, found), found, ends[1], ends[0]


def factors(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [num, rank, n] with orthonormal rows and right [num, rank, m], so that left^T right is near `error`.

    error: [num, n, m] fp32, each by itself. Never farther from `error` than zero is; near the best of this rank.
    Source: power iteration of PowerSGD (arXiv 1905.13727), as GEAR uses it.
    """
    num_matrices, num_rows, length = error.shape
    if rank == 0:
        return error.new_empty(num_matrices, 0, num_rows), error.new_empty(num_matrices, 0, length)
    # Libraries multiply a matrix in another order when its memory begins elsewhere: with whole lines of it, all alike.
    padding = (0, -length % LINE_NUMBERS, 0, -num_rows % LINE_NUMBERS)
    error = functional.pad(error, padding) if any(padding) else error
    right = _start(rank, length).expand(num_matrices, -1, -1)
    right = functional.pad(right, padding[:2])
    for _ in range(NUM_ITERATIONS):
        left = orthonormal(torch.bmm(right, error.mT))
        right = torch.bmm(left, error)
    return left[..., :num_rows], right[..., :length]


@cache
def _start(rank: int, length: int) -> torch.Tensor:
    """The same for every matrix and in every process: the same KV gives the same bytes."""
    return torch.randn(rank, length, generator=torch.Generator().manual_seed(SEED))


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """rows: [num, rank, n]. Gram-Schmidt, row by row; a row that depends on earlier ones becomes zero."""
    done: list[torch.Tensor] = []
    for row in rows.unbind(1):
        across = row
        # Once leaves rounding errors, which twice takes away.
        for _ in range(2 if done else 0):
            for other in done:
                across = across - (across * other).sum(1, keepdim=True) * other
        length, was = across.norm(dim=1, keepdim=True), row.norm(dim=1, keepdim=True)
        is_independent = length > was * MIN_INDEPENDENT
        done.append(torch.where(is_independent, across / length, 0.0))
    return torch.stack(done, 1)


def _decode(
    recipe: Recipe, bodies: torch.Tensor, num_tokens: int, num_heads: int, head_dim: int
) -> torch.Tensor:
    """See PagedCodec."""
    sections = Sections(bodies)
    if num_tokens < MIN_TOKENS:
        return sections.take(torch.float16, 2, num_heads, num_tokens, head_dim).float()
    k, v = (_decode_side(side, sections, num_heads) for side in _sides(recipe, num_tokens, head_dim))
    return torch.stack((k.transpose(2, 3), v), 1)


def _decode_side(side: _Side, sections: Sections, num_heads: int) -> torch.Tensor:
    """[num_pages, num_heads, num_vectors, length] fp32."""
    packed_shape = [num_heads, side.num_vectors, side.length]
    packed_shape[side.channel_dim - 1] //= 8 // side.bits
    packed = sections.take(torch.uint8, *packed_shape)
    scales, minima = (
        sections.take(torch.float16, num_heads, side.num_vectors, side.num_groups, 1) for _ in range(2)
    )
    codes = unpack_bits(packed, side.bits, side.channel_dim)
    codes = codes.view(*codes.shape[:3], side.num_groups, -1)
    x = Quantised(codes, scales, minima).numbers().flatten(3)
    left = sections.take(torch.float16, num_heads, side.rank, side.num_vectors).float()
    right = sections.take(torch.float16, num_heads, side.rank, side.length).float()
    if side.rank:
        x += left.mT @ right
    outliers = sections.take(torch.float16, num_heads, side.num_vectors, 2 * side.count)
    places = sections.take(torch.uint8, num_heads, side.num_vectors, 2 * side.count)
    # What is damaged must not reach beyond the vector.
    places = places.long().clamp_(max=side.length - 1)
    return x.scatter_(3, places, outliers.float())


def gear_codec(codec_id: CodecId, recipe: Recipe) -> PagedCodec:
    """GEAR with these numbers."""
    return PagedCodec(
        codec_id, partial(_body_bytes, recipe), partial(_encode, recipe), partial(_decode, recipe)
    )


GEAR = gear_codec(CodecId.GEAR, Recipe(bits=2, rank=2, outlier_share=0.02))
GEAR_L = gear_codec(CodecId.GEAR_L, Recipe(bits=2, rank=2, outlier_share=0.0))
