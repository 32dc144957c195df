"""Is there room? Asked before a large allocation or file, so that the answer is an error and not a kill."""

import shutil
from pathlib import Path

import psutil

from workers.errors import OutOfDisk, OutOfMemory


def check_memory(purpose: str, need_bytes: int, remedy: str) -> None:
    """Raise OutOfMemory, with `remedy` as what to do, when less than this is available on the machine."""
    available_bytes = psutil.virtual_memory().available
    if need_bytes > available_bytes:
        raise OutOfMemory(purpose, need_bytes, available_bytes, remedy)


def check_disk(folder: Path, need_bytes: int) -> None:
    """Raise OutOfDisk when the file system of this existing folder has less than this free."""
    available_bytes = shutil.disk_usage(folder).free
    if need_bytes > available_bytes:
        raise OutOfDisk(str(folder), need_bytes, available_bytes)
