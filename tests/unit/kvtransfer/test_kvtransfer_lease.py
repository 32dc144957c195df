"""The lease table."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.lease import LeaseTable


def test_a_renewal_reaches_one_lease_length_from_now() -> None:
    table = LeaseTable()
    lease = table.grant("t1", [3, 1], now_s=10.0, lease_s=5.0, hard_deadline_s=100.0)
    assert (lease.owner, lease.block_ids, lease.expires_at_s) == ("t1", (3, 1), 15.0)
    table.renew(lease.lease_id, 14.0)
    assert table.get(lease.lease_id).expires_at_s == 19.0
    assert not table.is_expired(lease.lease_id, 18.9)
    assert table.is_expired(lease.lease_id, 19.0)


def test_no_renewal_reaches_past_the_hard_deadline() -> None:
    table = LeaseTable()
    lease = table.grant("t1", [1], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    table.renew(lease.lease_id, 4.0)
    assert table.get(lease.lease_id).expires_at_s == 7.0


def test_an_expired_lease_is_not_renewed() -> None:
    table = LeaseTable()
    lease = table.grant("t1", [1], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    with pytest.raises(AssertionError):
        table.renew(lease.lease_id, 5.0)


def test_an_expired_lease_keeps_its_blocks_until_it_is_released() -> None:
    table = LeaseTable()
    lease = table.grant("t1", [1, 2], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    assert table.expired(4.9) == []
    assert table.expired(5.0) == [lease]
    assert table.release(lease.lease_id).block_ids == (1, 2)
    assert table.expired(5.0) == []


def test_a_lease_is_released_once() -> None:
    table = LeaseTable()
    lease = table.grant("t1", [1], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    table.release(lease.lease_id)
    with pytest.raises(KeyError):
        table.release(lease.lease_id)


def test_one_block_under_two_leases_breaks_the_invariant() -> None:
    table = LeaseTable()
    table.grant("t1", [1, 2], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    table.grant("t2", [2], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    with pytest.raises(AssertionError):
        table.check_invariants()


def test_the_parts_of_one_transfer_share_its_blocks() -> None:
    table = LeaseTable()
    for _ in range(2):
        table.grant("t1", [1, 2], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    table.check_invariants()
    table.grant("t1", [1, 3], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0)
    with pytest.raises(AssertionError):
        table.check_invariants()


def test_a_lease_that_was_committed_is_remembered_for_its_length() -> None:
    table = LeaseTable()
    first = table.grant("t1", [1], now_s=0.0, lease_s=5.0, hard_deadline_s=70.0)
    table.settle(first.lease_id, 1.0)
    table.release(first.lease_id)
    assert table.is_settled(first.lease_id)
    assert len(table) == 0
    second = table.grant("t2", [1], now_s=6.0, lease_s=5.0, hard_deadline_s=70.0)
    assert not table.is_settled(second.lease_id)
    # Those whose time is over are forgotten with the next one.
    table.settle(second.lease_id, 6.0)
    assert not table.is_settled(first.lease_id)
    assert table.is_settled(second.lease_id)


def test_all_leases_are_those_that_were_not_released() -> None:
    table = LeaseTable()
    leases = [table.grant(f"t{i}", [i], now_s=0.0, lease_s=5.0, hard_deadline_s=7.0) for i in range(3)]
    table.release(leases[1].lease_id)
    assert table.all() == [leases[0], leases[2]]


class LeaseTableModel(RuleBasedStateMachine):
    """The table against a dictionary of expiry times."""

    @initialize()
    def start(self) -> None:
        self.table = LeaseTable()
        self.now_s = 0.0
        self.expiry_s: dict[int, float] = {}
        self.granted: list[int] = []

    @rule(lease_s=st.integers(1, 9), total_s=st.integers(1, 20), num_blocks=st.integers(1, 3))
    def grant(self, lease_s: int, total_s: int, num_blocks: int) -> None:
        first = len(self.granted) * 3
        lease = self.table.grant(
            f"t{first}",
            range(first, first + num_blocks),
            now_s=self.now_s,
            lease_s=lease_s,
            hard_deadline_s=self.now_s + total_s,
        )
        assert lease.lease_id not in self.granted
        self.granted.append(lease.lease_id)
        self.expiry_s[lease.lease_id] = self.now_s + min(lease_s, total_s)

    @precondition(lambda self: self.expiry_s)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.expiry_s)))
        self.table.release(lease_id)
        del self.expiry_s[lease_id]

    @rule(step_s=st.integers(1, 5))
    def time_passes(self, step_s: int) -> None:
        self.now_s += step_s
        for lease_id, expires_at_s in self.expiry_s.items():
            if self.now_s < expires_at_s:
                self.table.renew(lease_id, self.now_s)
                lease = self.table.get(lease_id)
                self.expiry_s[lease_id] = min(self.now_s + lease.lease_s, lease.hard_deadline_s)

    @invariant()
    def expired_are_those_whose_time_is_over(self) -> None:
        self.table.check_invariants()
        expired = {lease.lease_id for lease in self.table.expired(self.now_s)}
        assert expired == {i for i, expires_at_s in self.expiry_s.items() if expires_at_s <= self.now_s}
        assert len(self.table) == len(self.expiry_s)


TestLeaseTableModel = LeaseTableModel.TestCase
