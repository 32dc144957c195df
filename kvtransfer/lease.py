"""Who may fill which blocks, and until when. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one transfer to fill `block_ids`, until `expires_at_s`."""

    lease_id: int
    #: The transfer, which is not the same as the peer that fills the blocks for it.
    owner: str
    block_ids: tuple[int, ...]
    #: How far a renewal reaches.
    lease_s: float
    granted_at_s: float
    expires_at_s: float
    #: No renewal reaches further than this.
    hard_deadline_s: float


class LeaseTable:
    """The leases of one worker. A lease is in it from grant to release; what has expired stays until released.

    Lease ids count up from 1 and are never used again.
    """

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._last_lease_id = 0
        #: Leases whose blocks were committed -> until when that is remembered, oldest first.
        self._settled: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        owner: str,
        block_ids: Sequence[int],
        *,
        now_s: float,
        lease_s: float,
        hard_deadline_s: float,
    ) -> Lease:
        """A new lease on blocks that no other lease holds."""
        self._last_lease_id += 1
        lease = Lease(
            lease_id=self._last_lease_id,
            owner=owner,
            block_ids=tuple(block_ids),
            lease_s=lease_s,
            granted_at_s=now_s,
            expires_at_s=min(now_s + lease_s, hard_deadline_s),
            hard_deadline_s=hard_deadline_s,
        )
        self._leases[lease.lease_id] = lease
        return lease

    def get(self, lease_id: int) -> Lease:
        """The lease as it stands now. Raises KeyError when it was released."""
        return self._leases[lease_id]

    def is_expired(self, lease_id: int, now_s: float) -> bool:
        """True when its time is over; it is then not renewed any more."""
        return now_s >= self._leases[lease_id].expires_at_s

    def renew(self, lease_id: int, now_s: float) -> None:
        """Its holder was heard of. The caller has checked that it has not expired."""
        lease = self._leases[lease_id]
        assert now_s < lease.expires_at_s, lease
        expires_at_s = min(now_s + lease.lease_s, lease.hard_deadline_s)
        self._leases[lease_id] = replace(lease, expires_at_s=expires_at_s)

    def settle(self, lease_id: int, now_s: float) -> None:
        """Its blocks are about to be committed: remembered for the length of a lease, for a sender that did not hear."""
        self._settled = {known: until_s for known, until_s in self._settled.items() if until_s > now_s}
        self._settled[lease_id] = now_s + self._leases[lease_id].lease_s

    def is_settled(self, lease_id: int) -> bool:
        """Its blocks were committed, not long ago."""
        return lease_id in self._settled

    def release(self, lease_id: int) -> Lease:
        """Take the lease out; its blocks are the caller's. Raises KeyError the second time."""
        return self._leases.pop(lease_id)

    def all(self) -> list[Lease]:
        """Every lease that has not been released, oldest first."""
        return list(self._leases.values())

    def expired(self, now_s: float) -> list[Lease]:
        """Leases whose time is over and that nobody has released yet, oldest first."""
        return [lease for lease in self._leases.values() if now_s >= lease.expires_at_s]

    def check_invariants(self) -> None:
        """No block is leased to two transfers; times and ids are in order."""
        # The parts of one transfer have the same blocks, and a lease each.
        blocks_of = {lease.owner: lease.block_ids for lease in self._leases.values()}
        block_ids = [block_id for ids in blocks_of.values() for block_id in ids]
        assert len(block_ids) == len(set(block_ids)), sorted(block_ids)
        assert all(lease.block_ids == blocks_of[lease.owner] for lease in self._leases.values())
        for lease_id, lease in self._leases.items():
            assert lease_id == lease.lease_id <= self._last_lease_id, lease
            assert lease.expires_at_s <= lease.hard_deadline_s, lease
            assert lease.granted_at_s < lease.expires_at_s, lease
