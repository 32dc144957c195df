"""The capacity benchmark beside vLLM, which a package that only streams tokens stands for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import LlamaConfig

from benchmarks.serving.capacity_rows import Load, report
from benchmarks.serving.capacity_vllm import hf_config, is_installed, vllm_serving
from benchmarks.serving.engine_gpu import LLAMA_3_8B
from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.trace import TraceRow
from orchestrator.control.slo import Slo
from tests.support.device_engine import TINY
from tests.support.waiting import until_in_thread

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, TRACE = "benchmarks/serving/capacity_gpu.py", "tests/fixtures/traces/azure_llm_2023_conv.csv"
FAKE = ROOT / "tests" / "support" / "fake_vllm"
LENGTHS = ((5, 7), (17, 1), (40, 12))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the stand-in says what it was asked; with it, vLLM is there."""
    path = tmp_path / "told.jsonl"
    monkeypatch.setenv("FAKE_VLLM", str(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(FAKE))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load() -> Load:
    planned = [
        PlannedRequest(TraceRow(i + 1, 0.01 * i, prompt, output), 0.01 * i, prompt, output)
        for i, (prompt, output) in enumerate(LENGTHS)
    ]
    return Load.of(planned, TINY.vocab_size)


def until_gone(pids: list[int]) -> None:
    def are_gone() -> bool:
        return not any(
            psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
        )

    until_in_thread(are_gone, "the end of all processes of vLLM")


def test_it_gets_the_same_prompts_and_answers_as_long_as_in_the_trace(told: Path) -> None:
    with vllm_serving(TINY, 2048) as (serve, about):
        served = serve(load())
        again = serve(load())
    assert about["version"] == "0.0-fake"
    assert about["max_num_batched_tokens"] == 2048
    for came in (served, again):
        assert [len(one.times_s) for one in came] == [output for _, output in LENGTHS]
        assert [one.plan for one in came] == list(load().requests)
        assert all(one.due_s < one.times_s[0] for one in came)
        assert all(one.times_s == sorted(one.times_s) for one in came)
        assert came[2].due_s - came[0].due_s == pytest.approx(0.02)
    started, *requests = lines(told)
    assert [one["prompt"] for one in requests] == [list(prompt) for prompt in load().prompts] * 2
    assert [one["max_tokens"] for one in requests] == [output for _, output in LENGTHS] * 2
    assert all(one["is_greedy"] for one in requests)
    until_gone(started["pids"])


def test_tokens_that_come_together_count_at_one_time(told: Path) -> None:
    with vllm_serving(TINY, 2048) as (serve, _):
        served = serve(load())
    times_s = served[2].times_s
    assert len(set(times_s)) == len(times_s) / 3
    row = report("vllm@2048", 20.0, served, Slo(60.0, 60.0))
    assert row["attainment"] == 1.0
    assert row["itl_s"]["p50"] == 0.0


def test_its_settings_are_those_of_our_engine_and_else_those_of_its_server(told: Path) -> None:
    with vllm_serving(TINY, 8192):
        pass
    started = lines(told)[0]
    assert started["context"] == "OPENAI_API_SERVER"
    assert started["settings"]["max_num_batched_tokens"] == 8192
    assert started["settings"]["max_model_len"] == TINY.max_context_tokens
    assert started["settings"]["enable_prefix_caching"] is False
    assert started["settings"]["load_format"] == "dummy"
    assert json.loads(started["config"]) == hf_config(TINY)
    assert not Path(started["settings"]["model"]).exists()
    until_gone(started["pids"])


def test_the_folder_that_it_reads_has_our_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(LLAMA_3_8B)), encoding="utf-8")
    read = LlamaConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == LLAMA_3_8B.rope.theta
    assert read.head_dim == LLAMA_3_8B.head_dim
    assert read.num_key_value_heads == LLAMA_3_8B.num_kv_heads
    assert read.tie_word_embeddings is False
    assert read.max_position_embeddings == LLAMA_3_8B.max_context_tokens


@pytest.mark.parametrize("mode", ["dies", "short"])
def test_a_vllm_that_dies_or_gives_too_little_is_an_error_and_leaves_nothing(
    mode: str, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child holds the connection open: that must not be waited for."""
    monkeypatch.setenv("FAKE_VLLM_MODE", mode)
    with pytest.raises(RuntimeError, match="vLLM ended with"), vllm_serving(TINY, 2048) as (serve, _):
        serve(load())
    until_gone(lines(told)[0]["pids"])


def test_a_failure_of_ours_ends_it(told: Path) -> None:
    with pytest.raises(ZeroDivisionError), vllm_serving(TINY, 2048):
        raise ZeroDivisionError
    until_gone(lines(told)[0]["pids"])


def run_script(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, "--tiny", "--trace", TRACE, "--first-row", "1", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(is_installed(), reason="vLLM is installed")
def test_without_vllm_it_says_so_before_it_begins() -> None:
    done = run_script("--policies", "slack@predicted,vllm@2048")
    assert done.returncode == 2
    assert "pip install vllm" in done.stderr
    assert done.stdout == ""


def test_the_script_makes_rows_of_vllm_like_ours(told: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_script(
        *("--policies", "vllm@2048,vllm@8192", "--rates", "20,40", "--duration", "0.5"),
        *("--json", str(out), "--plot", str(tmp_path / "out.svg")),
    )
    assert done.returncode == 0, done.stderr
    assert "words of vLLM" not in done.stdout
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["policy"], row["rate_rps"], row["num_requests"]) for row in rows] == [
        (policy, rate, num) for policy in ("vllm@2048", "vllm@8192") for rate, num in ((20.0, 10), (40.0, 20))
    ]
    assert "vllm@8192 (dashed)" in (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert rows[3]["vllm"]["max_num_batched_tokens"] == 8192
