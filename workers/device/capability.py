"""What a device can do about sharing its SMs, and what to do where it cannot. Pure.

`device_facts.py` gathers the facts; a refusal names the mechanism, what is in the way, and the remedy.

Sources: CUDA programming guide, green contexts (from driver 12.4 on) and MPS (per-client shares of SMs from Volta on).
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: As cuDriverGetVersion has it.
GREEN_CONTEXT_DRIVER = 12_040
GREEN_CONTEXT_CAPABILITY = (7, 0)
MPS_CAPABILITY = (7, 0)
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPE_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One GPU as this process sees it.

    driver: as cuDriverGetVersion has it, 13000 for 13.0. is_mig: None when NVML does not say. bindings: version of cuda.bindings, empty
    when it is not installed. mps_control: where nvidia-cuda-mps-control is, empty when it is not. environment: of this process, where
    MPS is concerned.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    driver: int
    is_mig: bool | None
    bindings: str
    mps_control: str
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a mechanism cannot be had here, and what to do."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Capability:
    """Of one device. None: it can. notes: what else to know."""

    green_contexts: Refusal | None
    mps: Refusal | None
    notes: tuple[str, ...] = ()


def capability_of(facts: DeviceFacts | None) -> Capability:
    """facts: None where there is no GPU."""
    if facts is None:
        none = Refusal(
            "this process sees no NVIDIA GPU", "name one in CUDA_VISIBLE_DEVICES, or install torch for CUDA"
        )
        return Capability(none, none)
    return Capability(_green_context_refusal(facts), _mps_refusal(facts), tuple(_notes(facts)))


def report(facts: DeviceFacts | None) -> list[str]:
    """The same as lines for people."""
    found = capability_of(facts)
    about = []
    if facts is not None:
        major, minor = facts.capability
        about.append(
            f"{facts.name}, compute capability {major}.{minor}, {facts.num_sms} SMs, driver {_version(facts.driver)}"
        )
    return [
        *about,
        f"green contexts: {found.green_contexts or 'yes'}",
        f"MPS: {found.mps or 'yes'}",
        *(f"note: {note}" for note in found.notes),
    ]


def _green_context_refusal(facts: DeviceFacts) -> Refusal | None:
    if facts.driver < GREEN_CONTEXT_DRIVER:
        return Refusal(
            f"driver {_version(facts.driver)} has no green contexts",
            f"install {_version(GREEN_CONTEXT_DRIVER)} or later",
        )
    if facts.capability < GREEN_CONTEXT_CAPABILITY:
        return _too_old(facts, GREEN_CONTEXT_CAPABILITY)
    if not facts.bindings:
        return Refusal(
            "cuda.bindings is not installed", "pip install cuda-bindings of the driver's major version"
        )
    return _mig_refusal(facts)


def _mps_refusal(facts: DeviceFacts) -> Refusal | None:
    if facts.capability < MPS_CAPABILITY:
        return _too_old(facts, MPS_CAPABILITY)
    if not facts.mps_control:
        return Refusal(
            "nvidia-cuda-mps-control is not on the PATH",
            "install the driver's compute utilities, or mount them into the container",
        )
    return _mig_refusal(facts)


def _too_old(facts: DeviceFacts, least: tuple[int, int]) -> Refusal:
    had, needed = (f"{major}.{minor}" for major, minor in (facts.capability, least))
    return Refusal(
        f"compute capability {had} is below {needed}", "use plain streams, whose SMs the hardware divides"
    )


def _mig_refusal(facts: DeviceFacts) -> Refusal | None:
    """A MIG instance is a share already, and to divide one was never tried."""
    if facts.is_mig:
        return Refusal(
            "the GPU is in MIG mode, in which dividing an instance was not tried",
            "give each worker a MIG instance of its own, or turn MIG off",
        )
    return None


def _notes(facts: DeviceFacts) -> list[str]:
    found = []
    percentage = facts.environment.get(PERCENTAGE, "")
    if percentage and percentage not in ("100", "100.0"):
        found.append(
            f"{PERCENTAGE}={percentage} caps every green context of this process; unset it to divide the whole device"
        )
    if PIPE_DIRECTORY in facts.environment:
        found.append(
            f"{PIPE_DIRECTORY} is set: this process is a client of the MPS daemon there, if one runs"
        )
    if facts.is_mig is None:
        found.append("NVML did not say whether MIG is on")
    return found


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
