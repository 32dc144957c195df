"""Drives a model as the engine will, one sequence at a time, over shuffled blocks of a poisoned cache."""

import random
from collections.abc import Sequence

import numpy as np
import torch

from workers.model.llama import Embeds, ForwardBatch, Llama

BLOCK_SIZE = 16


class Session:
    """One sequence in a KV cache of its own, whose unused slots are NaN and whose blocks are out of order.

    prompt_len: tokens that count as prompt however they are cut; it matters to dynamic rope scaling.
    """

    def __init__(
        self, model: Llama, max_tokens: int, block_size: int = BLOCK_SIZE, *, prompt_len: int = 0
    ) -> None:
        num_blocks = -(-max_tokens // block_size)
        self._model = model
        self._block_size = block_size
        self.block_table = random.Random(max_tokens).sample(range(num_blocks), num_blocks)
        self.kv_cache = torch.full(model.kv_cache_shape(num_blocks, block_size), float("nan"))
        self.num_tokens = 0
        self._prompt_len = prompt_len

    def feed(
        self,
        token_ids: Sequence[int],
        *,
        embeds: Embeds | None = None,
        rope_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute these tokens in one step; logits of all of them, [len(token_ids), vocab_size]."""
        first, end = self.num_tokens, self.num_tokens + len(token_ids)
        slots = [
            self.block_table[i // self._block_size] * self._block_size + i % self._block_size
            for i in range(first, end)
        ]
        self.num_tokens = end
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.arange(first, end),
            slots=torch.tensor(slots),
            block_tables=np.array([self.block_table], np.int32),
            query_lens=np.array([len(token_ids)]),
            context_lens=np.array([end]),
            logit_rows=torch.arange(len(token_ids)),
            rope_lens=torch.arange(first + 1, end + 1).clamp(min=self._prompt_len),
            embeds=embeds,
            rope_positions=rope_positions,
        )
        return self._model.forward(batch, self.kv_cache)


def greedy(model: Llama, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The next tokens, at most this many; ends with the model's end token if it comes."""
    session = Session(model, len(prompt) + num_tokens, prompt_len=len(prompt))
    logits = session.feed(prompt)
    generated = [int(logits[-1].argmax())]
    while len(generated) < num_tokens and generated[-1] not in model.config.eos_token_ids:
        generated.append(int(session.feed(generated[-1:])[-1].argmax()))
    return generated
