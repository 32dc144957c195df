"""Chooses the next token of each sequence from its logits."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from workers.api import SamplingParams
from workers.engine.sequence import NO_TOKEN

#: Tokens that are looked at first. Most draws end among them, and sorting a vocabulary is dear: 4 ms for
#: each row of 49152 logits on one core, against 0.6 ms.
NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to sample one row; `position` is the index that the new token gets in its sequence."""

    sampling: SamplingParams
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone; 0 <= seed, position < 2**64.

    A counter-based generator has no state to hand over: whichever worker computes this position, after
    a hand-off or a failover, draws the same number.
    Source: Philox 4x64-10 (Salmon et al., SC'11), key = seed, counter = position.
    """
    return _uniforms([(seed, position)])[0]


def sample(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> list[int]:
    """The next token of each row; logits: [len(rows), vocab_size] float32, -inf for what is ruled out.

    temperature 0 takes the largest logit, the lowest id among equals. Otherwise the smallest set of
    most likely tokens whose probability reaches top_p is kept, and one of them is drawn in proportion.
    NO_TOKEN for a row with a NaN, with +inf, or with nothing but -inf. A row's token does not depend on
    the other rows.
    """
    highest, tokens = logits.max(dim=-1)
    usable: list[bool] = torch.isfinite(highest).tolist()
    drawn = [i for i, row in enumerate(rows) if usable[i] and row.sampling.temperature > 0]
    if drawn:
        is_all = len(drawn) == len(rows)
        tokens[drawn] = _draw(logits if is_all else logits[drawn], [rows[i] for i in drawn])
    result: list[int] = tokens.tolist()
    return [token if is_usable else NO_TOKEN for token, is_usable in zip(result, usable, strict=True)]


def _uniforms(keys: SequenceOf[tuple[int, int]]) -> list[float]:
    """`uniform` of each (seed, position). Setting a generator's state is 5 times cheaper than making one."""
    bits = np.random.Philox(key=0)
    generator = np.random.Generator(bits)
    state = bits.state
    # What was generated ahead is used up: the next number comes from the new counter.
    state["buffer_pos"] = len(state["buffer"])
    numbers = []
    for seed, position in keys:
        state["state"]["key"][0] = seed
        state["state"]["counter"][:] = (position, 0, 0, 0)
        bits.state = state
        numbers.append(generator.random())
    return numbers


def _draw(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    """Inverse of the cumulative distribution, in float64, over tokens from most to least likely.

    Equal logits stay in the order of their ids.
    """
    temperature = torch.tensor([[row.sampling.temperature] for row in rows], dtype=torch.float64)
    top_p = torch.tensor([[row.sampling.top_p] for row in rows], dtype=torch.float64)
    chance = torch.tensor(
        [[number] for number in _uniforms([(row.sampling.seed, row.position) for row in rows])],
        dtype=torch.float64,
    )
    # The highest logit becomes 0 first, or a small temperature would make all of them infinite.
    scaled = logits.double().sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature)
    probabilities = torch.softmax(scaled, dim=-1)
    vocab_size = logits.shape[-1]
    if vocab_size <= NUM_CANDIDATES:
        token_ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        return _pick(probabilities, token_ids, top_p, chance)[0]
    picked, is_certain = _pick(probabilities, _candidates(logits), top_p, chance)
    unsure = [i for i, known in enumerate(is_certain.tolist()) if not known]
    if unsure:
        token_ids = torch.sort(logits[unsure], dim=-1, descending=True, stable=True).indices
        picked[unsure] = _pick(probabilities[unsure], token_ids, top_p[unsure], chance[unsure])[0]
    return picked


def _candidates(logits: torch.Tensor) -> torch.Tensor:
    """The first NUM_CANDIDATES tokens, from most to least likely: [rows, NUM_CANDIDATES].

    Which of those that equal the last one are among them is left open.
    """
    token_ids = torch.topk(logits, NUM_CANDIDATES, dim=-1, sorted=False).indices.sort(dim=-1).values
    order = torch.sort(logits.gather(-1, token_ids), dim=-1, descending=True, stable=True).indices
    return token_ids.gather(-1, order)


def _pick(
    probabilities: torch.Tensor, token_ids: torch.Tensor, top_p: torch.Tensor, chance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token drawn in each row, and whether it is the same with all other tokens behind `token_ids`."""
    ordered = probabilities.gather(-1, token_ids)
    cumulative = ordered.cumsum(dim=-1)
    # The first token that reaches top_p is still kept.
    num_kept = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=token_ids.shape[-1] - 1) + 1
    # With top_p = 1 all tokens are kept, and their sum is 1 but for rounding.
    kept_mass = torch.where(top_p < 1, cumulative.gather(-1, num_kept - 1), 1.0)
    target = chance * kept_mass
    picked = torch.searchsorted(cumulative, target, right=True).minimum(num_kept - 1)
    # Certain up to the tokens that equal the last one: which of them are here is not.
    certain_mass = torch.where(ordered > ordered[..., -1:], cumulative, 0.0).amax(dim=-1, keepdim=True)
    is_kept_mass_known = (top_p >= 1) | (certain_mass >= top_p)
    is_certain = is_kept_mass_known & (target < certain_mass)
    return token_ids.gather(-1, picked).squeeze(-1), is_certain.squeeze(-1)
