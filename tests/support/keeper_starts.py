"""What keepers of tests keep: nothing but a line in a file for each of them. Run in the process of the keeper."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from workers.device.keeper import Tell
from workers.errors import OutOfMemory

POLL_S = 0.005


def write_line(log: Path, gate: Path, _folder: Path, tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """Half done when it has written its line; done when `gate` is there. Tells its process."""
    print("what libraries print", flush=True)
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    tell(0.5)
    while not gate.exists():
        time.sleep(POLL_S)
    return str(os.getpid()).encode(), lambda: None


def refuse(log: Path, gate: Path, folder: Path, tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """The same, but the first one of these ends with an error of ours, when `gate` is there."""
    kept = write_line(log, gate, folder, tell)
    if len(log.read_text().splitlines()) == 1:
        raise OutOfMemory("weights", 2, 1, "lower it")
    return kept


def break_down(_folder: Path, _tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """With an error that is none of ours."""
    raise RuntimeError("there is no such device")


def tell_environment(_folder: Path, _tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """Tells the names in its environment, a line for each."""
    return "\n".join(os.environ).encode(), lambda: None


def copy_weights(
    source: Path, log: Path, gate: Path, folder: Path, tell: Tell
) -> tuple[bytes, Callable[[], None]]:
    """A copy of this file, which members map instead of memory of a GPU; else as `write_line`."""
    copy = folder / source.name
    shutil.copyfile(source, copy)
    write_line(log, gate, folder, tell)
    return str(copy).encode(), lambda: None
