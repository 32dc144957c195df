"""The command line as a whole: finding the verb, help texts, exit codes."""

import argparse
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, main
from orchestrator.cli.main import EXAMPLES, VERBS
from tests.support.command import command_lines

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "command-line.md"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for the verb `down`; a test sets what its `run` does."""
    module = types.ModuleType("orchestrator.cli.down")

    def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        parser = subparsers.add_parser("down")
        parser.add_argument("name")
        parser.set_defaults(run=lambda args: module.run(args))

    module.add_parser = add_parser  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orchestrator.cli.down", module)
    return module


def test_a_verb_gets_its_arguments_and_gives_the_exit_code(stub: types.ModuleType) -> None:
    seen: list[argparse.Namespace] = []
    stub.run = lambda args: seen.append(args) or 7  # type: ignore[attr-defined]
    assert main.main(["--log-level", "info", "down", "laptop"]) == 7
    assert seen[0].name == "laptop"
    assert seen[0].log_level == "info"


def test_ctrl_c_is_one_line_and_130(stub: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    stub.run = run  # type: ignore[attr-defined]
    assert main.main(["down", "laptop"]) == exit_codes.INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")


def test_no_complaint_when_the_reader_of_the_output_has_gone() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "validate", "--schema"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == exit_codes.BROKEN_PIPE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stauts"], "there is no verb 'stauts'; did you mean 'status'?"),
        (["serve-everything"], "there is no verb 'serve-everything'; `phasewise --help` lists them"),
        ([], "a verb is needed\n"),
        ([], "phasewise up deploy/manifests/laptop.yaml\n"),
        (["--log-level", "loud", "down"], "invalid choice: 'loud'"),
        (["generate", "Hi", "--top_k", "3"], "unrecognized arguments: --top_k 3; did you mean --top-k?"),
        (["generate", "Hi", "--temprature=1"], "did you mean --temperature?"),
        (["status", "--frobnicate"], "unrecognized arguments: --frobnicate (`phasewise status --help`"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == exit_codes.USAGE
    assert said in capsys.readouterr().err


def test_a_wrong_option_of_a_verb_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["generate", "Hi", "--n", "0"])
    assert caught.value.code == exit_codes.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phasewise generate: argument --n: invalid whole number, 1 or more value: '0' (")


def test_help_lists_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == exit_codes.OK
    out = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name:<9} {verb.summary}\n" in out
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"  {code:<4} {meaning}\n" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("phasewise ")


def test_every_exit_code_has_a_meaning() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes == set(exit_codes.MEANINGS)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_describes_itself_as_the_list_of_verbs_does(name: str) -> None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(VERBS[name].module).add_parser(subparsers)
    assert [action.help for action in subparsers._choices_actions] == [VERBS[name].summary]


@pytest.mark.parametrize("name", VERBS)
def test_every_example_of_a_verb_can_be_parsed(name: str) -> None:
    lines = command_lines(importlib.import_module(VERBS[name].module).EXAMPLES)
    assert any(line[0] == name for line in lines)
    for line in lines:
        assert callable(main.parse(line).run)


def test_every_example_of_the_command_can_be_parsed() -> None:
    lines = command_lines(EXAMPLES)
    assert len(lines) >= 5
    for line in lines:
        assert callable(main.parse(line).run)


def test_the_docs_have_every_verb_and_exit_code() -> None:
    text = DOCS.read_text()
    for name in VERBS:
        assert f"`{name}`" in text
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"| {code} | {meaning} |" in text


def test_the_command_and_its_clients_import_nothing_slow() -> None:
    modules = [VERBS[name].module for name in ("status", "chat", "generate")]
    code = f"""
import sys
import orchestrator.cli.main
light = set(sys.modules)
import {", ".join(modules)}
slow = ("torch", "ray", "transformers", "tokenizers", "numpy", "pydantic")
print([name for name in ("grpc", "google.protobuf", *slow) if name in light])
print([name for name in slow if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
