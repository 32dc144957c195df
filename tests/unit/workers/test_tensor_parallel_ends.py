"""What a group of ranks refuses, and how it ends: with a reason, without hanging, leaving no process."""

import signal
import subprocess
from dataclasses import replace
from threading import Event

import psutil
import pytest

from kvtransfer.config import TransportChoice
from kvtransfer.errors import TransportUnavailable
from kvtransfer.pool import KvSpan, span_bytes
from tests.support.rank_group import Group, batch_of, group_of, prepared_model, quiet, spec_of
from tests.support.tiny_model import write_tiny_gguf
from workers.api import KvTransferConfig, SpanReuseConfig
from workers.errors import OutOfMemory, RankLost, UnsupportedModel
from workers.model.prepare import PreparedModel
from workers.tensor_parallel import group, placing
from workers.tensor_parallel.group import place_on_ranks

#: A process that was killed is seen to have ended by then, on however slow a machine.
PATIENCE_S = 30.0
LONG = tuple(range(5, 65))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """Four heads and two KV heads."""
    folder = tmp_path_factory.mktemp("llama")
    return prepared_model(write_tiny_gguf(folder / "tiny.gguf"), folder / "cache")


def test_what_a_group_does_not_do_is_refused_before_a_rank_starts(llama: PreparedModel) -> None:
    spec = spec_of(llama, 2)
    for changes, error, says in (
        (
            {"engine": replace(spec.engine, tensor_parallel=3)},
            UnsupportedModel,
            "has 4 attention heads, which engine.tensorParallel 3 does not divide",
        ),
        (
            {"engine": replace(spec.engine, host_cache_bytes=1)},
            UnsupportedModel,
            "a manifest without hostCacheMiB",
        ),
        (
            {"engine": replace(spec.engine, span_reuse=SpanReuseConfig())},
            UnsupportedModel,
            "a manifest without spanReuse",
        ),
        (
            {"kv_transfer": KvTransferConfig(transport=TransportChoice.SHM)},
            TransportUnavailable,
            "set kvTransfer.transport to auto or grpc",
        ),
    ):
        with pytest.raises(error) as caught:
            place_on_ranks(replace(spec, **changes), llama, quiet)  # type: ignore[arg-type]
        assert says in str(caught.value)


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    return {child.pid for child in psutil.Process().children()}


def followers_of(made: Group) -> "list[subprocess.Popen[bytes]]":
    assert made.placed.followers is not None
    return [child.process for child in made.placed.followers._children]


def test_a_rank_that_is_killed_ends_the_group_with_the_reason(llama: PreparedModel) -> None:
    told: list[str] = []
    with group_of(llama, 2) as made:
        made.placed.followers.watch(told.append)  # type: ignore[union-attr]
        engine = made.engine()
        engine.submit("r", LONG, 20)
        engine.step()
        (process,) = followers_of(made)
        process.kill()
        with pytest.raises(RankLost, match="rank 1 of 2 was ended by SIGKILL"):
            engine.run()
        with pytest.raises(RankLost, match="rank 1 of 2 was ended by SIGKILL"):
            made.placed.forward(batch_of(LONG))  # type: ignore[misc]
        pool = made.placed.pool
        span = KvSpan((0,), 0, 1, 0, 1, 0, 2)
        with pytest.raises(RankLost):
            pool.read(span, memoryview(bytearray(span_bytes(span, pool.layout))))
    assert told == [
        "the tensor-parallel group has ended: rank 1 of 2 was ended by SIGKILL; the worker has to be started again"
    ]


def test_a_rank_that_is_killed_while_nothing_runs_is_missed(llama: PreparedModel) -> None:
    seen = Event()
    with group_of(llama, 2) as made:
        made.placed.followers.watch(lambda _reason: seen.set())  # type: ignore[union-attr]
        followers_of(made)[0].kill()
        assert seen.wait(PATIENCE_S)


def test_a_rank_that_stands_still_is_not_waited_for(llama: PreparedModel) -> None:
    with group_of(llama, 2, timeout_s=10.0) as made:
        engine = made.engine()
        engine.submit("r", LONG, 20)
        engine.step()
        (process,) = followers_of(made)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RankLost):
            engine.run()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_step_that_breaks_at_rank_0_ends_the_group(
    llama: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with group_of(llama, 2) as made:
        batch = batch_of(LONG)
        with pytest.raises(ValueError, match="not all in the KV cache"):
            made.placed.forward(replace(batch, slots=batch.slots + 1000))  # type: ignore[misc]
        made.placed.forward(batch)  # type: ignore[misc]

        def broken(*_arguments: object, **_options: object) -> None:
            raise RuntimeError("cosmic ray")

        monkeypatch.setattr(type(made.placed.model), "forward", broken)
        with pytest.raises(RankLost, match="rank 0 did not end a step: cosmic ray"):
            made.placed.forward(batch)  # type: ignore[misc]
        assert all(process.wait(PATIENCE_S) is not None for process in followers_of(made))


def test_nothing_is_left_when_loading_ends_early(
    llama: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()

    def refuse(*_arguments: object) -> None:
        raise OutOfMemory("weights", 2, 1, "get more")

    monkeypatch.setattr(placing, "check_memory", refuse)
    with pytest.raises(OutOfMemory):
        place_on_ranks(spec_of(llama, 2), llama, quiet)
    assert children() <= before


def test_steps_that_rank_0_cannot_prepare_end_the_group(
    llama: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()

    def broken(*_arguments: object) -> None:
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(group, "make_forward", broken)
    with pytest.raises(RankLost, match="rank 0 could not prepare its steps: cosmic ray"):
        place_on_ranks(spec_of(llama, 2), llama, quiet)
    assert children() <= before


def test_a_closed_group_leaves_no_process(llama: PreparedModel) -> None:
    with group_of(llama, 2) as made:
        processes = followers_of(made)
    assert [process.poll() for process in processes] == [0]
    made.placed.followers.close()  # type: ignore[union-attr]
