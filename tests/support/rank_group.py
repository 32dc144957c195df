"""A tensor-parallel group on CPUs: real processes, gloo between them, and an engine at rank 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tests.support.engine_model import PLAIN, EngineWithModel
from workers.api import EngineConfig, Phase, PhaseSet, WorkerId, WorkerSpec
from workers.device.placed import PlacedText
from workers.engine.runner import ModelRunner
from workers.model.forward_batch import ForwardBatch
from workers.model.llama import Llama
from workers.model.prepare import PreparedModel, load_weights, prepare
from workers.tensor_parallel.group import place_on_ranks

BOTH: PhaseSet = frozenset({Phase.PREFILL, Phase.DECODE})


def quiet(_what: str, _done: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Group:
    """What rank 0 has. Several engines may use it, one after another."""

    placed: PlacedText

    def engine(self, config: EngineConfig = PLAIN, *, num_blocks: int = 64) -> EngineWithModel:
        """num_blocks: of those that there are."""
        placed = self.placed
        for reach in placed.pool._open:
            # What is in unused slots must reach nobody, on whichever rank.
            reach().fill_(float("nan"))
        made = EngineWithModel(placed.model, config, num_blocks=num_blocks)
        made.runner = ModelRunner(
            placed.model,
            placed.kv_cache,
            config.block_size,
            forward=placed.forward,
            followers=placed.followers,
        )
        return made


def spec_of(
    prepared: PreparedModel, degree: int, *, num_blocks: int = 64, config: EngineConfig = PLAIN
) -> WorkerSpec:
    layout = prepared.config.kv_layout(
        block_size=config.block_size, dtype="float32", model_digest="", weight_dtype="float32"
    )
    engine = replace(config, tensor_parallel=degree, kv_cache_bytes=num_blocks * layout.block_bytes)
    return WorkerSpec(WorkerId("w"), 1, BOTH, "tiny", engine=engine)


@contextmanager
def group_of(prepared: PreparedModel, degree: int, *, timeout_s: float = 60.0) -> Iterator[Group]:
    placed = place_on_ranks(spec_of(prepared, degree), prepared, quiet, timeout_s=timeout_s)
    try:
        yield Group(placed)
    finally:
        assert placed.followers is not None
        placed.followers.close()


def prepared_model(path: Path, cache_dir: Path) -> PreparedModel:
    return prepare(str(path), quiet, cache_dir)


def whole(prepared: PreparedModel) -> Llama:
    """The same model in one process."""
    return Llama(prepared.config, load_weights(prepared))


def batch_of(token_ids: tuple[int, ...], block_size: int = 4) -> ForwardBatch:
    """A prompt in the first blocks, with logits for every token."""
    num = len(token_ids)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.arange(num),
        slots=torch.arange(num),
        block_tables=np.arange(-(-num // block_size), dtype=np.int32)[None],
        query_lens=np.array([num]),
        context_lens=np.array([num]),
        logit_rows=torch.arange(num),
    )
