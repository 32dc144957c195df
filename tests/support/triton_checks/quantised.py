"""Attention over packed pages, on a GPU or interpreted, against its specification."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.kv_codec.reference import PAGE_TOKENS, PageCodec, encode_reference, groups_of
from phasewise_kernels.quantised_attention import op
from phasewise_kernels.quantised_attention.reference import quantised_attention_reference
from phasewise_kernels.testing import QUANTISED_ATTENTION_TOLERANCE, assert_close, poisoned_memory

LENS = (0, 1, 63, 64, 65, 200, 700, 128)


def an_attention(
    lens: tuple[int, ...],
    heads: tuple[int, int, int],
    codec: PageCodec,
    device: str,
    dtype: torch.dtype = torch.float32,
    num_sms: int | None = None,
    *,
    is_damaged: bool = False,
) -> None:
    """One batch, its pages in any order among poisoned ones; what is no token of a tail is NaN.

    num_sms: as if there were so many multiprocessors; None are those of the GPU, through the op, and three on a CPU.
    is_damaged: `gear` with other codes and places than were packed.
    """
    num_heads, num_kv_heads, head_dim = heads
    num_pages = [length // PAGE_TOKENS for length in lens]
    total, most = sum(num_pages), max(num_pages, default=0)
    kv = torch.randn(total + 1, 2, PAGE_TOKENS, num_kv_heads, head_dim)
    # A vector whose numbers are all equal has both its outliers in one place.
    kv[:, 0, :, :, 5], kv[:, 1, 7] = 0.5, -0.5
    pages = encode_reference(kv, codec)
    if is_damaged:
        damage(pages, num_kv_heads, head_dim)
    pages[total] = 255
    order = torch.randperm(total)
    table = torch.full((len(lens), most + 1), total, dtype=torch.int32)
    start = 0
    for row, number in zip(table, num_pages, strict=True):
        row[:number] = order[start : start + number]
        start += number
    shape = (len(lens), PAGE_TOKENS, num_kv_heads, head_dim)
    tail = [torch.full(shape, float("nan")) for _ in "kv"]
    for i, length in enumerate(lens):
        for one in tail:
            one[i, : length % PAGE_TOKENS] = torch.randn(length % PAGE_TOKENS, num_kv_heads, head_dim)
    query = torch.randn(len(lens), num_heads, head_dim).to(dtype).to(device)
    arguments = (
        query,
        pages.to(device),
        table.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        tuple(one.to(dtype).to(device) for one in tail),
    )
    expected = quantised_attention_reference(*arguments, codec=codec)
    with poisoned_memory():
        if num_sms is None and device != "cpu":
            actual = op.quantised_attention(*arguments, codec=codec)
        else:
            from phasewise_kernels.quantised_attention import triton_kernel

            actual = triton_kernel.attend(*arguments, codec, num_sms or 3)
    assert_close(actual, expected, QUANTISED_ATTENTION_TOLERANCE)


def damage(pages: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Random codes, also where outliers are, and the two outliers of a vector in any two places."""
    start = 2 * num_kv_heads
    for vectors, length, groups in (
        (head_dim, PAGE_TOKENS, 1),
        (PAGE_TOKENS, head_dim, groups_of(head_dim)),
    ):
        codes = num_kv_heads * vectors * length // 4
        pages[:, start : start + codes] = torch.randint(0, 256, (len(pages), codes), dtype=torch.uint8)
        start += codes + num_kv_heads * (vectors * (4 * groups + 4) + 4 * (vectors + length))
        places = torch.randint(0, length, (len(pages), num_kv_heads * vectors, 1), dtype=torch.uint8)
        both = torch.cat((places, (places + 1) % length), 2).flatten(1)
        pages[:, start : start + both.shape[1]] = both
        start += both.shape[1]
    assert start == pages.shape[1]


def check_int4(device: str) -> None:
    """Lengths about whole pages, groups that are no powers of two, few programs and many."""
    shapes = tuple(product(((9, 3, 64), (8, 2, 128)), (1, 20)))
    # Interpreted each of both once.
    for heads, num_sms in shapes[::3] if device == "cpu" else shapes:
        an_attention(LENS, heads, "int4_hadamard", device, num_sms=num_sms)
    for dtype in (torch.bfloat16, torch.float16):
        an_attention(LENS, (8, 2, 128), "int4_hadamard", device, dtype)


def check_gear(device: str) -> None:
    """The same."""
    an_attention(LENS, (9, 3, 64), "gear", device)
    an_attention(LENS, (8, 2, 128), "gear_l", device)
    an_attention(LENS, (8, 2, 128), "gear", device, torch.bfloat16)
    # As many sequences and KV heads as there are multiprocessors, and more.
    an_attention(LENS, (8, 2, 128), "gear", device, torch.bfloat16, num_sms=1)
    an_attention((200, 64), (16, 1, 64), "gear", device)


def check_gear_of_other_packers(device: str) -> None:
    """Nothing is taken for granted of codes in the places of outliers."""
    an_attention((200, 64), (8, 2, 128), "gear", device, is_damaged=True)
    an_attention((200,), (9, 3, 64), "gear", device, num_sms=20, is_damaged=True)


def check_no_sequences(device: str) -> None:
    """Nothing comes of nothing."""
    an_attention((), (9, 3, 64), "int4_hadamard", device)
    an_attention((0, 0), (9, 3, 64), "int4_hadamard", device)


def check_odd_shapes(device: str) -> None:
    """Whatever hypothesis thinks of."""

    @settings(max_examples=5 if device == "cpu" else 12, deadline=None, database=None)
    @given(
        st.lists(st.integers(0, 400), min_size=1, max_size=4),
        st.sampled_from([(3, 3, 64), (4, 2, 128)]),
        st.integers(1, 9),
    )
    def attentions(lens: list[int], shape: tuple[int, int, int], num_sms: int) -> None:
        group, num_kv_heads, head_dim = shape
        heads = (group * num_kv_heads, num_kv_heads, head_dim)
        an_attention(tuple(lens), heads, "int4_hadamard", device, num_sms=num_sms)

    attentions()
