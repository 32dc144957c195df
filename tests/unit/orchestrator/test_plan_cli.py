"""`phasewise plan` as its user sees it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, main
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.manifest.load import load
from tests.support.profile import PROFILE
from workers import profile

ROOT = Path(__file__).parents[3]
AZURE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"


def plan(*arguments: object, trace: Path = AZURE, ttft_ms: float = 300, tpot_ms: float = 8) -> int:
    targets = ["--slo-ttft-ms", str(ttft_ms), "--slo-tpot-ms", str(tpot_ms)]
    return main.main(["plan", "--trace", str(trace), *targets, *map(str, arguments)])


def test_a_plan_has_every_family_a_verdict_and_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "planned.yaml", tmp_path / "plan.json"
    assert plan("--devices", 2, "--quick", "--out", out, "--json", saved) == exit_codes.OK
    said = capsys.readouterr().out
    data = json.loads(saved.read_text())
    assert data["format"] == "phasewise-plan/v1"
    assert [row["family"] for row in data["families"]] == ["aggregated", "disaggregated", "mixed"]
    for row, name in zip(data["families"], ("2 x prefill+decode", "1 x prefill + 1 x decode"), strict=False):
        assert row["shape"] == name
        assert f"{row['goodput_rps']:.1f} +- {row['half_interval_rps']:.1f}" in said
        assert len(row["by_seed_rps"]) == 3
    assert "disaggregated" in data["verdicts"][0]["sentence"]
    assert data["verdicts"][0]["sentence"] in said
    assert f"manifest   {out}" in said
    best = next(row for row in data["families"] if row["family"] == data["chosen"])
    groups = load(out).spec.workers
    assert " + ".join(f"{g.replicas} x {'+'.join(g.phases)}" for g in groups) == best["shape"]
    assert {group.engine.token_budget for group in groups} == {best["token_budget"]}
    assert main.main(["validate", str(out)]) == exit_codes.OK


def test_a_profile_says_how_long_steps_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(MODELS["llama-3-8b"], name='mine: "a" # b')
    device = replace(DEVICES["h100"], name="this one")
    costs = replace(PROFILE.costs, model=model, device=device)
    file, out = tmp_path / "p.json", tmp_path / "planned.yaml"
    file.write_text(profile.to_json(replace(PROFILE, costs=costs)))
    assert plan("--devices", 1, "--quick", "--profile", file, "--out", out) == exit_codes.OK
    assert '1 x this one, mine: "a" # b,' in capsys.readouterr().out
    assert load(out).spec.model.source == '/models/mine: "a" # b'


def test_a_profile_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    file.write_text("{}")
    assert plan("--devices", 1, "--profile", file) == exit_codes.USAGE
    assert f"{file}: is no profile" in capsys.readouterr().err
    assert plan("--devices", 1, "--profile", file, "--device", "h100") == exit_codes.USAGE
    assert "leave out --model and --device" in capsys.readouterr().err


def test_of_one_device_nothing_can_be_apart_and_one_seed_gives_one_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        assert plan("--devices", 1, "--quick", "--json", file) == exit_codes.OK
        said = capsys.readouterr()
        assert "disaggregated: 0 candidates" in said.err
        assert "nothing can be apart" in said.out
    assert files[0].read_bytes() == files[1].read_bytes()


def test_targets_that_nothing_meets_are_said_with_what_is_possible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan("--devices", 8, ttft_ms=20) == exit_codes.FAILURE
    said = capsys.readouterr().err
    assert "no plan meets these targets: alone on idle devices" in said
    assert "first token within" in said
    assert "the targets are 20 and 8 ms" in said


def short_trace(folder: Path) -> Path:
    file = folder / "short.csv"
    file.write_text("\n".join(AZURE.read_text().splitlines()[:50]) + "\n")
    return file


def test_a_trace_that_is_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--devices", 2, trace=short_trace(tmp_path)) == exit_codes.USAGE
    assert "has 49 rows; a plan needs 100" in capsys.readouterr().err
    assert plan("--devices", 2, trace=tmp_path / "none.csv") == exit_codes.USAGE
    assert "cannot be read" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    assert plan("--devices", 2, "--out", out) == exit_codes.USAGE
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "0"], "invalid number of devices, 1 to 64 value: '0'"),
        (["--devices", "many"], "invalid number of devices"),
        (["--devices", "2", "--model", "gpt"], "llama-3-8b"),
        (["--devices", "2", "--device", "tpu"], "h100"),
        (["--devices", "2", "--attainment", "1.5"], "share above 0 and at most 1"),
        (["--devices", "2", "--seeds", "2"], "number of seeds, 3 to 20"),
    ],
)
def test_a_wrong_command_line_says_what_is_allowed(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        plan(*arguments)
    assert left.value.code == exit_codes.USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama-3-70b"], "139 GB of weights and one h100 80 GB of memory"),
        (["--images", "1", "--device", "a100"], "how fast it encodes is not known"),
        (["--json", "nowhere/plan.json"], "there is no such folder"),
        (["--out", "nowhere/plan.yaml"], "there is no such folder"),
        (["--max-context-tokens", "1"], "2 tokens at least"),
    ],
)
def test_what_cannot_be_planned_says_why(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--devices", 2, *arguments) == exit_codes.USAGE
    assert words in capsys.readouterr().err
