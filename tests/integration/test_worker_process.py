"""The same worker as a process of its own."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.support.hf_reference import hf_greedy
from tests.support.worker_client import (
    WorkerClient,
    greedy_submit,
    prompt,
)
from tests.support.worker_process import next_line, start_process, worker_processes
from workers.api import Phase
from workers.profile import read
from workers.step_shape import FactorSource, StepCosts

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


def test_plain_process_serves_and_ends_on_sigterm(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario(address: str) -> None:
        client = WorkerClient(address)
        assert (await client.status()).pid == process.pid
        assert await client.generate(greedy_submit(17)) == hf_greedy(reference, prompt(17), 12)
        await client.close()

    arguments = ("--worker-id", "a-0", "--phases", "prefill,decode", "--model", str(model_path))
    small = ("--kv-cache-mib", "2", "--token-budget", "32", "--max-running-sequences", "8")
    with start_process(*arguments, *small) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        bound = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", next_line(process.stdout, "listening"))
        assert bound is not None
        assert next_line(process.stdout, "ready") == "ready\n"
        assert b"MALLOC_ARENA_MAX=2" in Path(f"/proc/{process.pid}/environ").read_bytes()
        asyncio.run(scenario(bound[1]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""


def test_plain_process_begins_with_the_profile_that_it_is_given(model_path: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    command = [sys.executable, "-m", "orchestrator", "calibrate", "--model", str(model_path), "--out"]
    subprocess.run([*command, str(profile)], check=True, capture_output=True)

    async def costs(address: str) -> StepCosts | None:
        client = WorkerClient(address)
        status = await client.status()
        await client.close()
        return status.step_costs

    both = frozenset({Phase.PREFILL, Phase.DECODE})
    option = ("--profile", str(profile))
    with worker_processes(("a-0", both), model=model_path, arguments=[option]) as [worker]:
        found, measured = asyncio.run(costs(worker.address)), read(profile).costs
        assert found == replace(measured, num_steps=0, num_prompt_steps=0, source=FactorSource.PROFILE)
    arguments = ("--worker-id", "a-0", "--phases", "decode", "--model", str(model_path), *option)
    with start_process(*arguments, "--threads", "2") as process:
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: {profile}: is of a worker with threads: 1, and this one has 2" in errors


def test_plain_process_names_what_is_wrong(model_path: Path) -> None:
    arguments = ("--worker-id", "a-0", "--model", str(model_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start_process(*arguments, "--phases", "decode", "--port", str(port)) as process:
            _output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in errors
    with start_process(*arguments, "--phases", "draw") as process:
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "choose from encode, prefill, decode" in errors
    with start_process(*arguments, "--phases", "decode", "--token-budget", "8") as process:
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "argument --token-budget: is 8; it must be at least --max-running-sequences" in errors
