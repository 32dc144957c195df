"""The keys of a manifest as rows: for error messages and for the table in the docs. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from orchestrator.manifest.models import Deployment
from orchestrator.manifest.section import Allowed, Section

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key: `path` as `spec.workers[].replicas`; `default` may be "required" or empty."""

    path: str
    allowed: str
    default: str
    description: str


def key_path(path: Path) -> str:
    """`("spec", "workers", 0, "name")` as `spec.workers[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def keys_of(section: type[Section]) -> Mapping[str, FieldInfo]:
    """The fields of a section by the key they have in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, one, a list of or one that may be absent; None when it holds a plain value."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def is_list(field: FieldInfo) -> bool:
    """Whether the key holds a list."""
    return get_origin(field.annotation) is tuple


def find(path: Path, root: type[Section]) -> tuple[FieldInfo | None, type[Section] | None]:
    """The field at a path from `root`, and the section that stands there; both None for an unknown key."""
    field: FieldInfo | None = None
    section: type[Section] | None = root
    for part in path:
        if isinstance(part, int):
            continue
        field = keys_of(section).get(part) if section else None
        section = section_of(field) if field else None
    return field, section


def choices(field: FieldInfo) -> list[str]:
    """The words that a key, or an item of its list, is chosen from; empty when it is no such choice."""
    annotation: Any = field.annotation
    while get_origin(annotation) in (tuple, Annotated, Union, UnionType):
        # What may be absent comes before None.
        annotation = get_args(annotation)[0]
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def allowed_text(field: FieldInfo) -> str:
    """What a key accepts, as the end of the sentence "allowed: "."""
    annotation: Any = field.annotation
    metadata = list(field.metadata)
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += more
    for item in metadata:
        if isinstance(item, Allowed):
            return item.text
    if words := choices(field):
        return " or ".join(words)
    if section_of(field):
        return f"a list of {_range_text(metadata)} mappings" if is_list(field) else "a mapping"
    if annotation is bool:
        return "true or false"
    noun = "a whole number" if annotation is int else "a number"
    return f"{noun} {_range_text(metadata)}"


def _range_text(metadata: list[Any]) -> str:
    """`from 1 to 1000`, or `above 0 and at most 3600`; for lengths `1 to 64`."""
    limits = {type(item): item for item in metadata}
    if MinLen in limits and MaxLen in limits:
        return f"{limits[MinLen].min_length} to {limits[MaxLen].max_length}"
    assert Lt not in limits
    if Gt in limits:
        return f"above {_number(limits[Gt].gt)} and at most {_number(limits[Le].le)}"
    return f"from {_number(limits[Ge].ge)} to {_number(limits[Le].le)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def rows(section: type[Section] = Deployment, prefix: str = "") -> Iterator[KeyRow]:
    """Every key, sections before what is in them."""
    for key, field in keys_of(section).items():
        inner = section_of(field)
        path = f"{prefix}{key}" + ("[]" if inner and is_list(field) else "")
        yield KeyRow(path, allowed_text(field), _default_text(field), field.description or "")
        if inner:
            yield from rows(inner, f"{path}.")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return _number(field.default) if isinstance(field.default, int | float) else str(field.default)
