"""Kernels are compiled once, and torch does their work where they cannot be."""

import logging
import subprocess
import sys

import pytest
import torch

from phasewise_kernels import jit
from phasewise_kernels.linear.op import Linear


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_loaded", {})


@pytest.mark.usefixtures("nothing_loaded")
def test_warm_up_tells_how_far_it_is() -> None:
    seen: list[tuple[str, float]] = []
    assert jit.warm_up(lambda what, done: seen.append((what, done)))
    done = [value for _, value in seen]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert {what for what, _ in seen} == {
        "compile",
        *(f"compile {name.split('.')[1]}" for name in jit.KERNEL_MODULES),
    }


@pytest.mark.usefixtures("nothing_loaded")
def test_a_failed_compilation_warns_once_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("phasewise_kernels.jit.import_module", fail)
    linear = Linear(torch.eye(3))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(linear(torch.eye(3)), torch.eye(3))
        linear(torch.eye(3))
    assert [record.message.split()[0] for record in caplog.records] == ["kernels_off"]
    assert not jit.warm_up(lambda _what, _done: None)


@pytest.mark.usefixtures("nothing_loaded")
def test_what_a_report_of_progress_raises_ends_the_compilation_and_blames_no_compiler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class StoppedError(Exception):
        pass

    def stop(_what: str, _done: float) -> None:
        raise StoppedError

    with caplog.at_level(logging.WARNING), pytest.raises(StoppedError):
        jit.warm_up(stop)
    assert not caplog.records
    assert jit.warm_up(lambda _what, _done: None)


SCRIPT = """
import os, warnings
warnings.simplefilter("ignore")
import torch
from phasewise_kernels import jit, threads
from phasewise_kernels.linear import op
assert jit.load(jit.KERNEL_MODULES[0]) is not None
threads.MIN_SHARED_BYTES = 0
torch.set_num_threads(3)
linear = op.Linear(torch.eye(64))
assert torch.equal(linear(torch.eye(64)[:2]), torch.eye(64)[:2])
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(torch.eye(64)[:2]), torch.eye(64)[:2]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_child_after_a_fork_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
