"""Settings of KV transfer. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvTransferConfig:
    """How a worker sends and receives KV."""

    #: A lease ends this long after the last frame of its sender, in seconds.
    lease_s: float = 30.0
    #: Payload of one chunk at most, in bytes; one block of one layer is sent whole in any case.
    max_chunk_bytes: int = 2 * 2**20
    #: Chunks in flight, unacknowledged, per transfer.
    credits: int = 8
    #: KV leaves after this many layers of a prompt chunk have been computed.
    layer_group_size: int = 10
