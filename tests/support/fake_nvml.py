"""NVML without a GPU: a double of the module pynvml, as far as it is used."""
# ruff: noqa: N802, N815 - the names are NVML's.

from collections import deque
from types import SimpleNamespace
from typing import Any


class FakeNvmlError(Exception):
    """As pynvml.NVMLError has it."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """One GPU with this UUID. `failing`: what answers with an error, and with which; `xids`: events that are still to come."""

    NVMLError = FakeNvmlError
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND, NVML_ERROR_TIMEOUT, NVML_ERROR_GPU_IS_LOST = 3, 6, 10, 15
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksEventReasonApplicationsClocksSetting = 0x2
    nvmlClocksEventReasonSwPowerCap = 0x4
    nvmlClocksEventReasonHwSlowdown = 0x8
    nvmlClocksEventReasonSyncBoost = 0x10
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80
    nvmlClocksEventReasonDisplayClockSetting = 0x100

    def __init__(self, uuid: str = "GPU-1") -> None:
        self.uuid = uuid
        self.failing: dict[str, int] = {}
        self.xids: deque[int] = deque()
        self.ecc = [0, 0]
        self.reasons = 0
        self.remaps = (0, 0, 0, 0)
        self.temperature = 40
        self.num_event_sets = 0
        self.num_reads = 0

    def _check(self, name: str) -> None:
        if name in self.failing:
            raise FakeNvmlError(self.failing[name])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise FakeNvmlError(self.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetName(self, _: str) -> str:
        return "NVIDIA Double"

    def nvmlDeviceGetMaxClockInfo(self, _: str, __: int) -> int:
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, _: str) -> int:
        return 700_000

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:
        self._check("memory")
        self.num_reads += 1
        return SimpleNamespace(used=2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, _: str) -> Any:
        self._check("utilisation")
        return SimpleNamespace(gpu=25, memory=10)

    def nvmlDeviceGetClockInfo(self, _: str, kind: int) -> int:
        return 1755 if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        self._check("power")
        return 147_005

    def nvmlDeviceGetTemperature(self, _: str, __: int) -> int:
        return self.temperature

    def nvmlDeviceGetCurrentClocksEventReasons(self, _: str) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEccErrors(self, _: str, kind: int, __: int) -> int:
        self._check("ecc")
        return self.ecc[kind]

    def nvmlDeviceGetRemappedRows(self, _: str) -> tuple[int, int, int, int]:
        return self.remaps

    def nvmlEventSetCreate(self) -> str:
        self.num_event_sets += 1
        return "events"

    def nvmlEventSetFree(self, _: str) -> None:
        self.num_event_sets -= 1

    def nvmlDeviceRegisterEvents(self, _: str, __: int, ___: str) -> None:
        self._check("events")

    def nvmlEventSetWait_v2(self, _: str, __: int) -> Any:
        if not self.xids:
            raise FakeNvmlError(self.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventType=self.nvmlEventTypeXidCriticalError, eventData=self.xids.popleft())
