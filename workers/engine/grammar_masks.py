"""Masks of a step's grammars, computed in a thread of their own while the model runs."""

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from workers.engine.grammar import GrammarState

#: What a row may not take: [vocab_size] bool, True for what is ruled out.
RuledOut = tuple[int, torch.Tensor]


class GrammarMasks:
    """One step at a time: `begin`, the forward pass, `rule_out`. Rows without a grammar cost nothing."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-masks")
        self._pending: Future[list[RuledOut]] | None = None

    def begin(self, states: SequenceOf[GrammarState | None]) -> None:
        """Start on the masks of the step whose logits have these rows; None for a row without a grammar.

        The states belong to the thread until `rule_out` has returned.
        """
        assert self._pending is None, "rule_out ends a step before the next begins"
        rows = [(i, state) for i, state in enumerate(states) if state is not None]
        if rows:
            self._pending = self._executor.submit(self._fill, rows)

    def rule_out(self, logits: torch.Tensor) -> None:
        """Wait for the masks and set what they rule out to -inf; logits: [len(states), vocab_size].

        All of a row whose state has a `problem`, or had it before.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for row, ruled_out in pending.result():
            logits[row].masked_fill_(ruled_out, -torch.inf)

    def drop(self) -> None:
        """Wait for the masks that were begun, and forget them: the step failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread."""
        self.drop()
        self._executor.shutdown()

    def _fill(self, rows: list[tuple[int, GrammarState]]) -> list[RuledOut]:
        masks = np.zeros((len(rows), -(-self._vocab_size // 32)), dtype=np.uint32)
        for mask, (_row, state) in zip(masks, rows, strict=True):
            state.fill(mask)
        bits = np.unpackbits(~masks.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
        ruled_out = torch.from_numpy(bits).view(torch.bool)
        return [(row, ruled_out[i]) for i, (row, _state) in enumerate(rows)]
