"""NCCL as the ranks use it, with one rank: every call and its capture into a graph, on a host with one GPU.

Of one rank NCCL keeps no count of graphs, so that its abort waits for none: what that does to several is in test_tensor_parallel_gpu.py.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.support.device_engine import PROMPTS, TINY, DeviceEngine, greedy, random_weights
from workers.model.llama import Llama
from workers.tensor_parallel.cutting import Rank, rank_config
from workers.tensor_parallel.ranks import Ranks, join, open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TIMEOUT_S = 30.0


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = join(Rank(0, 1), open_store(1), torch.device("cuda", 0), TIMEOUT_S)
    yield found
    found.close(TIMEOUT_S)
    assert found._aborting is not None
    assert not found._aborting.is_alive()


@pytest.mark.parametrize("is_overlapping", [False, True])
def test_steps_with_collectives_in_their_graphs_compute_the_same(ranks: Ranks, is_overlapping: bool) -> None:
    weights = random_weights(TINY, device="cuda")
    weights["lm_head"] = weights["embedding"]
    model = Llama(rank_config(TINY, Rank(0, 1)), weights, ranks=ranks)
    made = DeviceEngine(model, buckets=(1, 2, 4, 8), is_overlapping=is_overlapping)
    expected = DeviceEngine(Llama(TINY, random_weights(TINY)), buckets=None).serve(PROMPTS, greedy())
    assert made.serve(PROMPTS, greedy()) == expected
    assert made.serve(PROMPTS, greedy(), steps_between=3) == expected
    assert made.forward is not None
    assert made.forward.num_replayed > 0
    ranks.captured(made.forward.drop_graphs)


def test_a_group_that_was_aborted_keeps_nobody_waiting(ranks: Ranks) -> None:
    values = torch.ones(4, device="cuda")
    ranks.share(values)
    ranks.abort()
    torch.cuda.synchronize()
    assert values.tolist() == [1.0] * 4
