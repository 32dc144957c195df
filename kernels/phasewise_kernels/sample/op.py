"""The next token of each row of logits, without a sort of the vocabulary, drawn as the engine's sampler on the CPU draws."""

import torch

from phasewise_kernels.sample.reference import sample_reference


def sample(
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
    """Temperature, top_k, top_p (of what top_k leaves), min_p, the draw. Returns [rows] int64; nothing is waited for.

    logits: [rows, vocab_size] fp32, bf16 or fp16, contiguous, -inf for what is ruled out; not changed. All others are
    [rows], on its device. temperature, top_p, min_p: float64; a temperature of 0 takes the largest logit, the lowest
    id among equals. top_k: int64, 0 for all. seeds: int64, the bits of an unsigned number. positions: int64, the index
    that the new token gets in its sequence. streams: int64.
    A row with a NaN, with +inf, or with nothing but -inf gets NO_TOKEN.

    A draw depends on seed, position and stream alone, and the tokens are in one order, from most to least likely: so
    for equal logits it is the token that the CPU draws. Weights are in fp64, their sums too, in another order than there,
    or in whole numbers as fine: a draw differs where the random number lies within about 1e-14 of the border between two
    tokens, or a border of top_p or min_p lies so near to a token's. Logits that are rounded otherwise differ far more
    often than that.
    Source: Philox 4x64-10 (Salmon et al., SC'11).
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seeds": seeds,
        "positions": positions,
        "streams": streams,
    }
    if logits.device.type == "cpu":
        return sample_reference(logits, **options)
    assert logits.is_contiguous()
    # Triton is there where torch has CUDA; nobody else pays for its import.
    from phasewise_kernels.sample import triton_kernel

    return triton_kernel.sample(logits, **options)
