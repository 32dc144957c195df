"""Whether files can be written, found out before the work whose outcome they are to hold."""

import os
from collections.abc import Iterable
from pathlib import Path


def file_problem(path: Path) -> str:
    """Why no file can be written there; empty when one can. It is tried, and all is as before.

    What is neither a file nor a folder, as a pipe, is not opened.
    """
    # Where a link leads: with the link itself, what was there before would go.
    target = Path(os.path.realpath(path))
    try:
        is_new = not target.exists()
        if is_new or target.is_file() or target.is_dir():
            with target.open("ab"):
                pass
        if is_new:
            target.unlink()
    except OSError as error:
        return sentence(path, error)
    return ""


def folder_problem(path: Path, names: Iterable[str]) -> str:
    """The same of files of these names in a folder, which is made where there is none."""
    is_new = False
    try:
        if not path.is_dir():
            path.mkdir()
            is_new = True
        return next(filter(None, (file_problem(path / name) for name in names)), "")
    except OSError as error:
        return sentence(path, error)
    finally:
        if is_new:
            path.rmdir()


def sentence(path: Path, error: OSError) -> str:
    """What is said of it."""
    return f"{path} cannot be written: {error.strerror}"
