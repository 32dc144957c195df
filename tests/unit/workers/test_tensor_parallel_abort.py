"""How rank 0 leaves a group of GPUs whose collectives are in CUDA graphs: without waiting for what waits for it."""

import threading

import pytest
import torch

from workers.tensor_parallel.cutting import Rank
from workers.tensor_parallel.ranks import Ranks

PATIENCE_S = 30.0


class NcclLike:
    """Its abort returns when the graphs are gone, as NCCL's does."""

    def __init__(self) -> None:
        self.num_aborts = 0
        self.has_let_go = threading.Event()
        self.graphs_are_gone = threading.Event()
        self.fails = False

    def abort(self) -> None:
        self.num_aborts += 1
        self.has_let_go.set()
        assert self.graphs_are_gone.wait(PATIENCE_S)
        if self.fails:
            raise RuntimeError("unhandled system error")


def ranks_of(backend: NcclLike) -> Ranks:
    made = Ranks(Rank(0, 2), backend, torch.device("cpu"))
    made.device = torch.device("cuda", 0)
    made.captured(backend.graphs_are_gone.set)
    return made


def test_abort_waits_for_no_graph_and_close_gives_them_up() -> None:
    backend = NcclLike()
    ranks = ranks_of(backend)
    ranks.abort()
    ranks.abort()
    assert backend.has_let_go.wait(PATIENCE_S)
    assert not backend.graphs_are_gone.is_set()
    ranks.close(PATIENCE_S)
    assert ranks._aborting is not None
    assert not ranks._aborting.is_alive()
    assert backend.num_aborts == 1


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
