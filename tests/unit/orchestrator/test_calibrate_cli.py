"""`phasewise calibrate` as its user sees it, with a model of a few thousand weights."""

from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, main
from tests.support.tiny_model import write_tiny_gguf
from workers.latency_model import LatencyModel
from workers.profile import from_json


def test_a_model_is_measured_and_its_profile_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "profile.json"
    assert main.main(["calibrate", "--model", str(model), "--out", str(out)]) == exit_codes.OK
    shown = capsys.readouterr().out
    assert "32 decodes of 128" in shown
    # The model's context is of 512 tokens.
    assert "1,024" not in shown
    assert f"saved      {out}" in shown
    profile = from_json(out.read_text(), file=str(out))
    assert (profile.costs.model.name, profile.costs.device.name) == ("tiny.gguf", "cpu")
    assert profile.costs.num_steps >= len(profile.steps) > 5
    fitted = LatencyModel.fitted(profile.costs)
    for step in profile.steps:
        assert fitted.step_s(step.shape) == pytest.approx(step.predicted_s)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "no-such.gguf"), exit_codes.FAILURE, "no-such.gguf"),
        (
            ("--model", "x.gguf", "--weight-dtype", "float16"),
            exit_codes.USAGE,
            "with --device cpu it is one of",
        ),
        (("--model", "x.gguf", "--device", "cuda", "--weight-dtype", "int8"), exit_codes.USAGE, "bfloat16"),
        (("--model", "x.gguf", "--kv-dtype", "fp8"), exit_codes.USAGE, "with --device cpu it is auto"),
        (("--model", "x.gguf", "--out", "/no/such/folder/p.json"), exit_codes.USAGE, "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["calibrate", *arguments]) == code
    assert said in capsys.readouterr().err
