"""Prompts with pictures through our model and through transformers', greedily."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.support.generate import Session
from workers.model.llama import Embeds, Llama


def our_greedy(
    model: Llama,
    token_ids: Sequence[int],
    image_token_id: int,
    embeddings: Sequence[torch.Tensor],
    num_tokens: int,
    cuts: Sequence[int] = (),
) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, [len(token_ids), vocab_size], and the tokens generated after it.

    embeddings: of the tiles, in the order of their tokens. cuts: where the prompt is cut into steps, in order.
    """
    ids = torch.tensor(token_ids)
    rows = torch.nonzero(ids == image_token_id).flatten()
    values = torch.cat([*embeddings, torch.empty(0, model.config.hidden_size)])
    assert len(rows) == len(values)
    session = Session(model, len(token_ids) + num_tokens)
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, len(token_ids)), strict=True):
        here = (rows >= start) & (rows < end)
        pieces.append(session.feed(token_ids[start:end], embeds=Embeds(rows[here] - start, values[here])))
    logits = torch.cat(pieces)
    generated = [int(logits[-1].argmax())]
    while len(generated) < num_tokens:
        generated.append(int(session.feed(generated[-1:])[-1].argmax()))
    return logits, generated


@torch.inference_mode()
def their_greedy(
    theirs: Any, token_ids: Sequence[int], pixel_values: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """The same in transformers. pixel_values: [1, num_tiles, 3, side, side]; None: no picture."""
    pictures = {} if pixel_values is None else {"pixel_values": pixel_values}
    result = theirs(torch.tensor([token_ids]), use_cache=True, **pictures)
    logits, generated = result.logits[0], [int(result.logits[0, -1].argmax())]
    while len(generated) < num_tokens:
        result = theirs(
            torch.tensor([generated[-1:]]), past_key_values=result.past_key_values, use_cache=True
        )
        generated.append(int(result.logits[0, -1].argmax()))
    return logits, generated
