"""The KV of a group as one pool, which rank 0 reads and writes for transfers: each rank's memory is reachable from it.

A step that rank 0 has seen the end of, or a layer after whose MLP it was told of it, is one whose K and V all ranks
have written: the collective that follows in the layer waits for them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvtransfer.layout import KvLayout, check_dtype
from kvtransfer.pieces import PoolGeometry, check_span
from kvtransfer.pool import KvSpan, PoolOffer, span_bytes
from kvtransfer.pool_tensor import payload_tensor, torch_dtype
from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_copy.op import copy_pieces, has_kernel


class GroupPool:
    """The KV caches of all ranks. Implements pool.KvPool for chunks by gRPC; nobody else can read it in place.

    caches: of each rank, what gives [num_layers, 2, num_blocks, block_size, heads, head_dim] on whichever device, called
    when it is first needed. heads: [lo, hi) of the model's KV heads in each, in order; several may have the same. check: raises
    when a rank is gone, and what was computed is worth nothing.
    """

    def __init__(
        self,
        caches: Sequence[Callable[[], torch.Tensor]],
        heads: Sequence[tuple[int, int]],
        layout: KvLayout,
        num_blocks: int,
        check: Callable[[], None],
    ) -> None:
        has_kernel()
        self._open = list(caches)
        self._caches: list[torch.Tensor] = []
        self._heads = list(heads)
        self._layout = layout
        self._geometry = PoolGeometry(layout, num_blocks)
        self._check = check

    @property
    def layout(self) -> KvLayout:
        """With all heads of the model."""
        return self._layout

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        """None: a reader would need the memory of all ranks."""
        return ()

    def checksum(self, span: KvSpan, transport: str) -> int:
        """Nobody reads it in place. Raises ValueError."""
        raise ValueError(
            f"{span.num_tokens} tokens of KV spread over ranks are read by grpc, not by {transport}"
        )

    def read(self, span: KvSpan, out: memoryview) -> int:
        """See pool.KvPool. Raises ValueError when `out` has another size, and what `check` does."""
        check_span(span, self._geometry)
        expected = span_bytes(span, self._layout)
        if out.nbytes != expected:
            raise ValueError(f"{out.nbytes} bytes for a span of {expected}")
        self._wait(0)
        slots, parts, head = self._slots(span), [], span.head_lo
        for index, (lo, hi) in enumerate(self._heads):
            # What a rank before has of them is there already.
            first, last = max(lo, head), min(hi, span.head_hi)
            if first < last:
                rows = self._rows(index, span, first, last)
                parts.append(rows[:, :, slots.to(rows.device)].cpu())
                head = last
        # After what was waited for: a step that ended because its group did has left nothing that could be used.
        self._check()
        joined = torch.cat(parts, dim=3).contiguous() if parts else torch.empty(0, dtype=torch.uint8)
        return _copied(joined.view(-1).view(torch.uint8).numpy(), np.frombuffer(out, np.uint8))

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        """See pool.KvPool. Raises ValueError when the payload has another size."""
        check_dtype(dtype)
        check_span(span, self._geometry)
        expected = span_bytes(span, self._layout, dtype)
        if payload.nbytes != expected:
            raise ValueError(f"{payload.nbytes} bytes for a span of {expected} in {dtype}")
        # A tensor must not share memory that may be read-only.
        staged = torch.empty(expected, dtype=torch.uint8)
        checksum = _copied(np.frombuffer(payload, np.uint8), staged.numpy())
        values = convert(payload_tensor(staged, span, self._layout, dtype), torch_dtype(self._layout.dtype))
        slots = self._slots(span)
        # A step that runs may still write to these blocks for a sequence that has left them, on a stream of each rank's own.
        self._wait(0)
        for index, (lo, hi) in enumerate(self._heads):
            first, last = max(lo, span.head_lo), min(hi, span.head_hi)
            if first < last:
                rows = self._rows(index, span, first, last)
                part = values[:, :, :, first - span.head_lo : last - span.head_lo]
                rows[:, :, slots.to(rows.device)] = part.to(rows.device)
                self._wait(index)
        return checksum

    def _rows(self, index: int, span: KvSpan, head_lo: int, head_hi: int) -> torch.Tensor:
        """[layers, 2, num_slots, heads, head_dim] of one rank's memory."""
        if not self._caches:
            self._caches = [one() for one in self._open]
        lo = self._heads[index][0]
        layers = self._caches[index][span.layer_lo : span.layer_hi]
        return layers.flatten(2, 3)[:, :, :, head_lo - lo : head_hi - lo]

    def _slots(self, span: KvSpan) -> torch.Tensor:
        size = self._layout.block_size
        places = torch.arange(span.first_token, span.first_token + span.num_tokens)
        return torch.tensor(span.block_ids, dtype=torch.int64)[places // size] * size + places % size

    def _wait(self, index: int) -> None:
        """For what rank 0 has launched on this GPU."""
        cache = self._caches[index] if self._caches else self._open[0]()
        if cache.is_cuda:
            torch.cuda.current_stream(cache.device).synchronize()


def _copied(source: np.ndarray, target: np.ndarray) -> int:
    """CRC32C of what was copied."""
    start = np.zeros(1, np.int64)
    return copy_pieces(source, start, target, start, np.array([source.size], np.int64))
