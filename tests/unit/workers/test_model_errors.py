"""Errors of a worker cross process borders, so they must survive pickling with their fields and message."""

import pickle

import pytest

from workers.errors import (
    AddressUnavailable,
    CallerError,
    CorruptModel,
    DecodePoolBusy,
    HostCacheTooSmall,
    ImageFault,
    ImageRejected,
    InvalidGrammar,
    KvCacheTooSmall,
    MachineError,
    ModelUnavailable,
    MpsFailed,
    OutOfDisk,
    OutOfMemory,
    PhasewiseWorkerError,
    ResidentMemoryGone,
    SharingUnsupported,
    UnsupportedModel,
)

LEAVES = [
    ModelUnavailable("package:x", "not installed", "Install it"),
    UnsupportedModel("a.gguf", "architecture 'mamba'", "'llama'"),
    CorruptModel("a.gguf", 12, "cut short"),
    OutOfMemory("the weights", 2**30, 2**20, "use a smaller model"),
    OutOfDisk("/cache", 2**30, 2**20),
    KvCacheTooSmall(2**20, 2**21),
    AddressUnavailable("127.0.0.1:80"),
    InvalidGrammar("regex", "unclosed group"),
    HostCacheTooSmall(2**20, 2**21),
    ImageRejected("it is empty; send the bytes of the file", ImageFault.EMPTY, 2),
    DecodePoolBusy("64 pictures wait to be decoded already"),
    SharingUnsupported("green contexts", "the GPU is in MIG mode", "turn MIG off"),
    MpsFailed("it does not answer"),
    ResidentMemoryGone(7, "it has ended"),
]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: type(error).__name__)
def test_fields_and_message_survive_pickling(error: PhasewiseWorkerError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_only_the_machine_may_do_better_later() -> None:
    assert [error.retryable for error in LEAVES] == [
        False,
        False,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
        True,
        True,
    ]
    assert not CallerError.retryable
    assert MachineError.retryable


def test_messages_name_place_numbers_and_remedy() -> None:
    assert str(LEAVES[2]) == "a.gguf is damaged at byte 12: cut short"
    assert str(LEAVES[3]) == (
        "the weights: needs 1024 MiB of memory and 1 MiB are available; use a smaller model"
    )
