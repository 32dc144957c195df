"""Is there room? Asked before a large allocation or file, so that the answer is an error and not a kill."""

import shutil
from pathlib import Path

import psutil

from workers.errors import OutOfDisk, OutOfMemory


def check_memory(purpose: str, need_bytes: int, remedy: str) -> None:
    """Raise OutOfMemory, with `remedy` as what to do, when less is available on the machine or in the container."""
    available_bytes = min([psutil.virtual_memory().available, *cgroup_available_bytes()])
    if need_bytes > available_bytes:
        raise OutOfMemory(purpose, need_bytes, available_bytes, remedy)


def cgroup_available_bytes(
    proc_file: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What each control group around this process that has a limit still lets it take; empty without a limit.

    File pages that can be dropped count as free. Control groups of version 1 are not looked at.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, memory controller.
    """
    try:
        lines = proc_file.read_text().splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    own = [root / path for path in paths]
    around = [parent for group in own for parent in group.parents if parent.is_relative_to(root)]
    found = []
    for group in own + around:
        try:
            limit_bytes = int((group / "memory.max").read_text())
            used_bytes = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            # No such file, or "max": no limit here.
            continue
        found.append(max(0, limit_bytes - used_bytes + int(stat.get("inactive_file", 0))))
    return found


def check_disk(folder: Path, need_bytes: int) -> None:
    """Raise OutOfDisk when the file system of this existing folder has less than this free."""
    available_bytes = shutil.disk_usage(folder).free
    if need_bytes > available_bytes:
        raise OutOfDisk(str(folder), need_bytes, available_bytes)
