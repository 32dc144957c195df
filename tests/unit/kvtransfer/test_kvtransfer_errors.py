"""Errors of a transfer say whose fault it is, and survive pickling."""

import pickle

import pytest

from kvtransfer import errors
from kvtransfer.errors import (
    CallerError,
    ChunkRejected,
    CorruptFrame,
    DeadlineExceeded,
    DigestMismatch,
    HostFailed,
    InvalidTransfer,
    LeaseExpired,
    MalformedFrame,
    OwnError,
    PeerError,
    PhasewiseTransferError,
    PoolUnreachable,
    ProtocolViolation,
    ReservationRefused,
    SharedMemoryUnavailable,
    StreamLost,
    TooManyStreams,
    TransferAborted,
    TransferEnded,
    TransferRefused,
    TransportUnavailable,
)

LEAVES = [
    TransferAborted("t1", "the client left"),
    DeadlineExceeded("t1", "requested", 2.5),
    InvalidTransfer("t1", "prefill finished twice"),
    ReservationRefused("t1", "the pool is full", True),
    ReservationRefused("t1", "more blocks than the pool has", False),
    HostFailed("t1", "index out of range"),
    TransferRefused("t1", "dtype is other", False),
    TransferEnded("t1", "receiving", "shutting down"),
    ChunkRejected("t1", 7, 4, "checksum mismatch"),
    LeaseExpired("t1", "receiving", 30.0),
    StreamLost("t1", "verified", "UNAVAILABLE: gone"),
    ProtocolViolation("t1", "reserved", "Commit is not expected"),
    MalformedFrame("too short", 3),
    CorruptFrame(4000),
    TooManyStreams(256),
    DigestMismatch("t1", 2),
    PoolUnreachable("shm", "no such file"),
    SharedMemoryUnavailable(4096, "the disk is full"),
    TransportUnavailable("nixl", "it is not installed"),
]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: type(error).__name__)
def test_fields_and_message_survive_pickling(error: PhasewiseTransferError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_every_leaf_has_one_culprit() -> None:
    forks = [CallerError, OwnError, PeerError]
    assert all(sum(isinstance(error, fork) for fork in forks) == 1 for error in LEAVES)


def test_what_the_caller_did_and_what_can_never_fit_is_not_retried() -> None:
    not_retryable = [type(error).__name__ for error in LEAVES if not error.retryable]
    assert not_retryable == [
        "TransferAborted",
        "DeadlineExceeded",
        "InvalidTransfer",
        "ReservationRefused",
        "TransferRefused",
    ]


def leaves(fork: type[PhasewiseTransferError]) -> set[type[PhasewiseTransferError]]:
    return {fork}.union(*map(leaves, fork.__subclasses__()))


def test_every_error_is_tested_here_and_drawn_in_the_tree() -> None:
    forks = {PhasewiseTransferError, CallerError, OwnError, PeerError}
    assert leaves(PhasewiseTransferError) - forks == {type(error) for error in LEAVES}
    assert all(name.__name__ in (errors.__doc__ or "") for name in leaves(PhasewiseTransferError))


def test_messages_name_the_transfer_and_the_numbers() -> None:
    assert str(LEAVES[1]) == "transfer t1 was still requested after 2.5 s"
    assert str(LEAVES[8]) == "transfer t1: chunk 7 was rejected 4 times: checksum mismatch"
    assert str(LEAVES[13]) == "malformed frame of 4000 bytes: checksum mismatch"
    assert str(DigestMismatch("t1", 2)).endswith("does not fit the digest of what was sent, 2 times")
    assert str(PoolUnreachable("shm", "gone")) == "the other side's pool cannot be read by shm: gone"
