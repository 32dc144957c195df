"""What a worker tells of its KV, to and from phasewise.worker.v1: ledger, transfers, peers. Pure."""

from protos import worker_pb2 as pb
from workers.api import (
    BlockCounts,
    KvDirection,
    KvLedger,
    KvPeer,
    KvReuseCounts,
    KvTransferCounts,
    KvTransferred,
    LedgerEntry,
    LedgerKind,
    RequestKey,
)

_KINDS = {
    LedgerKind.SEQUENCE: pb.LEDGER_KIND_SEQUENCE,
    LedgerKind.SENDING: pb.LEDGER_KIND_SENDING,
    LedgerKind.RECEIVING: pb.LEDGER_KIND_RECEIVING,
    LedgerKind.UNCLAIMED: pb.LEDGER_KIND_UNCLAIMED,
    LedgerKind.WAITING: pb.LEDGER_KIND_WAITING,
    LedgerKind.CACHED: pb.LEDGER_KIND_CACHED,
    LedgerKind.FREE: pb.LEDGER_KIND_FREE,
}
_DIRECTIONS = {
    KvDirection.SENDING: pb.KV_DIRECTION_SENDING,
    KvDirection.RECEIVING: pb.KV_DIRECTION_RECEIVING,
}
_KIND_OF = {value: key for key, value in _KINDS.items()}
_DIRECTION_OF = {value: key for key, value in _DIRECTIONS.items()}


def block_counts_to_pb(counts: BlockCounts) -> pb.BlockCounts:
    """The four counts and their sum."""
    return pb.BlockCounts(
        free=counts.free,
        cached=counts.cached,
        in_use=counts.in_use,
        leased=counts.leased,
        total=counts.total,
    )


def block_counts_from_pb(message: pb.BlockCounts) -> BlockCounts:
    """The four counts and their sum."""
    return BlockCounts(message.free, message.cached, message.in_use, message.leased, message.total)


def ledger_to_pb(ledger: KvLedger, worker_id: str, incarnation: int) -> pb.KvLedger:
    """The ledger of this worker."""
    return pb.KvLedger(
        entries=map(_entry_to_pb, ledger.entries),
        counts=block_counts_to_pb(ledger.counts),
        leaked_block_ids=ledger.leaked_block_ids,
        worker_id=worker_id,
        incarnation=incarnation,
    )


def ledger_from_pb(message: pb.KvLedger) -> KvLedger:
    """Who holds what. An owner of a kind that this version does not know counts as a sequence: it holds blocks."""
    return KvLedger(
        tuple(map(_entry_from_pb, message.entries)),
        block_counts_from_pb(message.counts),
        tuple(message.leaked_block_ids),
    )


def _entry_to_pb(entry: LedgerEntry) -> pb.LedgerEntry:
    return pb.LedgerEntry(
        owner=entry.owner,
        kind=_KINDS[entry.kind],
        num_blocks=entry.num_blocks,
        num_shared_blocks=entry.num_shared_blocks,
        lease_id=entry.lease_id,
        generation=entry.generation,
        age_s=entry.age_s,
        peer=entry.peer,
    )


def _entry_from_pb(message: pb.LedgerEntry) -> LedgerEntry:
    return LedgerEntry(
        owner=message.owner,
        kind=_KIND_OF.get(message.kind, LedgerKind.SEQUENCE),
        num_blocks=message.num_blocks,
        num_shared_blocks=message.num_shared_blocks,
        lease_id=message.lease_id if message.HasField("lease_id") else None,
        generation=message.generation,
        age_s=message.age_s if message.HasField("age_s") else None,
        peer=message.peer,
    )


def transfer_counts_to_pb(counts: KvTransferCounts) -> pb.KvTransferCounts:
    """Of all hand-offs of a worker."""
    return pb.KvTransferCounts(
        num_sent=counts.num_sent,
        num_received=counts.num_received,
        num_bytes_sent=counts.num_bytes_sent,
        num_bytes_received=counts.num_bytes_received,
        num_corrupt_chunks=counts.num_corrupt_chunks,
        num_resent_chunks=counts.num_resent_chunks,
        num_digest_mismatches=counts.num_digest_mismatches,
        num_resumed=counts.num_resumed,
        num_expired=counts.num_expired,
        num_refused=counts.num_refused,
    )


def transfer_counts_from_pb(message: pb.KvTransferCounts) -> KvTransferCounts:
    """Of all hand-offs of a worker."""
    return KvTransferCounts(
        num_sent=message.num_sent,
        num_received=message.num_received,
        num_bytes_sent=message.num_bytes_sent,
        num_bytes_received=message.num_bytes_received,
        num_corrupt_chunks=message.num_corrupt_chunks,
        num_resent_chunks=message.num_resent_chunks,
        num_digest_mismatches=message.num_digest_mismatches,
        num_resumed=message.num_resumed,
        num_expired=message.num_expired,
        num_refused=message.num_refused,
    )


def reuse_counts_to_pb(counts: KvReuseCounts) -> pb.KvReuseCounts:
    """Of the KV that a worker did not compute again."""
    return pb.KvReuseCounts(
        num_cached_tokens=counts.num_cached_tokens,
        num_reused_tokens=counts.num_reused_tokens,
        num_prefixes_asked=counts.num_prefixes_asked,
        num_prefixes_fetched=counts.num_prefixes_fetched,
        num_prefixes_refused=counts.num_prefixes_refused,
        num_fetched_tokens=counts.num_fetched_tokens,
        fetch_s=counts.fetch_s,
        num_host_blocks=counts.num_host_blocks,
        num_host_bytes=counts.num_host_bytes,
        num_host_saved=counts.num_host_saved,
        num_host_hits=counts.num_host_hits,
        num_host_dropped=counts.num_host_dropped,
        num_host_corrupt=counts.num_host_corrupt,
    )


def reuse_counts_from_pb(message: pb.KvReuseCounts) -> KvReuseCounts:
    """Of the KV that a worker did not compute again."""
    return KvReuseCounts(
        num_cached_tokens=message.num_cached_tokens,
        num_reused_tokens=message.num_reused_tokens,
        num_prefixes_asked=message.num_prefixes_asked,
        num_prefixes_fetched=message.num_prefixes_fetched,
        num_prefixes_refused=message.num_prefixes_refused,
        num_fetched_tokens=message.num_fetched_tokens,
        fetch_s=message.fetch_s,
        num_host_blocks=message.num_host_blocks,
        num_host_bytes=message.num_host_bytes,
        num_host_saved=message.num_host_saved,
        num_host_hits=message.num_host_hits,
        num_host_dropped=message.num_host_dropped,
        num_host_corrupt=message.num_host_corrupt,
    )


def peer_to_pb(peer: KvPeer) -> pb.KvPeer:
    """What was exchanged with one other worker."""
    return pb.KvPeer(
        address=peer.address,
        direction=_DIRECTIONS[peer.direction],
        transport=peer.transport,
        reason=peer.reason,
        codec=peer.codec,
        num_transfers=peer.num_transfers,
        num_bytes=peer.num_bytes,
        bytes_per_s=peer.bytes_per_s,
        last_problem=peer.last_problem,
    )


def peer_from_pb(message: pb.KvPeer) -> KvPeer | None:
    """What was exchanged with one other worker; None for a direction that this version does not know."""
    direction = _DIRECTION_OF.get(message.direction)
    if direction is None:
        return None
    return KvPeer(
        address=message.address,
        direction=direction,
        transport=message.transport,
        reason=message.reason,
        codec=message.codec,
        num_transfers=message.num_transfers,
        num_bytes=message.num_bytes,
        bytes_per_s=message.bytes_per_s,
        last_problem=message.last_problem,
    )


def kv_transferred_to_pb(event: KvTransferred) -> pb.KvTransferred:
    """How one hand-off went."""
    return pb.KvTransferred(
        num_bytes=event.num_bytes,
        num_chunks=event.num_chunks,
        transfer_s=event.transfer_s,
        exposed_s=event.exposed_s,
        transport=event.transport,
        transport_reason=event.transport_reason,
        codec=event.codec,
        num_wire_bytes=event.num_wire_bytes,
        num_resent_chunks=event.num_resent_chunks,
        num_resumes=event.num_resumes,
        busy_s=event.busy_s,
    )


def kv_transferred_from_pb(key: RequestKey, message: pb.KvTransferred) -> KvTransferred:
    """How the hand-off of this attempt went."""
    return KvTransferred(
        key,
        num_bytes=message.num_bytes,
        num_chunks=message.num_chunks,
        transfer_s=message.transfer_s,
        exposed_s=message.exposed_s,
        transport=message.transport,
        transport_reason=message.transport_reason,
        codec=message.codec,
        num_wire_bytes=message.num_wire_bytes,
        num_resent_chunks=message.num_resent_chunks,
        num_resumes=message.num_resumes,
        busy_s=message.busy_s,
    )
