"""One GPU, looked at once a second by NVML in a thread of its own: its state for the status, its failures for the worker's health.

Without NVML, or where it does not answer a question, the status has what there is and one line says what is missing and why.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from workers.api import GpuStatus
from workers.device.gpu_health import GpuHealth, health_of
from workers.device.nvml import NvmlUnavailable, open_nvml

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
#: A GPU that is lost can hold a call for ever; the thread is left behind then.
STOP_S = 5.0
#: XIDs that are kept, and those that one look takes: more tell nothing new.
MAX_XIDS = 32


class GpuTelemetry:
    """Of the GPU with this UUID. `start` it once; `status` may be read from any thread.

    on_unhealthy: told once, in the thread of the telemetry, why the worker cannot go on. nvml: the module to ask; opened when None.
    """

    def __init__(
        self,
        uuid: str,
        *,
        on_unhealthy: Callable[[str], None],
        nvml: Any = None,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_unhealthy = on_unhealthy
        self._period_s = period_s
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.run, name="gpu-telemetry", daemon=True)
        self._reader: _Reader | None = None
        self._first: GpuStatus | None = None
        self._last, self._sampled_s = GpuStatus(uuid), clock()
        self._xids: list[int] = []
        self._is_unhealthy = False
        try:
            self._reader = _Reader(nvml if nvml is not None else open_nvml(), uuid)
        except NvmlUnavailable as error:
            self._last = GpuStatus(uuid, missing=str(error))
            logger.warning("gpu_telemetry_off gpu=%s reason=%s", uuid, error)

    def start(self) -> None:
        """Take a sample now, and one every period from then on."""
        if self._reader is not None and self._sample_or_give_up():
            self._thread.start()

    def stop(self) -> None:
        """End the thread, if it was started."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        if self._reader is not None and not self._thread.is_alive():
            self._reader.close()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._stop.wait(self._period_s) and self._sample_or_give_up():
            pass

    def _sample_or_give_up(self) -> bool:
        try:
            self.sample()
        except Exception:
            # Our own bug; the GPU and the worker are none the worse for it.
            logger.exception("gpu_telemetry_broke")
            self._last = replace(self._last, missing="telemetry broke; see the worker's log")
            return False
        return True

    def sample(self) -> None:
        """One look."""
        assert self._reader is not None
        found, lost = self._reader.read()
        self._first = self._first or found
        self._xids = [*self._xids, *self._reader.new_xids()][:MAX_XIDS]
        health = health_of(found, self._first, tuple(self._xids), lost)
        self._last = replace(found, xids=tuple(self._xids), problem=health.problem, notes=health.notes)
        self._sampled_s = self._clock()
        self._tell(health)

    @property
    def status(self) -> GpuStatus:
        """What the last look found, and how long ago that was."""
        return replace(self._last, age_s=max(0.0, self._clock() - self._sampled_s))

    def _tell(self, health: GpuHealth) -> None:
        if health.problem and not self._is_unhealthy:
            self._is_unhealthy = True
            logger.error("gpu_unhealthy gpu=%s reason=%s", self._last.uuid, health.problem)
            self._on_unhealthy(health.problem)


class _Reader:
    """Asks NVML about one GPU. What it does not answer is left out, and named once. Raises NvmlUnavailable."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._missing: dict[str, str] = {}
        try:
            self._gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            raise NvmlUnavailable(
                f"NVML knows no GPU {uuid} ({error}); was it taken out of this container?"
            ) from error
        self._lost = ""
        name = self._ask("name", nvml.nvmlDeviceGetName)
        self._fixed = GpuStatus(
            uuid,
            name=name.decode() if isinstance(name, bytes) else name or "",
            max_sm_clock_mhz=self._ask("highest clock", nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            power_limit_w=_watts(self._ask("power limit", nvml.nvmlDeviceGetEnforcedPowerLimit)),
        )
        self._events = self._register()

    def read(self) -> tuple[GpuStatus, str]:
        """The state now, and why the GPU is lost, empty when it is not."""
        nvml, ask = self._nvml, self._ask
        memory = ask("memory", nvml.nvmlDeviceGetMemoryInfo)
        busy = ask("utilisation", nvml.nvmlDeviceGetUtilizationRates)
        remaps = ask("remapped rows", nvml.nvmlDeviceGetRemappedRows)
        reasons = ask("throttle reasons", nvml.nvmlDeviceGetCurrentClocksEventReasons)
        volatile = nvml.NVML_VOLATILE_ECC
        found = replace(
            self._fixed,
            memory_used_bytes=memory.used if memory else None,
            memory_total_bytes=memory.total if memory else None,
            utilisation=busy.gpu / 100 if busy else None,
            memory_utilisation=busy.memory / 100 if busy else None,
            sm_clock_mhz=ask("clock", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=ask("memory clock", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            power_w=_watts(ask("power", nvml.nvmlDeviceGetPowerUsage)),
            temperature_c=ask("temperature", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=_reason_names(nvml, reasons or 0),
            ecc_uncorrected=ask(
                "ECC", nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, volatile
            ),
            ecc_corrected=ask(
                "ECC", nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, volatile
            ),
            is_remap_pending=bool(remaps and remaps[2]),
            has_remap_failed=bool(remaps and remaps[3]),
        )
        missing = "; ".join(f"{what}: {why}" for what, why in self._missing.items())
        return replace(found, missing=missing), self._lost

    def new_xids(self) -> list[int]:
        """Since the last call."""
        found: list[int] = []
        nvml = self._nvml
        while self._events is not None and len(found) < MAX_XIDS:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:
                    self._note("XID events", error)
                break
            if event.eventType == nvml.nvmlEventTypeXidCriticalError:
                found.append(int(event.eventData))
        return found

    def close(self) -> None:
        """Give the event set back."""
        if self._events is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
            self._events = None

    def _register(self) -> Any:
        nvml = self._nvml
        events = None
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._gpu, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            self._note("XID events", error)
            if events is not None:
                nvml.nvmlEventSetFree(events)
            return None
        return events

    def _ask(self, what: str, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(self._gpu, *arguments)
        except self._nvml.NVMLError as error:
            self._note(what, error)
            return None

    def _note(self, what: str, error: Any) -> None:
        if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
            self._lost = self._lost or str(error)
        self._missing.setdefault(what, str(error))


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _reason_names(nvml: Any, bits: int) -> tuple[str, ...]:
    """Without idleness, which is none."""
    names = {
        nvml.nvmlClocksEventReasonApplicationsClocksSetting: "application_clocks",
        nvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
        nvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
        nvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
        nvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
        nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hw_thermal_slowdown",
        nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hw_power_brake",
        nvml.nvmlClocksEventReasonDisplayClockSetting: "display_clocks",
    }
    return tuple(name for bit, name in names.items() if bits & bit)
