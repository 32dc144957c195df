"""Where the bytes of a span lie in the memory of a pool, as pieces of consecutive bytes. Pure.

    pool    [layer, K/V, block, token of block, head, head_dim]        order of the wire: [layer, K/V, token, head, head_dim]

A plane is one layer's K or V. Within it the tokens of a span form runs that are consecutive in the pool: blocks that
follow each other, or single tokens where not all heads are wanted. All planes have the same runs.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvtransfer.layout import KvLayout, blocks_needed, head_bytes
from kvtransfer.pool import KvSpan

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """A pool whose memory is one row of bytes."""

    layout: KvLayout
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        """Of the whole pool."""
        return self.num_blocks * self.layout.block_bytes


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces to copy, in the order of the wire; in bytes, [num_pieces] int64 each."""

    source_offsets: Offsets
    target_offsets: Offsets
    lengths: Offsets


def check_span(span: KvSpan, geometry: PoolGeometry) -> None:
    """Raise ValueError, saying which number it is, unless the pool has all of the span."""
    layout = geometry.layout
    size, held = layout.block_size, layout.heads
    if not (0 <= span.layer_lo <= span.layer_hi <= layout.num_layers):
        raise ValueError(f"layers [{span.layer_lo}, {span.layer_hi}) of {layout.num_layers}")
    if not (held[0] <= span.head_lo <= span.head_hi <= held[1]):
        raise ValueError(
            f"heads [{span.head_lo}, {span.head_hi}) of a pool that holds [{held[0]}, {held[1]})"
        )
    if not 0 <= span.first_token < size or span.num_tokens < 0:
        raise ValueError(f"{span.num_tokens} tokens from place {span.first_token} on in blocks of {size}")
    if span.num_tokens and span.first_token + span.num_tokens > len(span.block_ids) * size:
        raise ValueError(
            f"{span.num_tokens} tokens from place {span.first_token} on do not fit "
            f"{len(span.block_ids)} blocks of {size}"
        )
    ids = _ids(span.block_ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < geometry.num_blocks:
        raise ValueError(f"blocks {ids.min()} to {ids.max()} of {geometry.num_blocks}")


def check_same_shape(source: KvSpan, into: KvSpan) -> None:
    """Raise ValueError unless both have as many tokens, layers and heads."""
    ours, theirs = _shape(source), _shape(into)
    if ours != theirs:
        raise ValueError(
            f"[layers, tokens, heads] is {list(ours)} at the source and {list(theirs)} at the target"
        )


def pieces_in(span: KvSpan, pool: PoolGeometry) -> Pieces:
    """From where the span lies in a pool to one row of bytes in the order of the wire. The span must have been checked."""
    starts = _run_starts(span, pool.layout)
    lengths = _lengths(starts, span, pool.layout)
    return Pieces(_offsets(span, pool, starts), np.cumsum(lengths) - lengths, lengths)


def pieces_between(
    source: KvSpan, source_pool: PoolGeometry, into: KvSpan, target_pool: PoolGeometry
) -> Pieces:
    """From pool to pool of one dtype. Both spans must have been checked, and be of the same shape."""
    starts, others = _run_starts(source, source_pool.layout), _run_starts(into, target_pool.layout)
    if not np.array_equal(starts, others):
        # Faster than to sort: there are not many tokens.
        is_start = np.zeros(source.num_tokens, np.bool_)
        is_start[starts] = is_start[others] = True
        starts = np.flatnonzero(is_start)
    return Pieces(
        _offsets(source, source_pool, starts),
        _offsets(into, target_pool, starts),
        _lengths(starts, source, source_pool.layout),
    )


@lru_cache(maxsize=64)
def _ids(block_ids: tuple[int, ...]) -> Offsets:
    """The same as an array: chunks of a transfer name the same blocks for one layer after the other."""
    ids = np.array(block_ids, np.int64)
    ids.flags.writeable = False
    return ids


def _shape(span: KvSpan) -> tuple[int, int, int]:
    """[layers, tokens, heads]."""
    return span.layer_hi - span.layer_lo, span.num_tokens, span.head_hi - span.head_lo


def _run_starts(span: KvSpan, layout: KvLayout) -> Offsets:
    """Tokens of the span that do not lie right after the one before."""
    if 0 in _shape(span):
        return np.zeros(0, np.int64)
    if span.head_hi - span.head_lo < layout.num_heads:
        return np.arange(span.num_tokens, dtype=np.int64)
    num_blocks = blocks_needed(span.first_token + span.num_tokens, layout.block_size)
    ids = _ids(span.block_ids)[:num_blocks]
    is_break = np.ones(num_blocks, np.bool_)
    np.not_equal(ids[1:], ids[:-1] + 1, out=is_break[1:])
    starts: Offsets = np.flatnonzero(is_break) * layout.block_size - span.first_token
    starts[0] = 0
    return starts


def _head_bytes(layout: KvLayout) -> int:
    return head_bytes(layout.dtype, layout.head_dim)


def _lengths(starts: Offsets, span: KvSpan, layout: KvLayout) -> Offsets:
    num_layers, num_tokens, num_heads = _shape(span)
    if not starts.size:
        return starts
    row_bytes = num_heads * _head_bytes(layout)
    lengths = np.empty((2 * num_layers, starts.size), np.int64)
    lengths[:] = starts * -row_bytes
    lengths[:, :-1] += starts[1:] * row_bytes
    lengths[:, -1] += num_tokens * row_bytes
    return lengths.reshape(-1)


def _offsets(span: KvSpan, pool: PoolGeometry, starts: Offsets) -> Offsets:
    """Where runs that start at these tokens begin, in each plane in turn: [planes * runs]."""
    layout = pool.layout
    token_bytes = layout.num_heads * _head_bytes(layout)
    places = starts + span.first_token
    ids = _ids(span.block_ids)[places // layout.block_size]
    slots = ids * layout.block_size + places % layout.block_size
    planes = np.arange(2 * span.layer_lo, 2 * span.layer_hi, dtype=np.int64)
    plane_bytes = pool.num_blocks * layout.block_size * token_bytes
    first_head = (span.head_lo - layout.heads[0]) * _head_bytes(layout)
    return (planes[:, None] * plane_bytes + slots * token_bytes + first_head).reshape(-1)
