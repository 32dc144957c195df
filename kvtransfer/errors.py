"""Everything that ends a transfer early, as one tree: whose fault it is comes first.

    PhasewiseTransferError
    ├── CallerError               what this side was asked to do
    │   ├── TransferAborted       the caller gave it up
    │   ├── DeadlineExceeded      the time that the caller gave has passed
    │   └── InvalidTransfer       the caller's numbers contradict each other
    ├── OwnError                  this side's resources
    │   ├── ReservationRefused    no blocks for it here
    │   ├── SharedMemoryUnavailable  memory that others may read cannot be had
    │   ├── TransportUnavailable  a way that must be taken cannot be offered
    │   ├── TooManyStreams        streams that have not said what they are for
    │   └── HostFailed            the cache behind this side raised
    └── PeerError                 the other side, or the way to it
        ├── TransferRefused       it does not take the transfer, with its reason
        ├── TransferEnded         it gave the transfer up, with its reason
        ├── ChunkRejected         it took a chunk as damaged time after time
        ├── DigestMismatch        its chunks are whole, and together not what they should be
        ├── LeaseExpired          nothing was heard of it for the length of a lease
        ├── StreamLost            the stream broke
        ├── PoolUnreachable       its memory cannot be read from here
        ├── ProtocolViolation     it sent what its state does not allow
        └── MalformedFrame        it sent bytes that are not a frame
            └── CorruptFrame      the checksum says that they were one

A leaf passes its fields to `Exception`, so that it survives pickling; its message is built from them.
`retryable` says whether the same transfer may succeed later, or to another worker.
"""
# ruff: noqa: N818 - leaves are named by what happened; the forks above them end in Error.


class PhasewiseTransferError(Exception):
    """Base of all errors of this package."""

    retryable: bool = True


class CallerError(PhasewiseTransferError):
    """What this side was asked to do is at fault, or over."""

    retryable = False


class OwnError(PhasewiseTransferError):
    """This side could not do its part."""


class PeerError(PhasewiseTransferError):
    """The other side, or the way to it, is at fault."""


class TransferAborted(CallerError):
    """The caller on this side gave the transfer up."""

    def __init__(self, transfer_id: str, reason: str) -> None:
        super().__init__(transfer_id, reason)
        self.transfer_id = transfer_id
        self.reason = reason

    def __str__(self) -> str:
        return f"transfer {self.transfer_id} was aborted: {self.reason}"


class DeadlineExceeded(CallerError):
    """The transfer was still `state` when its `timeout_s` seconds had passed."""

    def __init__(self, transfer_id: str, state: str, timeout_s: float) -> None:
        super().__init__(transfer_id, state, timeout_s)
        self.transfer_id = transfer_id
        self.state = state
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"transfer {self.transfer_id} was still {self.state} after {self.timeout_s:g} s"


class InvalidTransfer(CallerError):
    """What the caller said of the KV to send contradicts what it said before."""

    def __init__(self, transfer_id: str, problem: str) -> None:
        super().__init__(transfer_id, problem)
        self.transfer_id = transfer_id
        self.problem = problem

    def __str__(self) -> str:
        return f"transfer {self.transfer_id} is impossible: {self.problem}"


class ReservationRefused(OwnError):
    """The host has no blocks for a transfer. Raised by `KvHost.reserve`, told to the sender."""

    def __init__(self, transfer_id: str, reason: str, retryable: bool) -> None:
        super().__init__(transfer_id, reason, retryable)
        self.transfer_id = transfer_id
        self.reason = reason
        self.retryable = retryable

    def __str__(self) -> str:
        return f"no blocks for transfer {self.transfer_id}: {self.reason}"


class SharedMemoryUnavailable(OwnError):
    """`num_bytes` of memory that other processes may read cannot be had."""

    def __init__(self, num_bytes: int, reason: str) -> None:
        super().__init__(num_bytes, reason)
        self.num_bytes = num_bytes
        self.reason = reason

    def __str__(self) -> str:
        return f"no {self.num_bytes} bytes of shared memory: {self.reason}"


class TransportUnavailable(OwnError):
    """This process cannot offer its pool by this transport."""

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(transport, reason)
        self.transport = transport
        self.reason = reason

    def __str__(self) -> str:
        return f"the transport {self.transport} cannot be used here: {self.reason}"


class TooManyStreams(OwnError):
    """`max_streams` streams wait to say what they are for: one more is not listened to."""

    def __init__(self, max_streams: int) -> None:
        super().__init__(max_streams)
        self.max_streams = max_streams

    def __str__(self) -> str:
        return f"{self.max_streams} streams have not said what they are for; open another later"


class HostFailed(OwnError):
    """The cache behind this side raised while it was read or written."""

    def __init__(self, transfer_id: str, problem: str) -> None:
        super().__init__(transfer_id, problem)
        self.transfer_id = transfer_id
        self.problem = problem

    def __str__(self) -> str:
        return f"transfer {self.transfer_id}: this side failed: {self.problem}"


class TransferRefused(PeerError):
    """The receiver did not take the transfer; it says whether it may later."""

    def __init__(self, transfer_id: str, reason: str, retryable: bool) -> None:
        super().__init__(transfer_id, reason, retryable)
        self.transfer_id = transfer_id
        self.reason = reason
        self.retryable = retryable

    def __str__(self) -> str:
        return f"transfer {self.transfer_id} was refused: {self.reason}"


class TransferEnded(PeerError):
    """The other side gave the transfer up while it was `state` here."""

    def __init__(self, transfer_id: str, state: str, reason: str) -> None:
        super().__init__(transfer_id, state, reason)
        self.transfer_id = transfer_id
        self.state = state
        self.reason = reason

    def __str__(self) -> str:
        return f"transfer {self.transfer_id} was ended by the other side while {self.state}: {self.reason}"


class ChunkRejected(PeerError):
    """A chunk arrived damaged `num_attempts` times."""

    def __init__(self, transfer_id: str, sequence_number: int, num_attempts: int, reason: str) -> None:
        super().__init__(transfer_id, sequence_number, num_attempts, reason)
        self.transfer_id = transfer_id
        self.sequence_number = sequence_number
        self.num_attempts = num_attempts
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"transfer {self.transfer_id}: chunk {self.sequence_number} was rejected "
            f"{self.num_attempts} times: {self.reason}"
        )


class DigestMismatch(PeerError):
    """All chunks arrived whole `num_attempts` times, and are not the KV of the tokens that they were sent for."""

    def __init__(self, transfer_id: str, num_attempts: int) -> None:
        super().__init__(transfer_id, num_attempts)
        self.transfer_id = transfer_id
        self.num_attempts = num_attempts

    def __str__(self) -> str:
        return (
            f"transfer {self.transfer_id}: what arrived does not fit the digest of what was sent, "
            f"{self.num_attempts} times"
        )


class LeaseExpired(PeerError):
    """Nothing was heard of the other side for `lease_s` seconds."""

    def __init__(self, transfer_id: str, state: str, lease_s: float) -> None:
        super().__init__(transfer_id, state, lease_s)
        self.transfer_id = transfer_id
        self.state = state
        self.lease_s = lease_s

    def __str__(self) -> str:
        return f"transfer {self.transfer_id}: no word of the other side for {self.lease_s:g} s while {self.state}"


class StreamLost(PeerError):
    """The stream to the other side broke.

    At the sender in state `verified` the commit may or may not have arrived.
    """

    def __init__(self, transfer_id: str, state: str, reason: str) -> None:
        super().__init__(transfer_id, state, reason)
        self.transfer_id = transfer_id
        self.state = state
        self.reason = reason

    def __str__(self) -> str:
        return f"transfer {self.transfer_id}: the stream broke while {self.state}: {self.reason}"


class PoolUnreachable(PeerError):
    """Its pool cannot be read from here by this transport; another one may do."""

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(transport, reason)
        self.transport = transport
        self.reason = reason

    def __str__(self) -> str:
        return f"the other side's pool cannot be read by {self.transport}: {self.reason}"


class ProtocolViolation(PeerError):
    """The other side sent what the protocol does not allow in `state`."""

    def __init__(self, transfer_id: str, state: str, problem: str) -> None:
        super().__init__(transfer_id, state, problem)
        self.transfer_id = transfer_id
        self.state = state
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"transfer {self.transfer_id}: the other side broke the protocol while {self.state}: "
            f"{self.problem}"
        )


class MalformedFrame(PeerError):
    """These `num_bytes` bytes are not a frame."""

    def __init__(self, problem: str, num_bytes: int) -> None:
        super().__init__(problem, num_bytes)
        self.problem = problem
        self.num_bytes = num_bytes

    def __str__(self) -> str:
        return f"malformed frame of {self.num_bytes} bytes: {self.problem}"


class CorruptFrame(MalformedFrame):
    """The checksum does not fit: nothing in it can be believed, not even which chunk it was."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__("checksum mismatch", num_bytes)
        self.args = (num_bytes,)
