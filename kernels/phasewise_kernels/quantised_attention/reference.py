"""The specification: unpack the pages, then attend."""

import torch

from phasewise_kernels.kv_codec.reference import PAGE_TOKENS, PageCodec, decode_reference


def quantised_attention_reference(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    tail: tuple[torch.Tensor, torch.Tensor],
    *,
    codec: PageCodec,
) -> torch.Tensor:
    """Arguments and result as in the op; softmax and sums in fp64."""
    _, num_heads, head_dim = query.shape
    num_kv_heads = tail[0].shape[2]
    group = num_heads // num_kv_heads
    out = torch.zeros_like(query)
    for i, context_len in enumerate(context_lens.tolist()):
        num_full, rest = divmod(context_len, PAGE_TOKENS)
        if not context_len:
            continue
        packed = pages[page_table[i, :num_full].long()].contiguous()
        # Each page as a layer of its own: [num_full, 2, PAGE_TOKENS, num_kv_heads, head_dim].
        kv = decode_reference(packed, codec, PAGE_TOKENS, num_kv_heads, head_dim)
        both = [
            torch.cat((kv[:, number].flatten(0, 1), one[i, :rest].float())).double()
            for number, one in enumerate(tail)
        ]
        k, v = (one.repeat_interleave(group, dim=1) for one in both)
        scores = torch.einsum("hd,thd->ht", query[i].double(), k) * head_dim**-0.5
        out[i] = torch.einsum("ht,thd->hd", scores.softmax(1), v).to(query.dtype)
    return out
