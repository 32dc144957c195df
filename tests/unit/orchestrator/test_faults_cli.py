"""`phasewise simulate --faults`: what its file may say, what it refuses, and what is told of it."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import exit_codes, main
from orchestrator.errors import ManifestError
from orchestrator.manifest.faults import FIELDS_OF_KIND, FaultFile, FaultSection, KindName, load_faults
from orchestrator.manifest.fields import keys_of
from orchestrator.sim.faults import FaultKind
from tests.support.command import command_lines

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "simulate"
FAULTS = EXAMPLES / "faults.yaml"
AZURE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
PAGE = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")
WORKERS = ("prefill-0", "decode-0", "decode-1")
#: A good value of each key.
VALUES = {"worker": "decode-0", "durationS": 2, "factor": 3, "rate": 0.1}


def read(folder: Path, *faults: object, workers: tuple[str, ...] = WORKERS) -> tuple[FaultSection, ...]:
    path = folder / "faults.yaml"
    path.write_text("faults:\n" + "".join(f"- {json.dumps(one)}\n" for one in faults))
    return load_faults(path, workers, 60.0)


def refusal(folder: Path, *faults: object, workers: tuple[str, ...] = WORKERS) -> list[str]:
    """Each without the file's name."""
    with pytest.raises(ManifestError) as raised:
        read(folder, *faults, workers=workers)
    return [str(problem).removeprefix(f"{folder / 'faults.yaml'}:") for problem in raised.value.problems]


def simulate(faults: Path, *arguments: object, manifest: str = "one-and-one.yaml") -> int:
    begin = ["simulate", str(EXAMPLES / manifest), "--trace", str(AZURE), "--faults", str(faults)]
    return main.main([*begin, *map(str, arguments)])


def keys_of_kind(kind: str) -> set[str]:
    return {FaultSection.model_fields[name].alias or name for name in FIELDS_OF_KIND[kind]}


def test_every_kind_of_fault_can_be_written() -> None:
    assert set(get_args(KindName)) == set(FIELDS_OF_KIND) == {kind.value for kind in FaultKind}


@pytest.mark.parametrize("kind", FaultKind)
def test_a_kind_has_its_keys_and_no_others(kind: FaultKind, tmp_path: Path) -> None:
    keys = keys_of_kind(kind)
    good = {"kind": kind.value, "atS": 1, **{key: VALUES[key] for key in keys}}
    (section,) = read(tmp_path, good)
    assert section.kind == kind.value
    for key in keys:
        (said,) = refusal(tmp_path, {name: value for name, value in good.items() if name != key})
        assert said.startswith(f"2: faults[0].{key}: this key is required with kind: {kind.value} (")
    for key in set(VALUES) - keys:
        (said,) = refusal(tmp_path, {**good, key: VALUES[key]})
        assert said == f"2: faults[0].{key}: kind: {kind.value} has none; leave it out"


CRASH = {"kind": "crash", "worker": "decode-0", "atS": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"worker": "decode-00"}, '"decode-00"; allowed: prefill-0, decode-0, decode-1; did you mean'),
        ({"worker": "Decode_1"}, "did you mean 'decode-1'?"),
        ({"worker": "x"}, 'faults[1].worker: is "x"; allowed: prefill-0, decode-0, decode-1'),
        ({"worker": 3}, "faults[1].worker: is 3; allowed: the id of a worker"),
        ({"atS": 60}, "faults[1].atS: is 60; allowed: from 0 to less than 60, the --duration in which"),
        ({"atS": -0.1}, "faults[1].atS: is -0.1; allowed: a number from 0 to 1000000"),
        ({"atS": "3"}, 'faults[1].atS: is "3"; allowed: a number from 0'),
        ({"kind": "crsh"}, "did you mean 'crash'?"),
        (
            {"at_s": 3},
            "faults[1].at_s: unknown key; allowed: kind, atS, worker, durationS, factor, rate; did",
        ),
        ({"kind": "pause", "durationS": 0}, "faults[1].durationS: is 0; allowed: a number above 0"),
        ({"kind": "slow", "durationS": 1, "factor": 1}, "factor: is 1; allowed: a number above 1 and"),
        ({"kind": "loss_with_workers", "durationS": 1, "rate": 1.1}, "rate: is 1.1; allowed: a number above"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_what_is_allowed(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    (sentence,) = refusal(tmp_path, CRASH, {**CRASH, **change})
    assert sentence.startswith("3: ")
    assert said in sentence


def test_of_many_workers_some_are_named(tmp_path: Path) -> None:
    workers = tuple(f"w-{number}" for number in range(20))
    (sentence,) = refusal(tmp_path, CRASH, workers=workers)
    assert sentence.endswith("allowed: w-0, w-1, w-2, w-3, w-4, w-5, w-6, w-7 and 12 more")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("[]", "1: is not a mapping; allowed: a mapping with faults"),
        ("faults: []", "1: faults: has 0 items; allowed: a list of 1 to 1000 mappings"),
        ("faults: [", "1: is not YAML"),
        ("fault: []", "1: fault: unknown key; allowed: faults; did you mean 'faults'?"),
    ],
)
def test_a_file_without_faults_is_refused(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    assert simulate(path, "--rate", 1, "--duration", 2) == exit_codes.INVALID_MANIFEST
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert simulate(tmp_path / "none", "--rate", 1, "--duration", 2) == exit_codes.INVALID_MANIFEST
    assert "none: cannot be read: No such file" in capsys.readouterr().err


def test_the_coarse_mode_refuses_faults(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--rate", 20, "--duration", 10, "--mode", "coarse")
    assert simulate(FAULTS, *arguments, manifest="four-and-four.yaml") == exit_codes.USAGE
    assert capsys.readouterr().err.startswith("--faults: --mode coarse has no messages or processes")


def test_the_example_of_the_page_tells_of_its_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (line,) = [line for block in blocks for line in command_lines(block) if "--faults" in line]
    path = tmp_path / "x.json"
    words = [str(tmp_path / "plots") if word == "FOLDER" else word for word in line]
    texts = []
    for _ in range(2):
        assert main.main([*words, "--json", str(path)]) == exit_codes.OK
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]
    (run,) = json.loads(texts[0])["runs"]
    out = capsys.readouterr().out
    assert run["summary"]["num_finished"] == 200
    assert [one["kind"] for one in run["faults"]] == [
        "crash",
        "slow",
        "cut_from_workers",
        "loss_with_gateway",
        "controller_crash",
    ]
    crash, slow, _, loss, controller = run["faults"]
    # It is seen at once, and the process in its place loads for five seconds.
    assert crash == {
        "at_s": 1,
        "kind": "crash",
        "worker_id": "decode-0",
        "duration_s": None,
        "factor": None,
        "rate": None,
        "why_not": "",
        "over_at_s": 6.0,
    }
    assert (slow["factor"], slow["duration_s"], slow["over_at_s"]) == (4, 2, 4)
    assert (loss["rate"], controller["worker_id"]) == (0.01, None)
    num_again = sum(request["gateway"]["attempts"] > 1 for request in run["requests"])
    assert num_again > 0
    assert run["num_lost_messages"] > 0
    for said in (
        f"faults     5 happened: {num_again} finished requests tried more than once, {run['num_lost_messages']} message",
        "   1.00 s fault crash of decode-0: serves again after 5.00 s\n",
        "   2.00 s fault slow of decode-1, 4 times, for 2.00 s\n",
        "   6.00 s fault loss_with_gateway of decode-2, 1% of messages, for 2.00 s\n",
        "   7.00 s fault controller_crash: another one after 2.00 s\n",
    ):
        assert said in out
        # The page shows it too.
        assert said.rstrip() in PAGE or "finished requests" in said


def test_of_several_rates_the_faults_that_happened_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("faults:\n- {kind: slow, worker: decode-0, atS: 1, durationS: 900, factor: 2}\n")
    assert simulate(path, "--rate", "5,10", "--duration", 2) == exit_codes.OK
    assert "faults     1 at 5/s, 1 at 10/s\n" in capsys.readouterr().out
    assert simulate(path, "--rate", 5, "--duration", 2) == exit_codes.OK
    assert "   1.00 s fault slow of decode-0, 2 times, for 900 s: not over at the end\n" in (
        capsys.readouterr().out
    )


def test_what_did_not_happen_is_told_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, saved = tmp_path / "f.yaml", tmp_path / "x.json"
    path.write_text(
        "faults:\n- {kind: crash, worker: full-1, atS: 1.8}\n- {kind: pause, worker: full-1, atS: 1.9, durationS: 1}\n"
    )
    arguments = ("--rate", 20, "--duration", 2, "--json", saved)
    assert simulate(path, *arguments, manifest="two-full.yaml") == exit_codes.OK
    out = capsys.readouterr().out
    assert "faults     1 of 2 happened" in out
    assert "fault pause of full-1, for 1.00 s: did not happen: no process of it lived\n" in out
    (run,) = json.loads(saved.read_text())["runs"]
    assert [one["why_not"] for one in run["faults"]] == ["", "no process of it lived"]


def test_the_manifest_says_how_long_a_worker_may_be_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, manifest = tmp_path / "f.yaml", tmp_path / "two.yaml"
    path.write_text("faults:\n- {kind: pause, worker: full-1, atS: 0.05, durationS: 3}\n")
    text = (EXAMPLES / "two-full.yaml").read_text()
    for keys, said in (
        ("tickMs: 100, heartbeatTimeoutMs: 1000", ": its process ended after 1.05 s\n"),
        ("tickMs: 500, heartbeatTimeoutMs: 5000", ", for 3.00 s\n"),
    ):
        manifest.write_text(text.replace("  slo:\n", f"  controller: {{{keys}}}\n  slo:\n"))
        assert simulate(path, "--rate", 20, "--duration", 4, manifest=str(manifest)) == exit_codes.OK
        assert said in capsys.readouterr().out


def test_every_key_and_kind_is_on_the_page() -> None:
    _, _, section = PAGE.partition("\n## Faults\n")
    for word in (*keys_of(FaultSection), *FIELDS_OF_KIND):
        assert f"`{word}`" in section, word


@given(st.permutations(sorted(FIELDS_OF_KIND)), st.lists(st.floats(0, 59.9), min_size=9, max_size=9))
def test_any_faults_of_all_kinds_are_read_as_they_are_written(kinds: list[str], times: list[float]) -> None:
    written = [
        {"kind": kind, "atS": at_s, **{key: VALUES[key] for key in keys_of_kind(kind)}}
        for kind, at_s in zip(kinds, times, strict=True)
    ]
    file = FaultFile.model_validate_json(
        json.dumps({"faults": written}), context={"worker_ids": WORKERS, "duration_s": 60.0}
    )
    assert [one.model_dump(by_alias=True, exclude_none=True) for one in file.faults] == written


def test_the_faults_of_the_shifting_load_are_of_its_workers_and_within_it() -> None:
    """As docs/role-switch.md has it; the run itself takes long."""
    workers = [f"{phase}-{number}" for phase in ("prefill", "decode") for number in range(2)]
    kinds = [one.kind for one in load_faults(EXAMPLES / "shifting-faults.yaml", workers, 42.0)]
    assert kinds == ["crash", "slow", "cut_from_workers", "loss_with_gateway", "controller_crash"]
