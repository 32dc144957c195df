"""What `phasewise status` prints of a worker's GPU. Pure."""

from workers.api import GpuStatus

GIB = 2**30
#: Looked at once a second; older than this the telemetry itself stands still.
STALE_AFTER_S = 5.0


def gpu_lines(gpu: GpuStatus) -> list[str]:
    """What it does, then one line each for what is wrong, worth a note, or not known."""
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    clock, most = gpu.sm_clock_mhz, gpu.max_sm_clock_mhz
    parts = [
        gpu.name or gpu.uuid,
        "" if used is None or total is None else f"{used / GIB:.1f} of {total / GIB:.1f} GiB",
        "" if gpu.utilisation is None else f"busy {gpu.utilisation:.0%}",
        "" if clock is None else f"{clock} MHz{f' of {most}' if most is not None else ''}",
        "" if gpu.power_w is None else f"{gpu.power_w:.0f} W{_of_limit(gpu.power_limit_w)}",
        "" if gpu.temperature_c is None else f"{gpu.temperature_c} C",
        f"slowed by {' and '.join(gpu.throttle_reasons)}" if gpu.throttle_reasons else "",
        f"{gpu.ecc_corrected} ECC errors corrected" if gpu.ecc_corrected else "",
        f"seen {gpu.age_s:.0f} s ago" if gpu.age_s > STALE_AFTER_S and not gpu.missing else "",
    ]
    lines = [f"GPU {', '.join(part for part in parts if part)}"]
    if gpu.problem:
        lines.append(f"GPU UNHEALTHY: {gpu.problem}")
    lines += [f"GPU note: {note}" for note in gpu.notes]
    if gpu.missing:
        lines.append(f"GPU telemetry: {gpu.missing}")
    return lines


def _of_limit(limit_w: float | None) -> str:
    return "" if limit_w is None else f" of {limit_w:.0f}"
