"""What pydantic refuses, said for the person who wrote the file. Pure."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import ErrorDetails

from orchestrator.manifest.fields import Path, allowed_text, choices, find, keys_of
from orchestrator.manifest.section import Section

MAX_SHOWN = 60

_KINDS = {dict: "a mapping", list: "a list", type(None): "empty"}


def sentences(errors: Iterable[ErrorDetails], root: type[Section]) -> Iterator[tuple[Path, str]]:
    """(key path, sentence) of each error of a `root`; one error may be several sentences."""
    for error in errors:
        path: Path = tuple(error["loc"])
        if error["type"] == "inconsistent":
            yield from ((path + tuple(inner), text) for inner, text in error["ctx"]["problems"])
        elif not _counts_only_good_items(error):
            yield path, _sentence(path, error, root)


def _counts_only_good_items(error: ErrorDetails) -> bool:
    """A list is called too short although only its items are wrong, and they have errors of their own."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _sentence(path: Path, error: ErrorDetails, root: type[Section]) -> str:
    if error["type"] == "extra_forbidden":
        return _unknown_key(path, root)
    field, section = find(path, root)
    if field is None or (section is not None and isinstance(path[-1], int)):
        return f"{_found(error)}; allowed: a mapping"
    allowed = allowed_text(field)
    if error["type"] == "missing":
        meaning = (field.description or "").split(". ")[0].rstrip(".")
        return f"this key is required ({meaning}); allowed: {allowed}"
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}; allowed: {allowed}"
    return f"{_found(error)}; allowed: {allowed}{_guess(error['input'], choices(field))}"


def _unknown_key(path: Path, root: type[Section]) -> str:
    _, section = find(path[:-1], root)
    keys = list(keys_of(section)) if section else []
    return f"unknown key; allowed: {', '.join(keys)}{_guess(path[-1], keys)}"


def _found(error: ErrorDetails) -> str:
    value: Any = error["input"]
    if error["type"] in ("too_short", "too_long"):
        return f"has {len(value)} items"
    return f"is {_KINDS.get(type(value)) or shown(value)}"


def shown(value: Any) -> str:
    """A value as YAML would have it: text in quotes; cut when long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _guess(word: Any, allowed: list[str]) -> str:
    guess = closest(word, allowed) if isinstance(word, str) else None
    return f"; did you mean {guess!r}?" if guess else ""


def closest(word: str, allowed: list[str]) -> str | None:
    """What `word` most likely was meant to be, whatever its case, underscores and hyphens."""
    plain = {choice.lower(): choice for choice in allowed}
    found = difflib.get_close_matches(re.sub("[_-]", "", word.lower()), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None
