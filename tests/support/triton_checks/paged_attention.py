"""Attention on a GPU, or interpreted: its kernels against their reference."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, pack, values_of
from phasewise_kernels.paged_attention import cuda
from phasewise_kernels.paged_attention.cuda import (
    CudaAttentionBatch,
    Tuning,
    chunk_attention,
    lean_attention,
    lean_query_len,
    paged_attention_cuda,
    split_attention,
)
from phasewise_kernels.paged_attention.reference import paged_attention_reference
from phasewise_kernels.testing import ATTENTION_TOLERANCES, assert_close

#: On the CPU there are no multiprocessors to count; few, so that programs share outputs.
NUM_SMS = 3


@dataclass(frozen=True)
class Case:
    """Random values in shuffled blocks, where only the slots of these sequences are not NaN."""

    #: (new tokens, all tokens) of each sequence.
    lengths: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 16
    block_size: int = 4
    window: int = 0
    #: Sequences whose new tokens are a random tree.
    trees: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    #: Sequences of no token after the others.
    num_padding: int = 0
    #: K and V of a block follow each other, as strided views of one pool.
    is_interleaved: bool = False
    #: All look at the first token of a sequence, 160,000 times as much as at any other; its values are zeros, and those of the others small.
    has_sink: bool = False
    seed: int = 0

    def __str__(self) -> str:
        shown = [f"{query_len}of{context_len}" for query_len, context_len in self.lengths[:6]]
        for name, value in vars(self).items():
            if name != "lengths" and value != Case.__dataclass_fields__[name].default:
                shown.append(f"{name}={value}")
        return "-".join(shown)

    def on(self, device: str) -> "Inputs":
        """The batch there."""
        return Inputs(self, device)


@dataclass
class Inputs:
    """A case as tensors."""

    case: Case
    device: str
    query: torch.Tensor = field(init=False)
    k_cache: torch.Tensor = field(init=False)
    v_cache: torch.Tensor = field(init=False)
    batch: CudaAttentionBatch = field(init=False)
    block_tables: list[list[int]] = field(init=False)
    masks: dict[int, list[list[bool]]] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(case.seed)
        self._make_caches(generator)
        num_tokens = sum(query_len for query_len, _ in case.lengths) + case.num_padding
        shape = (num_tokens, case.num_kv_heads * case.group, case.head_dim)
        query = torch.randn(shape, generator=generator)
        if case.has_sink:
            query[..., 0] = 12.0
        self.query = query.to(case.dtype).to(self.device)
        rng = random.Random(case.seed)
        self.masks = {sequence: random_tree(case.lengths[sequence][0], rng) for sequence in case.trees}
        query_lens = [query_len for query_len, _ in case.lengths] + [1] * case.num_padding
        context_lens = [context_len for _, context_len in case.lengths] + [0] * case.num_padding
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        width = max(map(len, self.block_tables), default=0) + 1
        tables = [table + [self._spare] * (width - len(table)) for table in self.block_tables]
        tables += [[self._spare] * width] * case.num_padding
        self.batch = CudaAttentionBatch(
            block_tables=torch.tensor(tables, dtype=torch.int32).reshape(-1, width).to(self.device),
            query_starts=starts.to(self.device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32).to(self.device),
            block_size=case.block_size,
            num_tokens=num_tokens,
            max_query_len=max(query_lens, default=1),
            max_context_len=max(context_lens, default=0),
            tree_masks=self._tree_bits(starts.tolist(), num_tokens) if case.trees else None,
            num_sms=NUM_SMS if self.device == "cpu" else None,
        )

    def _make_caches(self, generator: torch.Generator) -> None:
        case = self.case
        needed = [-(-context_len // case.block_size) for _, context_len in case.lengths]
        # Block 0, which kernels look at where there is none, is nobody's.
        block_ids = [0, *(1 + torch.randperm(sum(needed), generator=generator)).tolist()]
        self.block_tables = [[block_ids.pop() for _ in range(count)] for count in needed]
        #: Nobody's, all NaN.
        self._spare = block_ids.pop()
        slot_shape = (2, case.num_kv_heads, case.head_dim)
        slots = torch.full(((sum(needed) + 1) * case.block_size, *slot_shape), float("nan"))
        for block_table, (_, context_len) in zip(self.block_tables, case.lengths, strict=True):
            positions = torch.arange(context_len)
            blocks = torch.tensor(block_table, dtype=torch.int64)[positions // case.block_size]
            places = blocks * case.block_size + positions % case.block_size
            slots[places] = torch.randn(context_len, *slot_shape, generator=generator)
            if case.has_sink:
                slots[places, 0, :, 0] = 0.0
                slots[places[:1], 0] = torch.eye(1, case.head_dim) * case.head_dim**0.5
                slots[places, 1] = 0.02 + 0.006 * slots[places, 1]
                slots[places[:1], 1] = 0.0
        pool = slots.view(-1, case.block_size, *slot_shape)
        if case.kv_dtype == PACKED_DTYPE:
            pool = pack(pool)
        pool = pool.to(case.kv_dtype or case.dtype).to(self.device)
        order = (0, 2, 1, 3, 4) if case.is_interleaved else (2, 0, 1, 3, 4)
        pool = pool.view(torch.uint8 if pool.element_size() == 1 else pool.dtype).permute(order).contiguous()
        pool = pool.view(case.kv_dtype or case.dtype)
        self.k_cache, self.v_cache = pool.unbind(1 if case.is_interleaved else 0)

    def _tree_bits(self, starts: list[int], num_tokens: int) -> torch.Tensor:
        bits = [0] * num_tokens
        for sequence, mask in self.masks.items():
            for i, row in enumerate(mask):
                word = sum(1 << j for j, is_seen in enumerate(row) if is_seen)
                bits[starts[sequence] + i] = word - (1 << 64 if word >> 63 else 0)
        return torch.tensor(bits, dtype=torch.int64).to(self.device)

    def poisoned_out(self) -> torch.Tensor:
        """Every value NaN."""
        return torch.full_like(self.query, float("nan"))

    def expected(self) -> torch.Tensor:
        """The specification, on the rows that are not padding."""
        case = self.case
        return paged_attention_reference(
            self.query.cpu().float(),
            values_of(self.k_cache.cpu(), torch.float32),
            values_of(self.v_cache.cpu(), torch.float32),
            block_tables=self.block_tables,
            query_lens=[query_len for query_len, _ in case.lengths],
            context_lens=[context_len for _, context_len in case.lengths],
            tree_masks=self.masks,
            window=case.window,
        )

    def expected_dense(self) -> torch.Tensor:
        """The same in fp64 by whole tensors, where it lies."""
        case = self.case
        output = torch.zeros(self.query.shape, dtype=torch.float32, device=self.device)
        row = 0
        for sequence, (query_len, context_len) in enumerate(case.lengths):
            table = torch.tensor(self.block_tables[sequence], device=self.device)
            prefix_len = context_len - query_len
            mask = torch.ones(query_len, query_len, dtype=torch.bool).tril()
            if sequence in self.masks:
                mask = torch.tensor(self.masks[sequence])
            depths = prefix_len + mask.sum(1) - 1
            seen = torch.cat((torch.ones(query_len, prefix_len, dtype=torch.bool), mask), 1)
            positions = torch.cat((torch.arange(prefix_len), depths))
            if case.window:
                seen &= positions[None] > depths[:, None] - case.window
            keys, values = (
                values_of(cache[table].flatten(0, 1)[:context_len], torch.float64).repeat_interleave(
                    case.group, 1
                )
                for cache in (self.k_cache, self.v_cache)
            )
            rows = slice(row, row + query_len)
            scores = torch.einsum("qhd,khd->hqk", self.query[rows].double(), keys) / case.head_dim**0.5
            scores.masked_fill_(~seen.to(self.device), float("-inf"))
            output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).float()
            row += query_len
        return output

    def check(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        """Fail unless the rows of sequences are as expected and those of padding as before."""
        num_rows = self.query.shape[0] - self.case.num_padding
        assert_close(
            out[:num_rows].float().cpu(), expected[:num_rows].cpu(), ATTENTION_TOLERANCES[self.case.dtype]
        )
        assert out[num_rows:].isnan().all()


def random_tree(num_nodes: int, rng: random.Random) -> list[list[bool]]:
    """Row: a node; column: whether it is the node or an ancestor. A node comes after its parent."""
    rows: list[list[bool]] = []
    for node in range(num_nodes):
        row = list(rows[rng.randrange(node)]) if node else [False] * num_nodes
        row[node] = True
        rows.append(row)
    return rows


_MIXED = ((1, 70), (9, 90), (40, 60), (1, 3), (33, 33))

#: Small enough for the interpreter.
CASES = (
    Case(((1, 1),)),
    Case(((1, 4), (1, 5), (1, 63), (1, 64), (1, 65))),
    Case(((1, 300),), num_kv_heads=1),
    Case(((1, 1), (1, 9), (1, 131), (1, 7)), num_padding=3),
    Case(((1, 200), (1, 3), (1, 64)), window=20),
    Case(((1, 200), (1, 80)), window=64, group=1),
    Case(((2, 2), (1, 7), (5, 13), (1, 150))),
    Case(((5, 205), (3, 64)), window=30),
    Case(((40, 40), (128, 300)), group=1),
    Case(((17, 17), (90, 200)), group=5, window=13),
    Case(_MIXED),
    Case(_MIXED, window=7, num_padding=2),
    Case(_MIXED, dtype=torch.float16),
    Case(_MIXED, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn),
    Case(_MIXED, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn, head_dim=128, num_padding=2),
    # Few outputs, which are cut otherwise.
    Case(((1, 300),), num_kv_heads=1, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn, head_dim=128),
    Case(
        ((1, 200), (1, 40)),
        dtype=torch.bfloat16,
        kv_dtype=torch.float8_e4m3fn,
        head_dim=128,
        block_size=16,
        window=30,
        is_interleaved=True,
    ),
    Case(
        ((1, 6), (4, 5), (5, 90)),
        trees=(1, 2),
        window=30,
        dtype=torch.float16,
        kv_dtype=torch.float8_e4m3fn,
        head_dim=128,
        block_size=5,
    ),
    Case(_MIXED, dtype=torch.float16, kv_dtype=PACKED_DTYPE, head_dim=32, num_padding=2),
    Case(_MIXED, dtype=torch.float16, kv_dtype=PACKED_DTYPE, head_dim=64, block_size=16, group=1),
    Case(
        ((1, 6), (5, 5), (5, 90)),
        trees=(1, 2),
        window=30,
        dtype=torch.float16,
        kv_dtype=PACKED_DTYPE,
        head_dim=64,
    ),
    Case(
        ((40, 70), (1, 300)), dtype=torch.bfloat16, kv_dtype=PACKED_DTYPE, head_dim=128, is_interleaved=True
    ),
    Case(_MIXED, is_interleaved=True, head_dim=24, block_size=16),
    Case(_MIXED, block_size=5, head_dim=96),
    Case(((1, 6), (5, 5), (5, 90)), trees=(1, 2)),
    Case(((1, 6), (5, 8), (16, 90)), trees=(1, 2), window=3),
    Case(((40, 70), (5, 8), (64, 100)), trees=(1, 2)),
    Case(((40, 70), (5, 8), (64, 100)), trees=(2,), window=9),
    Case(((1, 40), (3, 9)), group=32),
)


def _any_kv() -> st.SearchStrategy[dict[str, Any]]:
    """head_dim, and dtypes: of queries, and of caches where it is another one."""
    plain = st.fixed_dictionaries({"head_dim": st.sampled_from((8, 16, 40))})
    packed = {"head_dim": st.sampled_from((32, 64)), "kv_dtype": st.just(PACKED_DTYPE)}
    bytewise = {"head_dim": st.sampled_from((40, 128)), "kv_dtype": st.just(torch.float8_e4m3fn)}
    fewer_bits = (
        st.fixed_dictionaries({"dtype": st.just(torch.float16), **one}) for one in (packed, bytewise)
    )
    return st.one_of(plain, *fewer_bits)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Any shape that the interpreter does in a second."""
    query_lens = st.one_of(st.just(1), st.integers(1, 12), st.integers(1, 70))
    pairs = draw(st.lists(st.tuples(query_lens, st.one_of(st.just(0), st.integers(0, 150))), max_size=5))
    lengths = tuple((query_len, query_len + prefix_len) for query_len, prefix_len in pairs)
    could_be_trees = [i for i, (query_len, _) in enumerate(lengths) if query_len <= cuda.MAX_TREE_TOKENS]
    return Case(
        lengths,
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        block_size=draw(st.sampled_from((1, 3, 8, 16, 64))),
        window=draw(st.one_of(st.just(0), st.integers(1, 80))),
        trees=tuple(i for i in could_be_trees if draw(st.booleans())),
        num_padding=draw(st.sampled_from((0, 0, 2))),
        is_interleaved=draw(st.booleans()),
        **draw(_any_kv()),
        seed=draw(st.integers(0, 1 << 30)),
    )


def assert_semaphores_are_reset() -> None:
    """As the next launch expects them."""
    assert not any(semaphores.any() for semaphores in cuda._own_semaphores.values())


def run(inputs: Inputs) -> torch.Tensor:
    """The op, into poisoned memory."""
    out = inputs.poisoned_out()
    caches = inputs.k_cache, inputs.v_cache
    returned = paged_attention_cuda(inputs.query, *caches, inputs.batch, window=inputs.case.window, out=out)
    assert returned is out
    return out


def run_cut(inputs: Inputs, *, num_groups: int = 2, part_tokens: int = 0) -> torch.Tensor:
    """The same with contexts of chunks in pieces, which cost nothing here: these contexts are short."""
    out = inputs.poisoned_out()
    num_sms = num_groups * inputs.case.num_kv_heads
    batch, window = replace(inputs.batch, num_sms=num_sms), inputs.case.window
    arguments = inputs.query, inputs.k_cache, inputs.v_cache, batch, out
    lean_len = lean_query_len(batch.max_query_len, inputs.case.group)
    lean_attention(*arguments, window=window, max_query_len=lean_len)
    chunk_attention(
        *arguments,
        window=window,
        min_query_len=lean_len + 1,
        tuning=Tuning(tile_tokens=32, num_warps=4, num_stages=2),
        block_m=64,
        part_tokens=part_tokens,
    )
    return out


def run_cut_if_long(inputs: Inputs) -> torch.Tensor:
    """run_cut where there are chunks over more than a few tiles of KV."""
    batch = inputs.batch
    has_chunks = batch.max_query_len > lean_query_len(batch.max_query_len, inputs.case.group)
    return run_cut(inputs) if has_chunks and batch.max_context_len >= 90 else run(inputs)


def assert_case(case: Case, device: str, again: Callable[[Inputs], torch.Tensor] = run) -> None:
    """Twice, since the first call must leave all as it was."""
    inputs = case.on(device)
    expected = inputs.expected_dense()
    for call in (run, again):
        inputs.check(call(inputs), expected)
        assert_semaphores_are_reset()


def check_that_the_dense_reference_is_the_reference(device: str) -> None:
    """It is what larger cases are compared with."""
    for case in CASES[1:11] + CASES[-5:]:
        inputs = case.on(device)
        expected = inputs.expected().float()
        num_rows = len(expected) - case.num_padding
        assert_close(
            inputs.expected_dense().cpu()[:num_rows],
            expected[:num_rows],
            ATTENTION_TOLERANCES[torch.float32],
        )


def check_cases(device: str) -> None:
    """Ragged, windows, trees, padding, head and block sizes, dtypes; NaN where no token is."""
    for case in CASES:
        print(case, flush=True)
        assert_case(case, device, run_cut_if_long)


def check_that_small_weights_beside_a_large_one_count(device: str) -> None:
    """Beside that of a first token at which all look those of the others are 6e-6, and scales are small: fp16 has no numbers for both together."""
    case = Case(
        ((1, 1500), (2, 700)),
        group=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float16,
        kv_dtype=PACKED_DTYPE,
        has_sink=True,
    )
    inputs = case.on(device)
    expected = inputs.expected_dense().double()
    error = float((run(inputs).double() - expected).norm() / expected.norm())
    assert error < 5e-4, error


def check_any_case(device: str) -> None:
    """Whatever hypothesis thinks of."""

    # On a GPU each shape is a kernel to compile.
    @settings(max_examples=6 if device == "cpu" else 5, deadline=None, database=None)
    @given(any_case())
    def agrees(case: Case) -> None:
        assert_case(case, device, run_cut_if_long)

    agrees()


def check_that_any_number_of_programs_will_do(device: str) -> None:
    """Fewer than there are heads, as many as there are tiles, more."""
    case = Case(((1, 300), (1, 1), (1, 129), (1, 64)), num_kv_heads=3)
    inputs = case.on(device)
    expected = inputs.expected_dense()
    for num_sms in (1, 2, 7, 40):
        inputs.batch = replace(inputs.batch, num_sms=num_sms)
        inputs.check(run(inputs), expected)
    assert_semaphores_are_reset()
    # So many parts that they are merged in bunches.
    for context_len, num_sms in ((64 * 20, 12), (64 * 70, 45)):
        inputs = Case(((1, 7), (2, context_len)), num_kv_heads=1, block_size=64).on(device)
        inputs.batch = replace(inputs.batch, num_sms=num_sms)
        inputs.check(run(inputs), inputs.expected_dense())
        assert_semaphores_are_reset()


def check_that_pieces_may_end_where_sequences_do(device: str) -> None:
    """Of even batches and others, in blocks that tiles are whole ones of, and in such as they are not."""
    for lengths in (((1, 128),) * 4, ((1, 128), (1, 129), (1, 1), (1, 64)), ((2, 200), (1, 640))):
        for block_size in (4, 24):
            inputs = Case(lengths, num_kv_heads=2, block_size=block_size).on(device)
            expected = inputs.expected_dense()
            for num_sms in (2, 4, 5, 8, 20):
                inputs.batch = replace(inputs.batch, num_sms=num_sms)
                inputs.check(run(inputs), expected)
    assert_semaphores_are_reset()


def check_that_the_same_batch_gives_the_same_bits(device: str) -> None:
    """Parts are merged in the order of the line, whoever came last."""
    inputs = Case(((1, 700), (1, 90), (3, 400)), num_kv_heads=1).on(device)
    first = run(inputs)
    for _ in range(3):
        assert torch.equal(run(inputs), first)


def check_the_fixed_split(device: str) -> None:
    """The baseline that benchmarks measure against."""
    lengths = ((1, 300), (1, 1), (1, 64))
    for case in (Case(lengths), Case(lengths, window=70, num_padding=2)):
        inputs = case.on(device)
        expected = inputs.expected_dense()
        for num_splits in (1, 4):
            out = inputs.poisoned_out()
            caches = inputs.k_cache, inputs.v_cache
            split_attention(
                inputs.query, *caches, inputs.batch, out, window=case.window, num_splits=num_splits
            )
            inputs.check(out, expected)


def check_that_nothing_is_no_work(device: str) -> None:
    """No sequence; only padding."""
    assert run(Case(()).on(device)).numel() == 0
    assert run(Case((), num_padding=3).on(device)).isnan().all()
