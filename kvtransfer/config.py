"""Settings of KV transfer. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from kvtransfer.codecs.codec import CodecId


class TransportChoice(StrEnum):
    """How KV may travel. AUTO takes the best way that both workers can use; another takes that or refuses."""

    AUTO = "auto"
    IN_PROCESS = "in_process"
    SHM = "shm"
    GRPC = "grpc"
    CUDA_IPC = "cuda_ipc"
    NIXL = "nixl"


@dataclass(frozen=True, slots=True)
class KvTransferConfig:
    """How a worker sends and receives KV."""

    #: A lease ends this long after the last frame of its sender, in seconds.
    lease_s: float = 30.0
    #: A transfer whose stream broke can be resumed for so long, in seconds; 0 ends it at once.
    resume_s: float = 5.0
    #: Payload of one chunk at most, in bytes; one block of one layer is sent whole in any case. Smaller ones cost more
    #: work of the interpreter for each byte, larger ones leave the caches between one copy and the next.
    max_chunk_bytes: int = 4 * 2**20
    #: Chunks in flight, unacknowledged, per transfer.
    credits: int = 4
    #: KV leaves after this many layers of a prompt chunk have been computed; None chooses it from what is measured.
    layer_group_size: int | None = None
    transport: TransportChoice = TransportChoice.AUTO
    #: Connections that the chunks of one transfer are spread over, when they carry their payload.
    num_streams: int = 1
    #: The beginnings of prompts are got from other workers where that is faster than computing them.
    is_prefix_fetched: bool = True
    #: None chooses one for each transfer, from the measured rate of the way: lossy when that is slow.
    codec: CodecId | None = CodecId.NONE
