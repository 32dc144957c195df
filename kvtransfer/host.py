"""What a transfer needs of the worker it runs in.

Two owners meet here. The engine owns the block pool, in a thread of its own; a transfer lives in the
asyncio loop, where all these methods are called. Blocks that a transfer was given, to send from or to
fill, return to the pool by its word alone: `release`, or `commit`, exactly once. Until then the engine
gives them to nobody, whatever becomes of the request; so no late chunk is ever written into a block
that has a new owner. An engine that wants blocks back aborts the transfer and waits for `release`.
"""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.layout import KvLayout


class KvHost(Protocol):
    """A worker, as its transfers see it. Everything but `reserve` returns at once."""

    @property
    def layout(self) -> KvLayout:
        """What the bytes of the cache mean."""
        ...

    @property
    def incarnation(self) -> int:
        """Grows with every start of the worker."""
        ...

    async def reserve(
        self, transfer_id: str, *, num_tokens: int, max_tokens: int, timeout_s: float
    ) -> Sequence[int]:
        """Pool block ids for `max_tokens` tokens; waits its turn, first come first served.

        When cancelled it withdraws the request and raises CancelledError; blocks that it has been given,
        or will be, it then returns to the pool itself. If it returns them instead, they are released.

        Raises:
            ReservationRefused: there are none, or none came free within `timeout_s` seconds.
        """
        ...

    def write(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int, payload: memoryview) -> None:
        """Scatter `payload`, ordered [layer, K then V, block, token, kv head, head_dim], into the cache."""
        ...

    def read(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> memoryview:
        """The same range gathered from the cache, contiguous and free of the cache's later changes."""
        ...

    def commit(self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Receiver: every byte is there; the blocks are the sequence's. token_ids: what prefill sampled."""
        ...

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """The transfer is done with the blocks, on the sending or the receiving side."""
        ...
