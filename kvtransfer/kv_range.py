"""Rectangles of a sequence's KV: some layers of some blocks. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.layout import KvLayout


@dataclass(frozen=True, slots=True)
class KvRange:
    """Layers [layer_lo, layer_hi) of blocks [block_lo, block_hi), blocks counted within the sequence."""

    layer_lo: int
    layer_hi: int
    block_lo: int
    block_hi: int

    def __str__(self) -> str:
        return f"layers [{self.layer_lo}, {self.layer_hi}) of blocks [{self.block_lo}, {self.block_hi})"

    @property
    def is_empty(self) -> bool:
        """True when it holds nothing, or its ends are the wrong way round."""
        return self.layer_lo >= self.layer_hi or self.block_lo >= self.block_hi

    def num_bytes(self, layout: KvLayout) -> int:
        """Bytes of K and V in it."""
        return layout.chunk_bytes(
            num_layers=self.layer_hi - self.layer_lo, num_blocks=self.block_hi - self.block_lo
        )


def split(kv_range: KvRange, layout: KvLayout, max_bytes: int) -> Iterator[KvRange]:
    """Parts of at most `max_bytes` each: whole layers if one fits, else some blocks of one layer.

    One block of one layer is never divided, however small `max_bytes` is.
    """
    block_bytes = layout.chunk_bytes(num_layers=1, num_blocks=1)
    num_blocks = kv_range.block_hi - kv_range.block_lo
    layer_step = max(1, max_bytes // (block_bytes * num_blocks))
    block_step = num_blocks if layer_step > 1 else min(num_blocks, max(1, max_bytes // block_bytes))
    for layer in range(kv_range.layer_lo, kv_range.layer_hi, layer_step):
        for block in range(kv_range.block_lo, kv_range.block_hi, block_step):
            yield KvRange(
                layer,
                min(layer + layer_step, kv_range.layer_hi),
                block,
                min(block + block_step, kv_range.block_hi),
            )


class Coverage:
    """Which (layer, block) pairs of a sequence are accounted for: each is to be added exactly once."""

    def __init__(self, num_layers: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        # One integer for each layer; bit b stands for block b.
        self._bits = [0] * num_layers
        self._num_missing = num_layers * num_blocks

    @property
    def num_missing(self) -> int:
        """Pairs not yet added."""
        return self._num_missing

    @property
    def is_complete(self) -> bool:
        """True when nothing is missing."""
        return self._num_missing == 0

    def problem(self, kv_range: KvRange) -> str | None:
        """Why this range cannot be added: empty, outside, or there already. None when it can."""
        num_layers = len(self._bits)
        is_inside = (
            kv_range.layer_lo >= 0
            and kv_range.layer_hi <= num_layers
            and kv_range.block_lo >= 0
            and kv_range.block_hi <= self._num_blocks
        )
        if kv_range.is_empty or not is_inside:
            return f"{kv_range} of {num_layers} layers and {self._num_blocks} blocks"
        mask = _mask(kv_range)
        if any(bits & mask for bits in self._bits[kv_range.layer_lo : kv_range.layer_hi]):
            return f"{kv_range} overlap what came before"
        return None

    def add(self, kv_range: KvRange) -> None:
        """Add a range that has no problem."""
        mask = _mask(kv_range)
        for layer in range(kv_range.layer_lo, kv_range.layer_hi):
            self._bits[layer] |= mask
        self._num_missing -= (kv_range.layer_hi - kv_range.layer_lo) * (kv_range.block_hi - kv_range.block_lo)


def _mask(kv_range: KvRange) -> int:
    return ((1 << (kv_range.block_hi - kv_range.block_lo)) - 1) << kv_range.block_lo
