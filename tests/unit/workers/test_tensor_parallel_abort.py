"""How rank 0 leaves a group of GPUs whose collectives are in CUDA graphs: without waiting for what waits for it."""

import gc
import threading
import weakref

import pytest
import torch

from workers.tensor_parallel.cutting import Rank
from workers.tensor_parallel.ranks import Ranks

PATIENCE_S = 30.0


class NcclLike:
    """As torch's: its abort returns when the graphs are gone, and meanwhile has a lock that each collective takes."""

    def __init__(self) -> None:
        self.num_aborts = 0
        self.has_let_go = threading.Event()
        self.graphs_are_gone = threading.Event()
        self.fails = False
        self._mutex = threading.Lock()

    def abort(self) -> None:
        self.num_aborts += 1
        with self._mutex:
            self.has_let_go.set()
            assert self.graphs_are_gone.wait(PATIENCE_S)
        if self.fails:
            raise RuntimeError("unhandled system error")

    def allreduce(self, _tensors: list[torch.Tensor], _options: object) -> None:
        with self._mutex:
            pass


def ranks_of(backend: NcclLike) -> Ranks:
    made = Ranks(Rank(0, 2), backend, torch.device("cpu"))
    made.device = torch.device("cuda", 0)
    made.captured(backend.graphs_are_gone.set)
    return made


def test_abort_gives_the_graphs_up_and_close_waits_for_it() -> None:
    backend = NcclLike()
    ranks = ranks_of(backend)
    ranks.abort()
    ranks.abort()
    assert backend.graphs_are_gone.is_set()
    ranks.close(PATIENCE_S)
    assert ranks._aborting is not None
    assert not ranks._aborting.is_alive()
    assert backend.num_aborts == 1


def test_no_collective_waits_for_an_abort_that_waits_for_a_graph() -> None:
    backend = NcclLike()
    ranks = ranks_of(backend)
    ranks.meet()
    # One that is being captured, which nobody can give up but who captures it.
    ranks.captured(lambda: None)
    ranks.abort()
    assert backend.has_let_go.wait(PATIENCE_S)
    values = torch.zeros(1)
    for collective in (
        ranks.meet,
        lambda: ranks.share(values),
        lambda: ranks.summed(lambda rows: rows)(values),
        lambda: ranks.gathered(lambda rows: rows, 2)(values[None]),
    ):
        with pytest.raises(RuntimeError, match="parted"):
            collective()
    backend.graphs_are_gone.set()
    ranks.close(PATIENCE_S)


def test_close_aborts_by_itself_and_tells_what_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    backend = NcclLike()
    ranks = ranks_of(backend)
    ranks.captured(lambda: None)
    ranks.close(0.0)
    assert "ranks_not_ended" in caplog.text
    backend.graphs_are_gone.set()
    ranks.close(PATIENCE_S)
    assert backend.num_aborts == 1


def test_an_abort_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    backend = NcclLike()
    backend.fails = True
    ranks_of(backend).close(PATIENCE_S)
    assert "unhandled system error" in caplog.text


def test_a_closed_group_holds_nothing_of_a_model() -> None:
    class Steps:
        def __init__(self, backend: NcclLike) -> None:
            self.backend = backend
            self.ranks = ranks_of(backend)
            self.ranks.captured(self.drop_graphs)

        def drop_graphs(self) -> None:
            self.backend.graphs_are_gone.set()

    gc.disable()
    try:
        steps = Steps(NcclLike())
        seen = weakref.ref(steps)
        steps.ranks.close(PATIENCE_S)
        del steps
        assert seen() is None
    finally:
        gc.enable()
