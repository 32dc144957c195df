"""What the tests with real workers and a tiny model share."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.support.hf_reference import hf_llama
from tests.support.tiny_model import write_tiny_gguf
from workers.model.prepare import load_weights, prepare


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models are converted once for all files, and not into the user's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache_home(own_cache: Path) -> Iterator[Path]:
    """Models are cached there while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own_cache))
        yield own_cache


@pytest.fixture
def nothing_escapes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a callback or a gRPC handler lets escape is only logged, and must fail the test all the same."""
    yield
    records = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    ours = [
        record
        for record in records
        if record.name.startswith(("asyncio", "grpc")) and not of_grpc_itself(record)
    ]
    assert not [record.getMessage() for record in ours]


def of_grpc_itself(record: logging.LogRecord) -> bool:
    """What gRPC logs of its own: a client that left as its call's status was to be sent, a call that came as its server
    was stopped, and an event for the loop of an earlier test (all loops of a process share one poller), which is closed
    by now.
    """
    message = record.getMessage()
    if message.startswith("Exception not handled by _handle_exceptions in servicer method"):
        error = record.exc_info[1] if record.exc_info else None
        return isinstance(error, asyncio.CancelledError)
    if message.startswith("Exception in callback PollerCompletionQueue._handle_events"):
        error = record.exc_info[1] if record.exc_info else None
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return message.startswith("ExecuteBatchError raised in core")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", num_layers=3)


@pytest.fixture(scope="module")
def reference(model_path: Path, cache_home: Path) -> LlamaForCausalLM:
    """The same weights in transformers."""
    prepared = prepare(str(model_path), lambda *_progress: None)
    return hf_llama(prepared.config, load_weights(prepared))
