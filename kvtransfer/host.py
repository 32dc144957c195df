"""What a transfer needs of the worker it runs in.

Two owners meet here. The engine owns the block pool, in a thread of its own; a transfer lives in the
asyncio loop, where all these methods are called. Blocks that a transfer was given, to send from or to
fill, return to the pool by its word alone: `release`, or `commit`, exactly once. Until then the engine
gives them to nobody, whatever becomes of the request; so no late chunk is ever written into a block
that has a new owner. An engine that wants blocks back aborts the transfer and waits for `release`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.pool import KvPool


@dataclass(frozen=True, slots=True)
class CachedKv:
    """KV of a prefix that is kept here, in blocks that are the transfer's until it releases them."""

    block_ids: tuple[int, ...]
    num_tokens: int
    #: Of the last of these blocks, which names all tokens up to there.
    block_hash: bytes


class KvHost(Protocol):
    """A worker, as its transfers see it. Everything but `reserve` and `find_cached` returns at once."""

    @property
    def pool(self) -> KvPool:
        """The memory of its blocks."""
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

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """The longest known beginning of this chain of blocks, held for the transfer.

        Cancelled it returns what it was given to the pool itself.

        Raises:
            ReservationRefused: fewer than `min_tokens` tokens of it are known here.
        """
        ...

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """Receiver: every byte is there; the blocks are the sequence's.

        token_ids: what prefill sampled. token_digest: of the tokens whose KV it is, as the sender knows them.
        """
        ...

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """The transfer is done with the blocks, on the sending or the receiving side."""
        ...
