"""What `phasewise kv ledger` prints of each worker, as a table and as JSON. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.cli import table
from orchestrator.cli.transfer_text import seconds
from workers.api import KvLedger, LedgerEntry, WorkerId

#: GEN is the generation: attempt or incarnation.
_HEADER = ("OWNER", "KIND", "BLOCKS", "SHARED", "LEASE", "GEN", "AGE", "PEER")
_LEFT = ("OWNER", "KIND", "PEER")


@dataclass(frozen=True, slots=True)
class WorkerLedger:
    """One worker's answer; `problem` says why there is none."""

    worker_id: WorkerId
    incarnation: int
    ledger: KvLedger | None
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Every block is accounted for, as far as is known."""
        return self.ledger is None or self.ledger.num_accounted_blocks == self.ledger.counts.total


def lines(worker: WorkerLedger) -> list[str]:
    """The text for people."""
    name = f"{worker.worker_id}, incarnation {worker.incarnation}"
    if worker.ledger is None:
        return [f"{name}: NO LEDGER: {worker.problem}"]
    return [
        f"{name}:",
        *table.lines(_HEADER, [_row(entry) for entry in worker.ledger.entries], left=_LEFT),
        f"  {_total(worker.ledger)}",
        *_leaked(worker.ledger),
    ]


def as_json(workers: Sequence[WorkerLedger]) -> dict[str, Any]:
    """The same for programs; `ledger` is null for a worker that did not answer."""
    found = []
    for worker in workers:
        one = asdict(worker)
        if worker.ledger is not None:
            one["ledger"]["leaked_blocks"] = worker.ledger.leaked_blocks
        found.append(one)
    return {
        "workers": found,
        "leaked_blocks": sum(worker.ledger.leaked_blocks for worker in workers if worker.ledger is not None),
    }


def _row(entry: LedgerEntry) -> tuple[str, ...]:
    return (
        entry.owner,
        entry.kind,
        str(entry.num_blocks),
        str(entry.num_shared_blocks),
        "-" if entry.lease_id is None else str(entry.lease_id),
        str(entry.generation) if entry.generation else "-",
        "-" if entry.age_s is None else seconds(entry.age_s),
        entry.peer or "-",
    )


def _total(ledger: KvLedger) -> str:
    counts = ledger.counts
    return (
        f"total {counts.total} blocks: {counts.in_use} in use, {counts.leased} leased, {counts.cached} cached, "
        f"{counts.free} free; {ledger.num_accounted_blocks} accounted for, {ledger.leaked_blocks} leaked"
    )


def _leaked(ledger: KvLedger) -> list[str]:
    if not ledger.leaked_blocks:
        return []
    return [f"  LEAKED: blocks {', '.join(map(str, ledger.leaked_block_ids))}: no owner names them"]
