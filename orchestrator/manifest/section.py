"""What the sections of a manifest are made with. Pure."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


class Allowed:
    """Metadata of a field: what it accepts, for error messages and docs, where limits do not say it."""

    def __init__(self, text: str) -> None:
        self.text = text


def inconsistent(problems: list[tuple[tuple[str | int, ...], str]]) -> None:
    """Refuse a section for keys that do not fit each other: (path from the section, sentence) each."""
    if problems:
        raise PydanticCustomError("inconsistent", "keys do not fit each other", {"problems": problems})


class Section(BaseModel):
    """A mapping of the manifest: no other keys, no conversion of types, no change after reading."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
