"""Which way KV takes between two workers, as the manifest allows."""

from collections.abc import Sequence

from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.errors import ReservationRefused
from kvtransfer.pool import MappedPool, PoolOffer
from kvtransfer.transports.opening import PoolOpener


def offers_of(offers: Sequence[PoolOffer], config: KvTransferConfig) -> tuple[PoolOffer, ...]:
    """Those of a pool's ways to read it that may be offered."""
    if config.transport is TransportChoice.AUTO:
        return tuple(offers)
    return tuple(offer for offer in offers if offer.transport == config.transport)


class TransportOpener:
    """Opens senders' pools by the ways that `choice` allows. Implements pool.PoolOpener."""

    def __init__(self, choice: TransportChoice) -> None:
        self._choice = choice
        self._pools = PoolOpener()

    async def open(self, offers: Sequence[PoolOffer]) -> tuple[str, MappedPool | None, str]:
        """See pool.PoolOpener."""
        if self._choice is TransportChoice.GRPC:
            return "grpc", None, "kvTransfer.transport is grpc"
        is_auto = self._choice is TransportChoice.AUTO
        allowed = [one for one in offers if is_auto or one.transport == self._choice]
        transport, pool, notes = await self._pools.open(allowed)
        if pool is None and not is_auto:
            reason = f"kvTransfer.transport is {self._choice}, which cannot be had: "
            reason += (
                notes
                or f"the sender offers {', '.join(one.transport for one in offers) or 'no way to read its pool'}"
            )
            # One that only took too long may be there the next time.
            is_coming = any(self._pools.has_begun(one) for one in allowed)
            raise ReservationRefused("", reason, retryable=is_coming)
        return (
            transport,
            pool,
            notes or ("" if pool is not None else "the sender's pool cannot be read from outside"),
        )

    def close(self, pool: MappedPool) -> None:
        """See pool.PoolOpener."""
        self._pools.release(pool)

    def close_all(self) -> None:
        """Close every pool that is open; no transfer runs any more. May be called again."""
        self._pools.close()
