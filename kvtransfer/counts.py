"""What the transfers of one worker have come to so far. Pure."""

import math
from dataclasses import dataclass

#: Peers that are remembered; beyond that the one not heard of for longest is forgotten.
MAX_PEERS = 256
#: So long a fetch that came too late speaks against fetching from there again, in seconds.
LATE_S = 60.0
#: Weight of the last transfer in the average rate of a peer.
RATE_WEIGHT = 0.3


@dataclass(slots=True)
class TransferCounts:
    """Since the worker started. Bytes are of the KV as it lies in the pools."""

    num_sent: int = 0
    num_received: int = 0
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    num_corrupt_chunks: int = 0
    num_resent_chunks: int = 0
    num_digest_mismatches: int = 0
    num_resumed: int = 0
    num_expired: int = 0
    num_refused: int = 0


@dataclass(slots=True)
class PeerCount:
    """What was sent to, or got from, one worker. transport, reason, codec: of the last transfer."""

    address: str
    is_sending: bool
    transport: str = ""
    reason: str = ""
    codec: str = "none"
    num_transfers: int = 0
    num_bytes: int = 0
    #: KV per second, average of the last transfers; 0 before the first.
    bytes_per_s: float = 0.0
    #: What travelled per second, packed as it was: what the way itself carries.
    wire_bytes_per_s: float = 0.0
    last_problem: str = ""


class PeerCounts:
    """By address and direction."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, bool], PeerCount] = {}
        #: Address -> the rate that a fetch from there did not reach, and until when that is believed.
        self._late: dict[str, tuple[float, float]] = {}

    def all(self) -> list[PeerCount]:
        """The one heard of last comes last."""
        return list(self._peers.values())

    def link_bytes_per_s(self, address: str) -> float | None:
        """What the way there carries, as last measured by sending; None before the first transfer.

        A codec does not make a way faster; of what is copied in place all is counted. What was got from there does not
        count: that time holds the steps of the other's engine, which answers between them.
        """
        peer = self._peers.get((address, True))
        return peer.wire_bytes_per_s if peer is not None and peer.wire_bytes_per_s > 0 else None

    def note_late(self, address: str, *, num_bytes: int, elapsed_s: float, now_s: float) -> None:
        """A fetch of so much from there was given up after this time: the way carries less. Believed for LATE_S."""
        self._late = {name: one for name, one in self._late.items() if now_s < one[1]}
        if elapsed_s > 0:
            bound = min(num_bytes / elapsed_s, self._late.get(address, (math.inf, 0.0))[0])
            self._late[address] = bound, now_s + LATE_S

    def fetch_bound(self, address: str, now_s: float) -> float:
        """Bytes per second that a fetch from there does not reach; infinite when none came too late lately."""
        bound, until_s = self._late.get(address, (math.inf, math.inf))
        return bound if now_s < until_s else math.inf

    def note(
        self,
        address: str,
        *,
        is_sending: bool,
        transport: str,
        reason: str,
        codec: str,
        num_bytes: int,
        num_wire_bytes: int,
        busy_s: float,
        problem: str = "",
    ) -> None:
        """A transfer has ended. busy_s: time in which bytes were on their way. problem: why it failed, unless it did not."""
        peer = self._peers.pop((address, is_sending), None) or PeerCount(address, is_sending)
        self._peers[address, is_sending] = peer
        while len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        peer.num_bytes += num_bytes
        if not is_sending and not problem:
            self._late.pop(address, None)
        if problem:
            peer.last_problem = problem
            return
        peer.transport, peer.reason, peer.codec = transport, reason, codec
        peer.num_transfers += 1
        if busy_s > 0:
            peer.bytes_per_s = _averaged(peer.bytes_per_s, num_bytes / busy_s)
            carried = num_wire_bytes if transport == "grpc" else num_bytes
            peer.wire_bytes_per_s = _averaged(peer.wire_bytes_per_s, carried / busy_s)


def _averaged(known: float, rate: float) -> float:
    return known + RATE_WEIGHT * (rate - known) if known > 0 else rate
