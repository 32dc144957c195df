"""Attention of single query rows that reads K and V where they lie in the cache, once.

A row's context is cut at fixed positions into items of at most `max_item_tokens` tokens; threads share the items. An
item has three passes: scores of all heads (reads K), softmax over them, weighted sum (reads V). Each item leaves
its largest score, its sum of weights and its output per head; `merge` puts a row's items together in order. So
how many threads there are changes no bit.

Source: split-KV decoding as in FlashDecoding and FlashInfer; merging by largest score as in online softmax.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from phasewise_kernels.jit import EXACT, FASTMATH, kernel

#: float32 in a cache line.
LINE_FLOATS = 16


def _typed_prefetch(_typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001 - numba asks by name
    """Ask for the cache line of the float at `index` of a contiguous array; never fails."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte_pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte_pointer)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [byte_pointer],
            ir.FunctionType(ir.VoidType(), [byte_pointer, number, number, number]),
        )
        # For reading, into the second cache, data. The first has few places for lines on their way, and a read
        # would wait for one.
        builder.call(function, [address, *(ir.Constant(number, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


_prefetch: Any = intrinsic(_typed_prefetch)


@kernel(EXACT, is_inlined=True)
def _exp_minus(values: Any, head: int, largest: Any, count: int) -> None:
    """values[head, i] = exp(values[head, i] - largest), all of which are <= 1; within 2e-7 of it relatively.

    2**n * e**r with n whole and |r| <= log(2) / 2; e**r by a polynomial. Source: Cephes, expf.
    """
    log2_e = np.float32(1.44269504088896341)
    log_2_high = np.float32(0.693359375)
    log_2_low = np.float32(-2.12194440e-4)
    for i in range(count):
        x = max(values[head, i] - largest, np.float32(-87))
        n = np.float32(np.floor(x * log2_e + np.float32(0.5)))
        r = x - n * log_2_high - n * log_2_low
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        e_r = p * r * r + r + np.float32(1)
        two_n = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        values[head, i] = e_r * two_n


@kernel(FASTMATH, is_inlined=True)
def _largest(values: Any, head: int, count: int) -> Any:
    found = values[head, 0]
    for i in range(1, count):
        found = max(found, values[head, i])
    return found


@kernel(FASTMATH, is_inlined=True)
def _sum(values: Any, head: int, count: int) -> Any:
    total = np.float32(0)
    for i in range(count):
        total += values[head, i]
    return total


@kernel(FASTMATH, is_inlined=True)
def _scores(
    query: Any,
    row: int,
    head: int,
    keys: Any,
    block: int,
    offset: int,
    kv_head: int,
    count: int,
    scores: Any,
    at: int,
    scale: Any,
    head_dim: int,
) -> None:
    """Scores of `count` tokens that follow each other in a block, for one head."""
    in_fours = count - count % 4
    for t in range(0, in_fours, 4):
        a = b = c = d = np.float32(0)
        for i in range(head_dim):
            q = query[row, head, i]
            a += q * keys[block, offset + t, kv_head, i]
            b += q * keys[block, offset + t + 1, kv_head, i]
            c += q * keys[block, offset + t + 2, kv_head, i]
            d += q * keys[block, offset + t + 3, kv_head, i]
        scores[head, at + t] = a * scale
        scores[head, at + t + 1] = b * scale
        scores[head, at + t + 2] = c * scale
        scores[head, at + t + 3] = d * scale
    for t in range(in_fours, count):
        a = np.float32(0)
        for i in range(head_dim):
            a += query[row, head, i] * keys[block, offset + t, kv_head, i]
        scores[head, at + t] = a * scale


@kernel(FASTMATH, is_inlined=True)
def _add(
    out: Any,
    item: int,
    head: int,
    values: Any,
    block: int,
    offset: int,
    kv_head: int,
    count: int,
    weights: Any,
    at: int,
    head_dim: int,
) -> None:
    """Add the weighted values of `count` tokens that follow each other in a block, for one head."""
    in_fours = count - count % 4
    for t in range(0, in_fours, 4):
        a, b = weights[head, at + t], weights[head, at + t + 1]
        c, d = weights[head, at + t + 2], weights[head, at + t + 3]
        for i in range(head_dim):
            out[item, head, i] += (
                a * values[block, offset + t, kv_head, i] + b * values[block, offset + t + 1, kv_head, i]
            ) + (
                c * values[block, offset + t + 2, kv_head, i] + d * values[block, offset + t + 3, kv_head, i]
            )
    for t in range(in_fours, count):
        a = weights[head, at + t]
        for i in range(head_dim):
            out[item, head, i] += a * values[block, offset + t, kv_head, i]


@kernel(FASTMATH)
def attend(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    items: Any,
    scale: Any,
    largest: Any,
    weight_sums: Any,
    partial: Any,
    max_item_tokens: int,
    first: int,
    last: int,
) -> None:
    """Items first..last-1.

    query: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim];
    block_tables: [num_sequences, max_blocks] int32; items: [num_items, 4] int64: query row, sequence, first
    and last + 1 position. Writes largest, weight_sums: [num_items, num_heads] and partial: [num_items,
    num_heads, head_dim], the sum of weighted values.
    """
    num_heads = query.shape[1]
    num_kv_heads, head_dim = k_cache.shape[2], query.shape[2]
    block_size = k_cache.shape[1]
    block_floats = block_size * num_kv_heads * head_dim
    head_floats = block_floats // num_heads
    shared = num_heads // num_kv_heads
    scores = np.empty((num_heads, max_item_tokens), np.float32)
    for item in range(first, last):
        row, sequence, low, high = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        position = low
        while position < high:
            offset = position % block_size
            count = min(block_size - offset, high - position)
            block = block_tables[sequence, position // block_size]
            next_block = block_tables[sequence, min(position + count, high - 1) // block_size]
            at = position - low
            for head in range(num_heads):
                # While a block is worked on, the next one is fetched, a part with each head.
                for i in range(head * head_floats, (head + 1) * head_floats, LINE_FLOATS):
                    _prefetch(k_cache, next_block * block_floats + i)
                kv_head = head // shared
                if head_dim == 64:
                    _scores(query, row, head, k_cache, block, offset, kv_head, count, scores, at, scale, 64)
                else:
                    _scores(
                        query, row, head, k_cache, block, offset, kv_head, count, scores, at, scale, head_dim
                    )
            position += count
        for head in range(num_heads):
            top = _largest(scores, head, high - low)
            largest[item, head] = top
            _exp_minus(scores, head, top, high - low)
            weight_sums[item, head] = _sum(scores, head, high - low)
            for i in range(head_dim):
                partial[item, head, i] = np.float32(0)
        position = low
        while position < high:
            offset = position % block_size
            count = min(block_size - offset, high - position)
            block = block_tables[sequence, position // block_size]
            next_block = block_tables[sequence, min(position + count, high - 1) // block_size]
            at = position - low
            for head in range(num_heads):
                for i in range(head * head_floats, (head + 1) * head_floats, LINE_FLOATS):
                    _prefetch(v_cache, next_block * block_floats + i)
                kv_head = head // shared
                if head_dim == 64:
                    _add(partial, item, head, v_cache, block, offset, kv_head, count, scores, at, 64)
                else:
                    _add(partial, item, head, v_cache, block, offset, kv_head, count, scores, at, head_dim)
            position += count


@kernel(EXACT)
def merge(items: Any, largest: Any, weight_sums: Any, partial: Any, out: Any) -> None:
    """Put the items of each row together, in order. out: [num_tokens, num_heads, head_dim]."""
    num_items, num_heads, head_dim = partial.shape
    start = 0
    while start < num_items:
        row = items[start, 0]
        end = start + 1
        while end < num_items and items[end, 0] == row:
            end += 1
        for head in range(num_heads):
            top = largest[start, head]
            for item in range(start + 1, end):
                top = max(top, largest[item, head])
            total = np.float32(0)
            for item in range(start, end):
                factor = np.float32(np.exp(largest[item, head] - top))
                total += factor * weight_sums[item, head]
                largest[item, head] = factor
            for i in range(head_dim):
                out[row, head, i] = partial[start, head, i] * (largest[start, head] / total)
            for item in range(start + 1, end):
                factor = largest[item, head] / total
                for i in range(head_dim):
                    out[row, head, i] += partial[item, head, i] * factor
        start = end


def compile_all(step: Callable[[], None]) -> None:
    """Compile for float32."""
    heads, cache = np.zeros((1, 1, 4), np.float32), np.zeros((1, 4, 1, 4), np.float32)
    items = np.array([[0, 0, 0, 1]], np.int64)
    largest, sums = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    tables = np.zeros((1, 1), np.int32)
    attend(heads, cache, cache, tables, items, np.float32(1), largest, sums, heads, 1, 0, 1)
    step()
    merge(items, largest, sums, heads, heads.copy())
    step()
