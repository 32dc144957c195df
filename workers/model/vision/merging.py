"""Squares of a tile that are alike become one, and which of a tile's squares matter most.

A square is what one embedding is made of, scale_factor x scale_factor patches: MustDrop merges patches, but here squares
become embeddings, and a square of which some patches were merged could not. So a square is one long vector, and the squares
of a window are averaged patch by patch.
Source: MustDrop (arXiv 2411.10803), the stage in the encoder; its windows are 3 x 3 patches.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

#: Squares along a window's side. What is left over at the right and lower edge of a tile stays as it is.
WINDOW = 2


def merge_windows(squares: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the squares of each window whose mean pairwise cosine is at least this; 0 merges none.

    squares: [side ** 2, patches of a square, hidden_size] in raster order. Returns those that are left, in the same order,
    an average at the place of its first, and the places that they have, [number] int64.
    """
    places = torch.arange(len(squares), device=squares.device)
    side = math.isqrt(len(squares))
    whole = side // WINDOW * WINDOW
    if threshold <= 0 or not whole:
        return squares, places
    # [windows, squares of a window]
    grid = places.view(side, side)[:whole, :whole]
    windows = grid.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).flatten(2).flatten(0, 1)
    members = windows[similarity(squares[windows].flatten(2).float()) >= threshold]
    merged = squares.clone()
    merged[members[:, 0]] = squares[members].mean(dim=1)
    is_left = torch.ones(len(squares), dtype=torch.bool, device=squares.device)
    is_left[members[:, 1:].flatten()] = False
    return merged[is_left], places[is_left]


def similarity(vectors: torch.Tensor) -> torch.Tensor:
    """Mean cosine of all pairs of different vectors. [windows, number, size] gives [windows]."""
    number = vectors.shape[1]
    total = F.normalize(vectors, dim=-1).sum(dim=1).square().sum(dim=-1)
    return (total - number) / (number * (number - 1))


def key_places(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Whether each is among this part of the highest scores, rounded up. [number] gives [number] bool."""
    number = min(len(scores), math.ceil(len(scores) * fraction - 1e-9))
    is_key = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    is_key[torch.topk(scores, number).indices] = True
    return is_key
