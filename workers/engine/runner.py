"""Computes steps with torch: StepPlan -> tensors -> forward pass -> sampled tokens."""

from collections.abc import Callable

import numpy as np
import torch

from kvtransfer.layout import blocks_needed
from workers.engine.sampler import SampleRow, sample
from workers.engine.scheduler import StepPlan
from workers.model.llama import ForwardBatch, Llama


class ModelRunner:
    """A model and the KV cache that its steps read and write. Implements `step_loop.Runner`.

    kv_cache: of `Llama.kv_cache_shape`, fp32, CPU, contiguous. layer_group_size: layers between two calls
    of `on_layers`, >= 1.
    """

    def __init__(self, model: Llama, kv_cache: torch.Tensor, block_size: int, layer_group_size: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._layer_group_size = layer_group_size

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> list[int]:
        """See Runner."""
        logits = self._model.forward(
            self._batch(plan),
            self._kv_cache,
            layer_group_size=self._layer_group_size,
            on_layers=on_layers,
        )
        # The new token's index is the number of tokens that are known.
        rows = [
            SampleRow(part.sequence.sampling, len(part.sequence.token_ids))
            for part in plan.slices
            if part.yields_token
        ]
        return sample(logits, rows) if rows else []

    def warm_up(self) -> None:
        """Compute one token in block 0, which no sequence owns yet: pages and kernels are then in place."""
        batch = ForwardBatch(
            token_ids=torch.tensor([0]),
            positions=torch.tensor([0]),
            slots=torch.tensor([0]),
            block_tables=[[0]],
            query_lens=[1],
            context_lens=[1],
            logit_rows=torch.tensor([0]),
        )
        self._model.forward(batch, self._kv_cache)

    def _batch(self, plan: StepPlan) -> ForwardBatch:
        """The loop is over sequences; what is per token is done by numpy."""
        size = self._block_size
        token_ids: list[int] = []
        # Blocks that the new tokens lie in, sequence after sequence.
        new_blocks: list[int] = []
        first_new_blocks: list[int] = []
        logit_rows: list[int] = []
        for part in plan.slices:
            sequence = part.sequence
            token_ids += sequence.token_ids[part.start : part.end]
            first_block = part.start // size
            # Index of a sequence's logical block b in new_blocks: b + first_new_block.
            first_new_blocks.append(len(new_blocks) - first_block)
            new_blocks += sequence.block_table[first_block : blocks_needed(part.end, size)]
            if part.yields_token:
                logit_rows.append(len(token_ids) - 1)
        starts = np.array([part.start for part in plan.slices])
        query_lens = np.array([part.end - part.start for part in plan.slices])
        # Row of the first token of each slice.
        first_rows = np.cumsum(query_lens) - query_lens
        positions = np.arange(len(token_ids)) + np.repeat(starts - first_rows, query_lens)
        blocks = np.array(new_blocks)[positions // size + np.repeat(first_new_blocks, query_lens)]
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(blocks * size + positions % size),
            block_tables=[part.sequence.block_table for part in plan.slices],
            query_lens=[part.end - part.start for part in plan.slices],
            context_lens=[part.end for part in plan.slices],
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
