"""Everything that goes wrong in a worker, as one tree.

    PhasewiseWorkerError
    ├── CallerError             what the worker was given is at fault
    │   ├── ModelUnavailable    nothing is there under that name
    │   ├── UnsupportedModel    it is there, and is more than we can run
    │   ├── CorruptModel        it is there, and damaged
    │   ├── KvCacheTooSmall     the block pool would not hold a single block
    │   ├── HostCacheTooSmall   nor would the host cache
    │   ├── ImageCacheTooSmall  nor the memory for embeddings of pictures
    │   ├── NotOnGpu            the model or a setting is none that a GPU computes
    │   ├── NotOnCpu            a setting is none that a CPU computes with
    │   ├── ProfileError        a profile file: fields that are missing or wrong
    │   ├── InvalidGrammar      a request's grammar says nothing that can be followed
    │   ├── ImageRejected       a picture of a request cannot be used; only that request fails
    │   └── SharingUnsupported  the device cannot be shared that way
    └── MachineError            the machine has too little of something
        ├── OutOfMemory
        ├── OutOfDisk
        ├── GpuUnavailable      there is no GPU that can be used
        ├── RankLost            a process of a tensor-parallel group has ended
        ├── AddressUnavailable  the address to listen on cannot be had
        ├── DecodePoolBusy      too many pictures wait to be decoded
        ├── MpsFailed           the MPS daemon does not do what it should
        └── ResidentMemoryGone  memory that another process was to share cannot be mapped

A leaf passes its fields to `Exception`, so that it survives pickling; its message is built from them.
`retryable` says whether the same act may succeed later without a change to what was asked.
"""
# ruff: noqa: N818 - leaves are named by what happened; the forks above them end in Error.

from enum import StrEnum
from typing import ClassVar

MIB = 2**20


class PhasewiseWorkerError(Exception):
    """Base of all errors of this package."""

    retryable: ClassVar[bool] = False


class CallerError(PhasewiseWorkerError):
    """What the worker was given is at fault: it fails again until that is changed."""


class MachineError(PhasewiseWorkerError):
    """The machine has too little of something just now."""

    retryable: ClassVar[bool] = True


class ModelUnavailable(CallerError):
    """No model is found at `source`; `remedy` says what to do."""

    def __init__(self, source: str, problem: str, remedy: str) -> None:
        super().__init__(source, problem, remedy)
        self.source = source
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"model {self.source!r}: {self.problem}. {self.remedy}"


class UnsupportedModel(CallerError):
    """The model uses `feature`, which we cannot run; `supported` says what we can."""

    def __init__(self, source: str, feature: str, supported: str) -> None:
        super().__init__(source, feature, supported)
        self.source = source
        self.feature = feature
        self.supported = supported

    def __str__(self) -> str:
        return (
            f"model {self.source!r} has {self.feature}, which is not supported; supported: {self.supported}"
        )


class CorruptModel(CallerError):
    """The model file is damaged; at byte `offset` where that says more than the problem does."""

    def __init__(self, path: str, offset: int | None, problem: str) -> None:
        super().__init__(path, offset, problem)
        self.path = path
        self.offset = offset
        self.problem = problem

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.path} is damaged{place}: {self.problem}"


class KvCacheTooSmall(CallerError):
    """The configured pool has fewer bytes than one KV block."""

    def __init__(self, kv_cache_bytes: int, block_bytes: int) -> None:
        super().__init__(kv_cache_bytes, block_bytes)
        self.kv_cache_bytes = kv_cache_bytes
        self.block_bytes = block_bytes

    def __str__(self) -> str:
        return (
            f"the KV cache has {self.kv_cache_bytes / MIB:g} MiB and one block of this model needs "
            f"{self.block_bytes / MIB:.3g} MiB; set engine.kvCacheMiB to at least "
            f"{-(-self.block_bytes // MIB)}, better to room for whole prompts"
        )


class HostCacheTooSmall(CallerError):
    """The host cache was asked for, with fewer bytes than one packed block."""

    def __init__(self, host_cache_bytes: int, block_bytes: int) -> None:
        super().__init__(host_cache_bytes, block_bytes)
        self.host_cache_bytes = host_cache_bytes
        self.block_bytes = block_bytes

    def __str__(self) -> str:
        return (
            f"the host cache has {self.host_cache_bytes / MIB:g} MiB and one packed block of this model needs "
            f"{self.block_bytes / MIB:.3g} MiB; set engine.hostCacheMiB to at least "
            f"{-(-self.block_bytes // MIB)}, better to room for whole prompts, or to 0 for none"
        )


class ImageCacheTooSmall(CallerError):
    """The memory for embeddings of pictures is smaller than one block of them."""

    def __init__(self, image_cache_bytes: int, block_bytes: int) -> None:
        super().__init__(image_cache_bytes, block_bytes)
        self.image_cache_bytes = image_cache_bytes
        self.block_bytes = block_bytes

    def __str__(self) -> str:
        return (
            f"engine.imageCacheMiB gives {self.image_cache_bytes / MIB:.1f} MiB for embeddings of pictures, and one block "
            f"of them takes {self.block_bytes / MIB:.1f} MiB; raise it"
        )


class NotOnGpu(CallerError):
    """A GPU does not compute `feature`; `remedy` says what to do."""

    def __init__(self, feature: str, remedy: str) -> None:
        super().__init__(feature, remedy)
        self.feature = feature
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.feature} is not supported on a GPU; {self.remedy}"


class NotOnCpu(CallerError):
    """A CPU does not compute with `feature`; `remedy` says what to do."""

    def __init__(self, feature: str, remedy: str) -> None:
        super().__init__(feature, remedy)
        self.feature = feature
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.feature} is not supported on a CPU; {self.remedy}, or a GPU"


class ProfileError(CallerError):
    """The profile in `file` cannot be used; each problem begins with the field that it is about."""

    def __init__(self, file: str, problems: tuple[str, ...]) -> None:
        super().__init__(file, problems)
        self.file = file
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(f"{self.file}: {problem}" for problem in self.problems)


class InvalidGrammar(CallerError):
    """A grammar of this kind cannot be followed; `problem` says what is wrong and where."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(kind, problem)
        self.kind = kind
        self.problem = problem

    def __str__(self) -> str:
        return f"grammar ({self.kind}): {self.problem}"


class ImageFault(StrEnum):
    """Why a picture is not taken."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    #: It is a picture, of a format that is not taken.
    FORMAT = "format"
    #: It was sent under another media type than its content has.
    MEDIA_TYPE = "media_type"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"
    DAMAGED = "damaged"
    TOO_SLOW = "too_slow"
    #: It fits neither the model nor what the gateway said of it.
    MISMATCH = "mismatch"


class ImageRejected(CallerError):
    """A picture cannot be used; `problem` says why and what to do.

    number: which picture of its request, from 1; None where that is not known. The request fails as INVALID.
    """

    def __init__(
        self, problem: str, fault: ImageFault = ImageFault.MISMATCH, number: int | None = None
    ) -> None:
        super().__init__(problem, fault, number)
        self.problem = problem
        self.fault = fault
        self.number = number

    def of(self, number: int) -> "ImageRejected":
        """The same, of this picture of its request."""
        return ImageRejected(self.problem, self.fault, number)

    def __str__(self) -> str:
        return f"{'image' if self.number is None else f'image {self.number}'}: {self.problem}"


class SharingUnsupported(CallerError):
    """A GPU cannot be shared by `mechanism`; `remedy` says what to do."""

    def __init__(self, mechanism: str, problem: str, remedy: str) -> None:
        super().__init__(mechanism, problem, remedy)
        self.mechanism = mechanism
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.mechanism}: {self.problem}; {self.remedy}"


class OutOfMemory(MachineError):
    """`purpose` needs more memory than is available; `remedy` names what to lower."""

    def __init__(self, purpose: str, need_bytes: int, available_bytes: int, remedy: str) -> None:
        super().__init__(purpose, need_bytes, available_bytes, remedy)
        self.purpose = purpose
        self.need_bytes = need_bytes
        self.available_bytes = available_bytes
        self.remedy = remedy

    def __str__(self) -> str:
        return (
            f"{self.purpose}: needs {self.need_bytes / MIB:.0f} MiB of memory and "
            f"{self.available_bytes / MIB:.0f} MiB are available; {self.remedy}"
        )


class OutOfDisk(MachineError):
    """`path` has too little free space."""

    def __init__(self, path: str, need_bytes: int, available_bytes: int) -> None:
        super().__init__(path, need_bytes, available_bytes)
        self.path = path
        self.need_bytes = need_bytes
        self.available_bytes = available_bytes

    def __str__(self) -> str:
        return (
            f"{self.path} needs {self.need_bytes / MIB:.0f} MiB of disk and "
            f"{self.available_bytes / MIB:.0f} MiB are free; free some, or set XDG_CACHE_HOME to another disk"
        )


class GpuUnavailable(MachineError):
    """The worker is to compute with a GPU, and cannot: `problem` says why, `remedy` what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"no GPU can be used: {self.problem}; {self.remedy}"


class RankLost(MachineError):
    """A tensor-parallel group has ended: `problem` says which of its processes did, and why."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"the tensor-parallel group has ended: {self.problem}; the worker has to be started again"


class AddressUnavailable(MachineError):
    """Nothing can listen on `address`."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return (
            f"cannot listen on {self.address}: the port is in use, or the host is not an address of this "
            "machine. End the program that listens there, or name another host or port (port 0 takes a free one)"
        )


class DecodePoolBusy(MachineError):
    """A picture cannot be decoded now; `problem` says why."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}; send the request again later"


class MpsFailed(MachineError):
    """The MPS daemon did not start, answer, or end; `problem` says which, with its own words where it left any."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"MPS: {self.problem}"


class ResidentMemoryGone(MachineError):
    """Memory of process `pid` cannot be mapped; `problem` says why."""

    def __init__(self, pid: int, problem: str) -> None:
        super().__init__(pid, problem)
        self.pid = pid
        self.problem = problem

    def __str__(self) -> str:
        return f"memory of process {self.pid} cannot be mapped: {self.problem}; start its owner again, then its workers"
