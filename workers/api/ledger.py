"""Who holds which KV blocks of a worker."""

from dataclasses import dataclass
from enum import StrEnum

from workers.api.status import BlockCounts


class LedgerKind(StrEnum):
    """Why an owner holds blocks, in the order in which a ledger lists them."""

    #: A sequence that runs, with its branches.
    SEQUENCE = "sequence"
    #: A transfer that sends from them.
    SENDING = "sending"
    #: A transfer that fills them.
    RECEIVING = "receiving"
    #: KV that has come and whose request has not.
    UNCLAIMED = "unclaimed"
    #: A transfer that was promised blocks when there are some; it has none yet.
    WAITING = "waiting"
    #: Nobody's, but of use to later prompts.
    CACHED = "cached"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The blocks of one owner.

    owner: a request id, a transfer id, or what the blocks are when they are nobody's.
    generation: the attempt of a request; of a transfer the incarnation of the worker on the other side, 0 when it is
    not known. age_s: since it took its first block, or began to wait for it; None when nobody holds them.
    """

    owner: str
    kind: LedgerKind
    num_blocks: int
    #: Of these, blocks that an entry before this one holds too.
    num_shared_blocks: int = 0
    #: Of a transfer that fills blocks, once its lease was granted.
    lease_id: int | None = None
    generation: int = 0
    age_s: float | None = None
    #: host:port of the other side of a transfer; empty when it is not known.
    peer: str = ""


@dataclass(frozen=True, slots=True)
class KvLedger:
    """Who holds which blocks of one worker, at one moment.

    Blocks of the entries, each counted once, and the leaked ones together are all blocks of the pool.
    """

    entries: tuple[LedgerEntry, ...]
    #: The pool's own counts.
    counts: BlockCounts
    #: Blocks that the pool takes for held and that no owner names; always none.
    leaked_block_ids: tuple[int, ...] = ()

    @property
    def leaked_blocks(self) -> int:
        """How many blocks will never come back."""
        return len(self.leaked_block_ids)

    @property
    def num_accounted_blocks(self) -> int:
        """Blocks that have an owner, or are nobody's and can be taken."""
        return sum(entry.num_blocks - entry.num_shared_blocks for entry in self.entries)
