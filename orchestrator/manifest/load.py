"""A manifest from a file or from text, or every reason why it is none."""

import json
from pathlib import Path as FilePath

from pydantic import ValidationError

from orchestrator.errors import ManifestError, ManifestProblem
from orchestrator.manifest.fields import Path, key_path
from orchestrator.manifest.models import Deployment
from orchestrator.manifest.problems import sentences
from orchestrator.manifest.yaml_tree import MAX_TEXT_BYTES, Refused, read_tree
from workers import profile


def load(path: FilePath) -> Deployment:
    """The deployment in a YAML file. Raises ManifestError, also when there is no such file."""
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
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _whole_file(file, line, f"byte 0x{raw[error.start]:02X} is not UTF-8") from error
    return parse(text, file=file, folder=path.absolute().parent)


def parse(text: str, *, file: str = "manifest", folder: FilePath | None = None) -> Deployment:
    """The deployment in YAML text; `file` is its name in messages.

    A relative model path starts at `folder`; without one it is kept as it is. Raises ManifestError.
    """
    try:
        tree = read_tree(text)
    except Refused as refused:
        raise _whole_file(file, refused.line, refused.message) from refused
    if not isinstance(tree.data, dict):
        allowed = "allowed: a mapping with apiVersion, kind, metadata and spec"
        raise _whole_file(file, tree.line_of(()), f"is not a mapping; {allowed}")
    found = list(tree.problems)
    deployment: Deployment | None = None
    try:
        # By way of JSON, where a list may be a tuple and 1 a float and nothing else is converted.
        deployment = Deployment.model_validate_json(
            json.dumps(tree.data), context={"folder": folder, "read_profile": profile.read}
        )
    except ValidationError as error:
        details = error.errors(include_url=False)
        found += [(path, tree.line_of(path), message) for path, message in sentences(details)]
    if deployment is None or found:
        raise ManifestError(_problems(file, found))
    return deployment


def _problems(file: str, found: list[tuple[Path, int, str]]) -> tuple[ManifestProblem, ...]:
    problems = [ManifestProblem(file, line, key_path(path), message) for path, line, message in found]
    return tuple(sorted(problems, key=lambda problem: (problem.line or 0, problem.key_path)))


def _whole_file(file: str, line: int | None, message: str) -> ManifestError:
    return ManifestError((ManifestProblem(file, line, "", message),))
