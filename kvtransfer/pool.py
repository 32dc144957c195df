"""Memory that holds KV, as transfers see it: what is read from it, written to it, and read from another's. Pure.

Implementations: `host_pool.HostPool` (CPU, private or shared memory), `transports.cuda_ipc.CudaPool`. All are called
in the asyncio loop and return when the bytes are where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.layout import KvLayout, head_bytes


@dataclass(frozen=True, slots=True)
class KvSpan:
    """Some tokens of one sequence in some layers and heads, and the blocks of a pool where they lie.

    block_ids: the blocks of these tokens, in order. first_token: place of the first one in the first block,
    0 <= first_token < block_size. Layers and heads are those of the model; the pool must hold them.
    """

    block_ids: tuple[int, ...]
    first_token: int
    num_tokens: int
    layer_lo: int
    layer_hi: int
    head_lo: int
    head_hi: int


def span_of(
    block_ids: Sequence[int],
    block_size: int,
    *,
    tokens: tuple[int, int],
    layers: tuple[int, int],
    heads: tuple[int, int],
) -> KvSpan:
    """The span of tokens [lo, hi) of a sequence whose blocks are `block_ids`, the first of which holds token 0."""
    lo, hi = tokens
    blocks = tuple(block_ids[lo // block_size : -(-hi // block_size)])
    return KvSpan(blocks, lo % block_size, hi - lo, *layers, *heads)


@dataclass(frozen=True, slots=True)
class PoolOffer:
    """How another process may read this pool by itself.

    transport: "in_process", "shm", "cuda_ipc" or "nixl". descriptor: what that transport needs to find it, at most
    some kilobytes.
    """

    transport: str
    descriptor: bytes


class MappedPool(Protocol):
    """Another worker's pool, readable from here until `close`."""

    def pull(self, source: KvSpan, target: "KvPool", into: KvSpan) -> int:
        """Copy `source` of that pool into `into` of `target`, which has as many tokens, layers and heads.

        Returns the checksum of what was read, in the order of the wire and the dtype of the source, as `KvPool.checksum`
        of the source gives it. Converts the dtype where the two differ.

        Raises ConnectionError when the memory cannot be read any more.
        """
        ...

    def close(self) -> None:
        """Unmap it. Closing twice does nothing."""
        ...


class PoolOpener(Protocol):
    """Opens the pools of senders, each once for all transfers."""

    async def open(self, offers: Sequence[PoolOffer]) -> tuple[str, MappedPool | None, str]:
        """The best way to read a pool: its transport, the pool, and why no better one; ("grpc", None, why) without.

        Raises ReservationRefused when the way that must be taken cannot be. Every pool that was opened is given to
        `close`.
        """
        ...

    def close(self, pool: MappedPool) -> None:
        """A transfer has ended that used it."""
        ...


class KvPool(Protocol):
    """The KV memory of one worker."""

    @property
    def layout(self) -> KvLayout:
        """What its bytes mean."""
        ...

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        """How others may read it, the best way first; empty when they cannot."""
        ...

    def checksum(self, span: KvSpan, transport: str) -> int:
        """Of the span's bytes in the order of the wire, as `MappedPool.pull` of that transport gives it; < 2**64.

        CRC32C for memory of the host.
        """
        ...

    def read(self, span: KvSpan, out: memoryview) -> int:
        """Gather the span into `out`, in the order of the wire and the pool's dtype; returns its CRC32C."""
        ...

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        """Scatter what `read` of a pool of this dtype gave, converted if need be; returns the payload's CRC32C.

        Raises ValueError when the payload has another size.
        """
        ...


def span_bytes(span: KvSpan, layout: KvLayout, dtype: str | None = None) -> int:
    """Payload of a span. dtype: of the bytes, when it is not the pool's."""
    per_token = 2 * (span.head_hi - span.head_lo) * head_bytes(dtype or layout.dtype, layout.head_dim)
    return (span.layer_hi - span.layer_lo) * span.num_tokens * per_token
