"""The weights of one rank: of the converted file only its parts are read."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from workers.model.config import ModelConfig
from workers.model.convert import output_shapes
from workers.tensor_parallel.cutting import WHOLE, Cut, Rank, cut_shape, cuts, vocab_rows


def part_shapes(config: ModelConfig, rank: Rank) -> dict[str, tuple[int, ...]]:
    """Of all tensors that this rank holds."""
    shapes = output_shapes(config)
    return {name: cut_shape(shapes[name], one) for name, one in cuts(shapes, config, rank)}


def read_part(
    path: Path,
    config: ModelConfig,
    rank: Rank,
    place: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]],
    progress: Callable[[float], None],
) -> dict[str, torch.Tensor]:
    """The tensors of this rank as `place` leaves each of them, for a `Llama` of `rank_config`.

    path: what `prepare` converted. place: is given each with its name, in fp32 in memory of the host, contiguous.
    """
    shapes = output_shapes(config)
    total, done = sum(map(prod, part_shapes(config, rank).values())), 0
    weights: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        for name, one in cuts(shapes, config, rank):
            part = _read(file, name, one)
            weights.update(place(name, part))
            done += part.numel()
            progress(done / total)
    if config.tie_embeddings:
        lo, hi = vocab_rows(config.vocab_size, rank)
        weights["lm_head"] = weights["embedding"][lo:hi]
    return weights


def _read(file: Any, name: str, one: Cut) -> torch.Tensor:
    if one == WHOLE:
        whole: torch.Tensor = file.get_tensor(name)
        return whole
    part = file.get_slice(name)
    pieces = [part[lo:hi] if one.dim == 0 else part[:, lo:hi] for lo, hi in one.ranges]
    return torch.cat(pieces, dim=one.dim) if len(pieces) > 1 else pieces[0].contiguous()
