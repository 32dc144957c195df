"""Pictures and prompts to logits, as training and measuring need it."""

from collections.abc import Callable, Mapping
from functools import cache

import torch

from examples.tiny_vlm.batches import Tensors
from examples.tiny_vlm.language_model import FrozenLlama
from examples.tiny_vlm.shape import VISION
from workers.model.vision.idefics3 import embed_tiles


def embed(weights: Mapping[str, torch.Tensor], batch: Tensors, *, is_compiled: bool = False) -> torch.Tensor:
    """Embeddings of the pictures, [num_pictures, NUM_EMBEDDINGS, hidden_size]."""
    pixels = (batch.pixels.float() / 255 - VISION.mean[0]) / VISION.std[0]
    embeds: torch.Tensor = (_compiled_embed_tiles() if is_compiled else embed_tiles)(VISION, weights, pixels)
    return embeds


def answer_logits(model: FrozenLlama, batch: Tensors, embeds: torch.Tensor) -> torch.Tensor:
    """Logits of the answers' tokens, [num_answer_rows, vocab_size]."""
    hidden = torch.nn.functional.embedding(batch.tokens, model.embedding)
    flat = hidden.flatten(0, 1).index_copy(0, batch.picture_rows, embeds.flatten(0, 1).to(hidden.dtype))
    segments = batch.segments
    same = segments[:, :, None] == segments[:, None, :]
    row = torch.arange(segments.shape[1], device=segments.device)
    # Padding is a segment of its own, so that every row sees something.
    mask = (same | (segments[:, None, :] == 0)) & (row[:, None] >= row[None])
    hidden = model.hidden(flat.view_as(hidden), batch.positions, mask)
    return model.logits(hidden.flatten(0, 1)[batch.answer_rows])


@cache
def _compiled_embed_tiles() -> Callable[..., torch.Tensor]:
    """Compiled for one number of pictures at a time."""
    return torch.compile(embed_tiles, dynamic=False)
