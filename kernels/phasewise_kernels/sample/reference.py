"""The specification of the draw: sort all tokens, cut, and invert the cumulative distribution."""

import torch

#: Of a row with a NaN, with +inf, or with nothing but -inf.
NO_TOKEN = -1
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK = 2**64 - 1


def uniform(seed: int, position: int, stream: int) -> float:
    """A number in [0, 1) that depends on the arguments alone; each is at least 0 and below 2**64 - 1.

    Source: Philox 4x64-10 (Salmon et al., SC'11), key = (seed, 0), counter = (position + 1, stream, 0, 0): numpy counts
    before it draws. The first word's upper 53 bits.
    """
    counter, key = [position + 1, stream, 0, 0], [seed, 0]
    for _ in range(10):
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & _MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(word + step) & _MASK for word, step in zip(key, KEY_STEPS, strict=True)]
    return (counter[0] >> 11) * 2.0**-53


def sample_reference(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    streams: torch.Tensor,
) -> torch.Tensor:
    """Arguments and result as in the op. Sums in fp64, over tokens from most to least likely, lowest id first among equals."""
    chosen = []
    numbers = (x.tolist() for x in (temperature, top_k, top_p, min_p, seeds, positions, streams))
    for row, (heat, k, p, m, seed, position, stream) in zip(
        logits.float(), zip(*numbers, strict=True), strict=True
    ):
        if bool(row.isnan().any()) or not bool(row.max().isfinite()):
            chosen.append(NO_TOKEN)
            continue
        values, token_ids = torch.sort(row, descending=True, stable=True)
        if heat == 0:
            chosen.append(int(token_ids[0]))
            continue
        weights = ((values.double() - values[0].double()) / heat).exp()
        cumulative = weights.cumsum(0)
        kept = k if 0 < k < len(values) else len(values)
        mass = cumulative[kept - 1]
        if p < 1:
            kept = min(kept, int((cumulative < p * mass).sum()) + 1)
        kept = min(kept, int((weights >= m).sum()), int((weights > 0).sum()))
        number = uniform(seed & _MASK, position, stream)
        picked = int((cumulative <= number * cumulative[kept - 1]).sum())
        chosen.append(int(token_ids[min(picked, kept - 1)]))
    return torch.tensor(chosen, dtype=torch.int64, device=logits.device)
