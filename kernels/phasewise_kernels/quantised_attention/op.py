"""Decode attention straight from packed pages: a fourth of the bytes of bf16 is read, and nothing is unpacked in memory."""

import torch

from phasewise_kernels.kv_codec.reference import PAGE_TOKENS, PageCodec, page_bytes
from phasewise_kernels.quantised_attention.reference import quantised_attention_reference

#: Of the kernels.
HEAD_DIMS = (64, 128)
CODECS: tuple[PageCodec, ...] = ("int4_hadamard", "gear", "gear_l")


def quantised_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    tail: tuple[torch.Tensor, torch.Tensor],
    *,
    codec: PageCodec,
) -> torch.Tensor:
    """Softmax(query K^T / sqrt(head_dim)) V of one new token of each sequence. Returns [batch, num_heads, head_dim] as query.

    query: [batch, num_heads, head_dim] bf16, fp16 or fp32, contiguous; num_heads a multiple of num_kv_heads. pages:
    [num_pages, page bytes] uint8, contiguous: full pages of one layer, as `encode_pages` packs them. page_table: [batch,
    max_pages] int32, the pages of each sequence in order. context_lens: [batch] int32, tokens in all; a sequence of 0
    tokens gives zeros. tail: keys and values of the tokens after the last full page, each [batch, PAGE_TOKENS,
    num_kv_heads, head_dim], contiguous, bf16, fp16 or fp32; what lies behind them is not read.
    Nothing is waited for on a GPU, and the launches depend on shapes alone: safe within CUDA graphs.
    Raises ValueError for a codec, a head_dim or a page of another size that it has no kernel for.
    """
    num_kv_heads, head_dim = tail[0].shape[2:]
    expected = page_bytes(codec, PAGE_TOKENS, num_kv_heads, head_dim)
    if pages.shape[1] != expected:
        raise ValueError(f"a page of {codec} has {expected} bytes here, and not {pages.shape[1]}")
    if query.device.type == "cpu":
        return quantised_attention_reference(query, pages, page_table, context_lens, tail, codec=codec)
    if codec not in CODECS or head_dim not in HEAD_DIMS:
        raise ValueError(f"no kernel attends to pages of {codec} with a head_dim of {head_dim}")
    assert query.is_contiguous()
    assert pages.is_contiguous()
    assert tail[0].is_contiguous()
    assert tail[1].is_contiguous()
    # Triton is there where torch has CUDA; nobody else pays for its import.
    from phasewise_kernels.quantised_attention import triton_kernel

    num_sms = torch.cuda.get_device_properties(query.device).multi_processor_count
    return triton_kernel.attend(query, pages, page_table, context_lens, tail, codec, num_sms)
