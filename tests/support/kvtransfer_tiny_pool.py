"""A worker's KV in a few bytes, where every block has an owner at all times."""

import random

import google_crc32c
import numpy as np
import numpy.typing as npt

from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan, span_of

#: What the next owner of a block is taken to write there.
OF_OTHERS = -7.0

Kv = npt.NDArray[np.float16]


class TinyPool:
    """Blocks of small whole numbers in fp16. `owners` has whoever holds a block; a block without one is free."""

    def __init__(self, layout: KvLayout, num_blocks: int, rng: random.Random) -> None:
        self.layout = layout
        self.owners: dict[int, object] = {}
        # [layers, K/V, slots, heads, head_dim]
        shape = (layout.num_layers, 2, num_blocks * layout.block_size, layout.num_heads, layout.head_dim)
        self._slots: Kv = np.full(shape, OF_OTHERS, np.float16)
        self._free = list(range(num_blocks))
        rng.shuffle(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, owner: object, num_blocks: int) -> tuple[int, ...]:
        """Free blocks, which are the owner's from now on."""
        assert num_blocks <= len(self._free), "the test's pool is too small"
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        self.owners.update(dict.fromkeys(taken, owner))
        return tuple(taken)

    def hand_over(self, owner: object, block_ids: tuple[int, ...], to: object) -> None:
        """Blocks change hands."""
        assert all(self.owners.get(i) is owner for i in block_ids), (
            "blocks handed over that are not the transfer's"
        )
        self.owners.update(dict.fromkeys(block_ids, to))

    def give_back(self, owner: object, block_ids: tuple[int, ...]) -> None:
        """Blocks come free, and somebody else writes to them at once."""
        assert block_ids, "no blocks given back"
        for block_id in block_ids:
            assert self.owners.get(block_id) is owner, "blocks given back that are not the transfer's"
            del self.owners[block_id]
            begin = block_id * self.layout.block_size
            self._slots[:, :, begin : begin + self.layout.block_size] = OF_OTHERS
        self._free.extend(block_ids)

    def span(self, block_ids: tuple[int, ...], where: KvRange, heads: tuple[int, int]) -> KvSpan:
        """Where this range of a sequence lies, whose blocks these are."""
        return span_of(
            block_ids,
            self.layout.block_size,
            tokens=(where.token_lo, where.token_hi),
            layers=(where.layer_lo, where.layer_hi),
            heads=heads,
        )

    def read(self, span: KvSpan) -> Kv:
        """[layers, K/V, tokens, heads, head_dim], a copy."""
        first = self.layout.heads[0]
        layers, heads = (
            slice(span.layer_lo, span.layer_hi),
            slice(span.head_lo - first, span.head_hi - first),
        )
        return np.ascontiguousarray(self._slots[layers, :, self._slots_of(span), heads])

    def write(self, span: KvSpan, kv: Kv, owner: object) -> None:
        """kv: as from `read`. All blocks must be the owner's."""
        assert all(self.owners.get(i) is owner for i in span.block_ids), (
            "a chunk written into blocks of others"
        )
        first = self.layout.heads[0]
        layers, heads = (
            slice(span.layer_lo, span.layer_hi),
            slice(span.head_lo - first, span.head_hi - first),
        )
        self._slots[layers, :, self._slots_of(span), heads] = kv

    def _slots_of(self, span: KvSpan) -> list[int]:
        size = self.layout.block_size
        places = range(span.first_token, span.first_token + span.num_tokens)
        return [span.block_ids[place // size] * size + place % size for place in places]


def crc_of(payload: bytes | memoryview) -> int:
    """CRC32C."""
    return int(google_crc32c.value(bytes(payload)))


def random_kv(layout: KvLayout, num_tokens: int, rng: random.Random) -> Kv:
    """[layers, K/V, tokens, heads, head_dim]: numbers that fp16 and fp32 hold exactly."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_heads, layout.head_dim)
    numbers = rng.randbytes(int(np.prod(shape)))
    return np.frombuffer(numbers, np.uint8).astype(np.float16).reshape(shape)
