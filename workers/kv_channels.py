"""Connections to other workers, shared by the transfers that send to them and fetch from them."""

from dataclasses import dataclass, field

import grpc.aio

from kvtransfer.grpc_stream import GRPC_OPTIONS

#: Channels kept while no transfer uses them; beyond that the one that is idle longest is closed.
MAX_IDLE_CHANNELS = 32
#: A connection of its own: one that failed must not make the next channel wait out its back-off.
#: Addresses are the cluster's own: no proxy.
CHANNEL_OPTIONS = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


@dataclass(eq=False, slots=True)
class Peer:
    """A worker's address and the channels to it: one for control, and those that chunks are spread over."""

    address: str
    channel: grpc.aio.Channel
    data_channels: list[grpc.aio.Channel] = field(default_factory=list)
    num_users: int = 0

    async def close(self) -> None:
        """All of them."""
        for channel in (self.channel, *self.data_channels):
            await channel.close()


class PeerChannels:
    """Channels by address. Those in use are bounded by the transfers, the idle ones by a number."""

    def __init__(self, max_idle: int, *, num_data_channels: int = 1) -> None:
        """num_data_channels: connections that the chunks of a transfer are spread over; 1 is the one for control."""
        self._max_idle = max_idle
        self._num_data_channels = num_data_channels if num_data_channels > 1 else 0
        #: The one whose last use is longest ago comes first.
        self._peers: dict[str, Peer] = {}

    def take(self, address: str) -> Peer:
        """The channel to this address, until `give_back`."""
        peer = self._peers.pop(address, None)
        if peer is None:
            peer = Peer(address, _connect(address))
            peer.data_channels.extend(_connect(address) for _ in range(self._num_data_channels))
        self._peers[address] = peer
        peer.num_users += 1
        return peer

    async def give_back(self, peer: Peer, *, is_lost: bool) -> None:
        """is_lost: the connection broke; the next transfer to this address gets another channel."""
        peer.num_users -= 1
        if is_lost and self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        idle = [known for known in self._peers.values() if known.num_users == 0]
        to_close = idle[: max(0, len(idle) - self._max_idle)]
        for surplus in to_close:
            del self._peers[surplus.address]
        if peer.num_users == 0 and self._peers.get(peer.address) is not peer and peer not in to_close:
            to_close.append(peer)
        for closing in to_close:
            await closing.close()

    async def close(self) -> None:
        """All of them; no transfer runs any more."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.close()


def _connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
