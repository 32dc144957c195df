"""What the pages say is there: links, files, functions, messages, commands, manifests."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.manifest.load import parse
from tests.support.command import command_lines

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kvtransfer" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
ONE_REQUEST = ROOT / "docs" / "one-request.md"
MANIFESTS = ROOT / "docs" / "manifests.md"
MUTANTS = ROOT / "tests" / "unit" / "kvtransfer" / "test_kvtransfer_mutants.py"
#: `folder/file.py::Class.method`, `folder/file.py::function` or `folder/file.proto::Message`.
NAMED = re.compile(r"`([\w./-]+\.(?:py|proto))::([\w.]+)`")
#: A file or a folder of this repository, from its root.
PLACE = re.compile(
    r"`((?:orchestrator|workers|kvtransfer|kernels|protos|deploy|tests|docs|scripts|benchmarks|examples)(?:/[\w./-]*)?)`"
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def names_in(file: Path) -> frozenset[str]:
    """Classes, functions and methods of a Python file, or messages, calls and services of a .proto."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".proto":
        return frozenset(re.findall(r"^ *(?:message|enum|service|rpc) (\w+)", text, re.MULTILINE))
    return frozenset(_qualified(ast.parse(text), ""))


def _qualified(node: ast.AST, prefix: str) -> list[str]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found += [prefix + child.name, *_qualified(child, f"{prefix}{child.name}.")]
    return found


def code_blocks(text: str, language: str) -> list[str]:
    return [block for found, block in CODE_BLOCK.findall(text) if found == language]


def test_a_name_that_is_not_there_would_be_found() -> None:
    names = names_in(ROOT / "orchestrator" / "gateway" / "dispatcher.py")
    assert {"Dispatcher", "Dispatcher.submit"} <= names
    assert "submit" not in names
    assert {"Submit", "WorkerService", "Session"} <= names_in(ROOT / "protos" / "worker.proto")


@each_page
def test_every_function_and_message_that_a_page_names_exists(page: Path) -> None:
    for file, name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file
        assert name in names_in(ROOT / file), f"{file}::{name}"


@each_page
def test_every_file_and_folder_that_a_page_names_exists(page: Path) -> None:
    for place in PLACE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / place).exists(), place


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@each_page
def test_every_command_line_can_be_parsed(page: Path) -> None:
    for block in code_blocks(page.read_text(encoding="utf-8"), ""):
        for line in command_lines(block):
            assert callable(main.parse(line).run), line


def test_the_pages_that_show_the_command_are_seen() -> None:
    for name in ("README.md", "docs/command-line.md", "docs/benchmarking.md", "docs/clusters.md"):
        blocks = code_blocks((ROOT / name).read_text(encoding="utf-8"), "")
        assert any(command_lines(block) for block in blocks), name


@each_page
def test_every_make_target_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


def test_every_manifest_in_the_docs_is_valid() -> None:
    blocks = code_blocks(MANIFESTS.read_text(encoding="utf-8"), "yaml")
    whole = [block for block in blocks if block.startswith("apiVersion:")]
    assert whole
    for block in whole:
        parse(block)


def test_every_planted_bug_of_a_transfer_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "kvtransfer.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| planted bug |")
    shown = re.findall(r"^\| (.+?) \| .+ \| \d+ \|$", table, re.MULTILINE)
    planted = re.findall(r"\bMutant\(\s*\"([^\"]+)\"", MUTANTS.read_text(encoding="utf-8"))
    assert planted
    assert sorted(shown) == sorted(planted)


def test_the_way_of_a_request_has_all_its_steps_and_passes_through_every_package() -> None:
    text = ONE_REQUEST.read_text(encoding="utf-8")
    way, _, failure = text.partition("## When the decode worker dies")
    steps = r"^(\d+)\. \*\*"
    assert re.findall(steps, way, re.MULTILINE) == [str(i) for i in range(1, 13)]
    assert re.findall(steps, failure, re.MULTILINE) == [str(i) for i in range(1, 6)]
    packages = {file.split("/")[0] for file, _ in NAMED.findall(way)}
    assert packages == {"orchestrator", "workers", "kvtransfer", "kernels", "protos"}
    for step in re.split(steps, way, flags=re.MULTILINE)[2::2]:
        assert NAMED.search(step), step
