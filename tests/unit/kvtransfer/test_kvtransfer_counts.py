"""What was exchanged with each peer."""

import math

from kvtransfer.counts import LATE_S, MAX_PEERS, RATE_WEIGHT, PeerCount, PeerCounts


def note(
    peers: PeerCounts,
    address: str = "a:1",
    *,
    is_sending: bool = True,
    num_bytes: int = 100,
    num_wire_bytes: int | None = None,
    transport: str = "grpc",
    busy_s: float = 1.0,
    problem: str = "",
) -> None:
    peers.note(
        address,
        is_sending=is_sending,
        transport=transport,
        reason="no offer",
        codec="none",
        num_bytes=num_bytes,
        num_wire_bytes=num_bytes if num_wire_bytes is None else num_wire_bytes,
        busy_s=busy_s,
        problem=problem,
    )


def test_transfers_to_and_from_a_peer_are_counted_apart() -> None:
    peers = PeerCounts()
    note(peers)
    note(peers, is_sending=False, busy_s=0.0)
    sending, receiving = peers.all()
    assert (sending.is_sending, sending.bytes_per_s) == (True, 100.0)
    assert receiving == PeerCount("a:1", False, "grpc", "no offer", "none", num_transfers=1, num_bytes=100)


def test_the_rate_is_an_average_that_follows_the_last_transfers() -> None:
    peers = PeerCounts()
    assert peers.link_bytes_per_s("a:1") is None
    note(peers, num_bytes=100)
    note(peers, num_bytes=200)
    assert peers.link_bytes_per_s("a:1") == 100 + RATE_WEIGHT * 100
    assert peers.link_bytes_per_s("b:1") is None


def test_what_was_got_says_nothing_of_the_way_there() -> None:
    peers = PeerCounts()
    note(peers, is_sending=False, num_bytes=300)
    assert peers.link_bytes_per_s("a:1") is None
    note(peers, num_bytes=100)
    assert peers.link_bytes_per_s("a:1") == 100.0


def test_a_codec_does_not_make_a_way_faster() -> None:
    peers = PeerCounts()
    note(peers, num_bytes=400, num_wire_bytes=100)
    [peer] = peers.all()
    assert (peer.bytes_per_s, peers.link_bytes_per_s("a:1")) == (400.0, 100.0)


def test_of_what_is_copied_in_place_all_is_carried() -> None:
    peers = PeerCounts()
    note(peers, num_bytes=400, num_wire_bytes=1, transport="shm")
    assert peers.link_bytes_per_s("a:1") == 400.0


def test_a_transfer_that_took_no_time_has_no_rate() -> None:
    peers = PeerCounts()
    note(peers, busy_s=0.0)
    assert peers.link_bytes_per_s("a:1") is None


def test_a_transfer_that_failed_leaves_its_problem_and_no_rate() -> None:
    peers = PeerCounts()
    note(peers, num_bytes=30, problem="the stream broke")
    [peer] = peers.all()
    assert (peer.last_problem, peer.num_bytes, peer.num_transfers) == ("the stream broke", 30, 0)
    assert (peer.transport, peer.bytes_per_s) == ("", 0.0)


def test_the_peer_that_was_not_heard_of_for_longest_is_forgotten() -> None:
    peers = PeerCounts()
    for i in range(MAX_PEERS):
        note(peers, f"a:{i}")
    note(peers, "a:0")
    note(peers, "b:0")
    known = [peer.address for peer in peers.all()]
    assert len(known) == MAX_PEERS
    assert "a:1" not in known
    assert known[-2:] == ["a:0", "b:0"]


def test_a_fetch_that_was_late_bounds_the_rate_until_one_comes_or_time_has_passed() -> None:
    peers = PeerCounts()
    assert peers.fetch_bound("a:1", 0.0) == math.inf
    peers.note_late("a:1", num_bytes=100, elapsed_s=2.0, now_s=0.0)
    peers.note_late("a:1", num_bytes=100, elapsed_s=1.0, now_s=1.0)
    assert peers.fetch_bound("a:1", LATE_S) == 50.0
    assert peers.fetch_bound("a:1", LATE_S + 1.0) == math.inf
    note(peers, is_sending=False, problem="broken")
    note(peers, is_sending=True)
    assert peers.fetch_bound("a:1", 2.0) == 50.0
    note(peers, is_sending=False)
    assert peers.fetch_bound("a:1", 2.0) == math.inf
