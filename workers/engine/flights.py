"""Steps that run at the same time, and the blocks that they may still write to. Pure.

Where each step waits for the one before it, whoever gets a block writes to it later than who had it. Of steps on two streams that is
not so: what a sequence gives up while a step of it runs stays held until that step has ended.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from workers.api import LedgerKind
from workers.engine.block_pool import BlockPool
from workers.engine.ledger import Holder
from workers.engine.sequence import Sequence

#: The owner of blocks that are copied from, in the ledger.
COPIES = "copies of a step"


@dataclass(eq=False, slots=True)
class Flight:
    """One step that runs beside another. sequences: that it computes."""

    sequences: frozenset[Sequence]
    #: Blocks of those that left meanwhile, and those that it copies from.
    held: list[Holder]


class Flights:
    """Those of one batch."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._flights: list[Flight] = []

    def __bool__(self) -> bool:
        return bool(self._flights)

    def open(self, sequences: Iterable[Sequence], sources: list[int], now_s: float) -> Flight:
        """A step of these begins. sources: blocks that it copies from, which are given up to it."""
        held = [Holder(COPIES, LedgerKind.SEQUENCE, sources, now_s)] if sources else []
        flight = Flight(frozenset(sequences), held)
        self._flights.append(flight)
        return flight

    def land(self, flight: Flight) -> None:
        """It has ended, or was never begun: nobody writes to what was held for it."""
        self._flights.remove(flight)
        for holder in flight.held:
            self._pool.free(holder.block_ids)

    def give_up(self, sequence: Sequence) -> None:
        """It leaves: its blocks are free, or held for the last step that computes it."""
        for flight in reversed(self._flights):
            if sequence in flight.sequences:
                key = sequence.key
                flight.held.append(
                    Holder(
                        key.request_id,
                        LedgerKind.SEQUENCE,
                        sequence.block_table,
                        sequence.holds_since_s,
                        generation=key.attempt,
                    )
                )
                return
        self._pool.free(sequence.block_table)

    def holders(self) -> Iterator[Holder]:
        """What is held for steps that run."""
        for flight in self._flights:
            yield from flight.held

    def block_ids(self) -> list[int]:
        """All that is held, as often as it is."""
        return [block_id for one in self.holders() for block_id in one.block_ids]
