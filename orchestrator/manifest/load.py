"""A manifest from a file or from text, or every reason why it is none."""

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ValidationError

from orchestrator.errors import ManifestError, ManifestProblem
from orchestrator.manifest.fields import Path, key_path, keys_of
from orchestrator.manifest.models import Deployment
from orchestrator.manifest.problems import sentences
from orchestrator.manifest.section import Section
from orchestrator.manifest.yaml_tree import MAX_TEXT_BYTES, Refused, read_tree
from workers import profile

#: What one YAML text is: a manifest, or another file that is written as one.
Whole = TypeVar("Whole", bound=Section)


def load(path: FilePath) -> Deployment:
    """The deployment in a YAML file. Raises ManifestError, also when there is no such file."""
    return parse(read_text(path), file=str(path), folder=path.absolute().parent)


def parse(text: str, *, file: str = "manifest", folder: FilePath | None = None) -> Deployment:
    """The deployment in YAML text; `file` is its name in messages.

    A relative model path starts at `folder`; without one it is kept as it is. Raises ManifestError.
    """
    context = {"folder": folder, "read_profile": profile.read}
    return validated(text, Deployment, file=file, context=context)


def read_text(path: FilePath) -> str:
    """What is in a YAML file. Raises ManifestError, also when there is no such file."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _whole_file(file, None, f"cannot be read: {reason}") from error
    if len(raw) > MAX_TEXT_BYTES:
        raise _whole_file(file, None, f"is larger than {MAX_TEXT_BYTES // 2**20} MiB")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _whole_file(file, line, f"byte 0x{raw[error.start]:02X} is not UTF-8") from error


def validated(text: str, root: type[Whole], *, file: str, context: Mapping[str, Any]) -> Whole:
    """The section that YAML text is, which its validators may see `context` for. Raises ManifestError."""
    try:
        tree = read_tree(text)
    except Refused as refused:
        raise _whole_file(file, refused.line, refused.message) from refused
    if not isinstance(tree.data, dict):
        allowed = f"allowed: a mapping with {_listed(list(keys_of(root)))}"
        raise _whole_file(file, tree.line_of(()), f"is not a mapping; {allowed}")
    found = list(tree.problems)
    section: Whole | None = None
    try:
        # By way of JSON, where a list may be a tuple and 1 a float and nothing else is converted.
        section = root.model_validate_json(json.dumps(tree.data), context=dict(context))
    except ValidationError as error:
        details = error.errors(include_url=False)
        found += [(path, tree.line_of(path), message) for path, message in sentences(details, root)]
    if section is None or found:
        raise ManifestError(_problems(file, found))
    return section


def _listed(words: list[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def _problems(file: str, found: list[tuple[Path, int, str]]) -> tuple[ManifestProblem, ...]:
    problems = [ManifestProblem(file, line, key_path(path), message) for path, line, message in found]
    return tuple(sorted(problems, key=lambda problem: (problem.line or 0, problem.key_path)))


def _whole_file(file: str, line: int | None, message: str) -> ManifestError:
    return ManifestError((ManifestProblem(file, line, "", message),))
