"""YAML text to plain data that remembers its lines. Pure.

Values are those of JSON: YAML's `on`, dates and base-60 numbers stay text. A duplicate key, a tag, or
an alias that unfolds without end is a problem here and never reaches the models.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from orchestrator.manifest.fields import Path

MAX_TEXT_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?|[-+]?\.inf|\.nan")
_BOOL = re.compile(r"true|false")
_NULL = re.compile(r"null|~|")


class Refused(Exception):  # noqa: N818 - ends the reading of one text; never leaves this package
    """The text is not one YAML document that we read; `line` counts from 1."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(line, message)
        self.line = line
        self.message = message


class _Loader(yaml.SafeLoader):
    """Composes nodes, with JSON's idea of what a plain word means and a bound on size and nesting."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        self._num_nodes += 1
        # A mapping composes its keys too; they are not counted as values.
        if self._depth > MAX_DEPTH or self._num_nodes > 2 * MAX_VALUES:
            line = parent.start_mark.line + 1 if parent else None
            raise Refused(line, f"has more than {MAX_DEPTH} levels of nesting or {MAX_VALUES} values")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _name, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


@dataclass(slots=True)
class Tree:
    """Plain data of a document. `lines` has the line of each key and list item, counted from 1."""

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    #: (path, line, sentence) of what is wrong in the YAML itself.
    problems: list[tuple[Path, int, str]] = field(default_factory=list)

    def line_of(self, path: Path) -> int:
        """The line of a path, or of the nearest section around it."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


def read_tree(text: str) -> Tree:
    """The one document in `text`. Raises Refused when there is none, or no reading of it."""
    if len(text) > MAX_TEXT_BYTES:
        raise Refused(None, f"is larger than {MAX_TEXT_BYTES // 2**20} MiB")
    try:
        root = _compose(text)
    except yaml.MarkedYAMLError as error:
        raise _refusal(text, error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Refused(line, f"character U+{int(error.character):04X} is not allowed in YAML") from error
    except (ValueError, OverflowError) as error:
        # PyYAML does not check the digits of an escape as "\UFFFFFFFF".
        raise Refused(None, "is not YAML: an escape in quotes names no character") from error
    tree = Tree(lines={(): root.start_mark.line + 1})
    tree.data = _Unfolder(tree).value(root, ())
    return tree


def _compose(text: str) -> Node:
    loader = _Loader(text)
    try:
        root = loader.get_node() if loader.check_node() else None
        if root is None or (root.tag == _TAG + "null" and root.value == ""):
            raise Refused(None, "is empty")
        second = loader.get_node() if loader.check_node() else None
        if second is not None:
            line = second.start_mark.line + 1
            raise Refused(line, "a second YAML document starts here; keep one")
    finally:
        loader.dispose()
    return root


def _refusal(text: str, error: yaml.MarkedYAMLError) -> Refused:
    mark = error.problem_mark or error.context_mark
    message = ", ".join(part for part in (error.context, error.problem) if part)
    if mark is None:
        return Refused(None, f"is not YAML: {message}")
    lines = text.splitlines()
    source = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in source[: len(source) - len(source.lstrip())]:
        return Refused(mark.line + 1, "a tab indents this line; YAML is indented with spaces")
    return Refused(mark.line + 1, f"is not YAML: {message} (column {mark.column + 1})")


class _Unfolder:
    """Nodes to plain data; aliases are copied out, up to a bound."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._num_values = 0

    def value(self, node: Node, path: Path) -> Any:
        """The plain value of a node; problems go to the tree. Raises Refused above the bounds."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise Refused(
                node.start_mark.line + 1,
                f"unfolds to more than {MAX_VALUES} values or {MAX_DEPTH} levels; use fewer aliases",
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return self._sequence(node, path)
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        self._check_tag(node, path, "map")
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._tree.problems.append((path, line, "a key is a list or mapping; keys are words"))
                continue
            key = self._text(key_node, path)
            inner = (*path, key)
            if key in data:
                sentence = f"this key is already on line {self._tree.lines[inner]}; keep one"
                self._tree.problems.append((inner, line, sentence))
                continue
            self._tree.lines[inner] = line
            data[key] = self.value(value_node, inner)
        return data

    def _sequence(self, node: SequenceNode, path: Path) -> list[Any]:
        self._check_tag(node, path, "seq")
        values: list[Any] = []
        for i, item in enumerate(node.value):
            self._tree.lines[*path, i] = item.start_mark.line + 1
            values.append(self.value(item, (*path, i)))
        return values

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text = self._text(node, path)
        kind = node.tag.removeprefix(_TAG)
        if kind == "int" and _INT.fullmatch(text):
            return int(text)
        if kind == "float" and (_FLOAT.fullmatch(text) or _INT.fullmatch(text)):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if kind == "bool" and _BOOL.fullmatch(text):
            return text == "true"
        if kind == "null" and _NULL.fullmatch(text):
            return None
        self._check_tag(node, path, "str")
        return text

    def _text(self, node: ScalarNode, path: Path) -> str:
        """The text of a scalar; lone surrogates, which an escape can make, are a problem."""
        text = str(node.value)
        try:
            text.encode()
        except UnicodeEncodeError:
            line = node.start_mark.line + 1
            self._tree.problems.append((path, line, "half of a surrogate pair is not a character"))
            return text.encode(errors="replace").decode()
        return text

    def _check_tag(self, node: Node, path: Path, kind: str) -> None:
        if node.tag != _TAG + kind:
            tag = node.tag.replace(_TAG, "!!")
            sentence = f"the tag {tag!r} is not allowed here; remove it"
            self._tree.problems.append((path, node.start_mark.line + 1, sentence))
