"""Who holds which KV blocks, and which blocks nobody will ever give back. Pure.

The block pool counts how many hold a block; whoever holds blocks says so here by name. A block that the pool takes
for held and that no holder names is leaked.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from workers.api import KvLedger, LedgerEntry, LedgerKind
from workers.engine.block_pool import BlockPool

#: What stands in place of an owner for blocks that are nobody's.
PREFIX_CACHE, NOBODY = "prefix cache", "nobody"
#: Leaked blocks that a text names.
MAX_NAMED_BLOCKS = 16
_ORDER = tuple(LedgerKind)


@dataclass(frozen=True, slots=True)
class Holder:
    """One that holds blocks, or waits for some. generation, peer: see LedgerEntry."""

    owner: str
    kind: LedgerKind
    block_ids: Sequence[int]
    #: When it took the first of them, or began to wait.
    since_s: float
    generation: int = 0
    peer: str = ""


def build_ledger(holders: Iterable[Holder], pool: BlockPool, now_s: float) -> KvLedger:
    """The ledger of a pool whose blocks are held by these, ordered by kind, the oldest of a kind first."""
    free, cached = pool.free_block_ids(), pool.cached_block_ids()
    unnamed = set(range(pool.num_blocks)).difference(free, cached)
    named: set[int] = set()
    entries = []
    for holder in sorted(holders, key=lambda one: (_ORDER.index(one.kind), one.since_s, one.owner)):
        blocks = set(holder.block_ids)
        entries.append(
            LedgerEntry(
                holder.owner,
                holder.kind,
                num_blocks=len(blocks),
                num_shared_blocks=len(blocks & named),
                generation=holder.generation,
                age_s=max(0.0, now_s - holder.since_s),
                peer=holder.peer,
            )
        )
        named |= blocks
    entries += [
        LedgerEntry(PREFIX_CACHE, LedgerKind.CACHED, len(cached)),
        LedgerEntry(NOBODY, LedgerKind.FREE, len(free)),
    ]
    return KvLedger(tuple(entries), pool.counts(), tuple(sorted(unnamed - named)))


def with_leases(ledger: KvLedger, lease_ids: Mapping[str, int]) -> KvLedger:
    """With the lease of each transfer that has one. lease_ids: by transfer id."""
    entries = [
        replace(entry, lease_id=lease_ids.get(entry.owner)) if entry.kind is LedgerKind.RECEIVING else entry
        for entry in ledger.entries
    ]
    return replace(ledger, entries=tuple(entries))


def ledger_text(ledger: KvLedger) -> str:
    """All of it in one line, for the log."""
    counts = ledger.counts
    pool = (
        f"free {counts.free}, cached {counts.cached}, in use {counts.in_use}, leased {counts.leased}, "
        f"total {counts.total}"
    )
    held = "; ".join(
        f"{entry.kind} {entry.owner}/{entry.generation} {entry.num_blocks} blocks for {entry.age_s:.1f} s"
        for entry in ledger.entries
        if entry.age_s is not None
    )
    leaked = ", ".join(map(str, ledger.leaked_block_ids[:MAX_NAMED_BLOCKS]))
    if ledger.leaked_blocks > MAX_NAMED_BLOCKS:
        leaked += ", ..."
    return f"pool: {pool}; held: {held or 'none'}; leaked: {leaked or 'none'}"
