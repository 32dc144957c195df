"""Ranks as threads of one process, each with the forward pass of a GPU (on a CPU, with padding and without graphs)."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.device_engine import DeviceEngine, random_weights
from workers.device.forward import DeviceForward
from workers.device.step_graph import FROM_HOST
from workers.model.config import ModelConfig
from workers.model.convert import output_shapes
from workers.model.forward_batch import ForwardBatch
from workers.model.llama import Llama
from workers.tensor_parallel.cutting import WHOLE, Rank, cuts, rank_config, vocab_rows
from workers.tensor_parallel.messages import pack, unpack
from workers.tensor_parallel.ranks import join, open_store

#: No collective of a tiny model takes so long on a working machine.
TIMEOUT_S = 30.0
CPU = torch.device("cpu")
Told = tuple[bytes, bool]


def rank_weights(config: ModelConfig, rank: Rank) -> dict[str, torch.Tensor]:
    """Its parts of `random_weights`."""
    whole, parts = random_weights(config), {}
    for name, one in cuts(output_shapes(config), config, rank):
        pieces = (
            [whole[name]]
            if one == WHOLE
            else [whole[name].narrow(one.dim, lo, hi - lo) for lo, hi in one.ranges]
        )
        parts[name] = torch.cat(pieces, dim=one.dim).contiguous()
    head = whole["embedding" if config.tie_embeddings else "lm_head"]
    parts["lm_head"] = head[slice(*vocab_rows(config.vocab_size, rank))]
    return parts


class _Told:
    """Rank 0's forward pass, which the others are told of. Implements forwarding.Forward."""

    def __init__(self, forward: DeviceForward, others: "list[queue.SimpleQueue[Told | None]]") -> None:
        self._forward = forward
        self._others = others
        #: Steps whose tokens rank 0 shared.
        self.num_shared = 0

    def __call__(
        self,
        batch: ForwardBatch,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_shared += sources is not None
        for other in self._others:
            other.put((pack(batch), sources is not None))
        return self._forward(
            batch,
            layer_group_size=layer_group_size,
            on_layers=on_layers,
            sources=sources,
            previous=previous,
        )


@contextmanager
def thread_engine(
    config: ModelConfig, degree: int, *, buckets: tuple[int, ...], is_overlapping: bool, num_blocks: int = 64
) -> Iterator[tuple[DeviceEngine, _Told]]:
    """An engine at rank 0 of so many threads."""
    store = open_store(degree)
    others: list[queue.SimpleQueue[Told | None]] = [queue.SimpleQueue() for _ in range(degree - 1)]

    def model_of(rank: Rank) -> Llama:
        ranks = join(rank, store if rank.index == 0 else store.port, CPU, TIMEOUT_S)
        return Llama(rank_config(config, rank), rank_weights(config, rank), ranks=ranks)

    def follow(rank: Rank, told: "queue.SimpleQueue[Told | None]") -> None:
        model = model_of(rank)
        kv_cache = torch.full(model.kv_cache_shape(num_blocks, 16), float("nan"))
        forward = DeviceForward(
            model, kv_cache, max_context_tokens=config.max_context_tokens, buckets=buckets
        )
        forward.capture(lambda _what, _done: None)
        while (step := told.get()) is not None:
            batch = unpack(step[0])
            forward(batch, sources=np.full(len(batch.token_ids), FROM_HOST) if step[1] else None)

    threads = [
        threading.Thread(target=follow, args=(Rank(i + 1, degree), told), daemon=True)
        for i, told in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    made = DeviceEngine(
        model_of(Rank(0, degree)), buckets=buckets, is_overlapping=is_overlapping, num_blocks=num_blocks
    )
    assert made.forward is not None
    told = made.runner._run_forward = _Told(made.forward, others)
    try:
        yield made, told
    finally:
        for other in others:
            other.put(None)
        for thread in threads:
            thread.join(TIMEOUT_S)
