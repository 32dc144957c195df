"""The `phasewise` command and the examples, run as a user runs them: as processes, with folders of their own."""

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Far above what any of them takes on a busy machine.
BOUND_S = 240.0


@dataclass(frozen=True, slots=True)
class User:
    """Somebody whose deployments are remembered in `state`; models come from the usual cache."""

    state: Path

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`phasewise ARGUMENTS`, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """A Python command, with its output in pipes and in a process group of its own, as in a terminal."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_STATE_HOME": str(self.state), "PYTHONUNBUFFERED": "1"}


def with_free_ports(manifest: str, folder: Path) -> Path:
    """A copy of a manifest that ships, with free ports: others on this machine may have those that it names."""
    text = (ROOT / "deploy" / "manifests" / manifest).read_text().replace("source: ../..", f"source: {ROOT}")
    copy = folder / manifest
    copy.write_text(re.sub(r"(127\.0\.0\.1):\d+", r"\1:0", text))
    return copy


def command_lines(text: str) -> list[list[str]]:
    """Arguments of every `phasewise ...` line in a text, without what a shell does around it."""
    text = text.replace("\\\n", " ")
    found = []
    for line in re.findall(r"^(?:.*\| *| *)(phasewise .*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        ends = [i for i, word in enumerate(words) if word in (">", "|")]
        found.append(words[1 : ends[0] if ends else None])
    return found


def press_ctrl_c(process: "subprocess.Popen[str]") -> None:
    """As a terminal does: the whole process group gets SIGINT."""
    os.killpg(process.pid, signal.SIGINT)


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Lines of stderr up to the one with this text; fails when the process ends before."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was never said; this was: {said}")
