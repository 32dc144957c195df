"""Attention libraries that read the same paged cache, where they are installed.

FlashInfer: its wrappers for decode and for prompts, or its one persistent kernel for both. Their plan is made on the host,
from lengths that the host must know, once per step of a server and for all layers of it: here once, outside of what is
timed. Decode uses tensor cores, or CUDA cores where each KV head has one query head; chunks its kernels for Hopper or those
for any GPU. A batch with both is two launches, as in vLLM.

FlashAttention-3 as vLLM ships it: `vllm.vllm_flash_attn`, with a schedule that the device has made ahead, outside of what
is timed, as vLLM's is made once for all layers. Decode is cut into at most 32 pieces, which vLLM sets for CUDA graphs, or
into as many as the library chooses.

cuDNN through its own package, `nvidia-cudnn-frontend`: lengths, block tables and the place of each sequence's rows are read on the device, so
that a plan is for all batches of a shape. It is made outside of what is timed. (What torch has of cuDNN takes K and V that lie contiguously.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch

# One that is installed and cannot be imported is not left out without a word.
flashinfer = import_module("flashinfer") if find_spec("flashinfer") else None
fa3 = import_module("vllm.vllm_flash_attn") if find_spec("vllm") else None
cudnn: Any = import_module("cudnn") if find_spec("cudnn") else None

#: Of query, K cache, V cache and output, as `paged_attention_cuda` has them.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], object]


class Heads(NamedTuple):
    """How many, and the size of one."""

    query: int
    kv: int
    dim: int


MODULES = {"flashinfer": flashinfer, "fa3": fa3, "cudnn_paged": cudnn}
NAMES = tuple(name for name, module in MODULES.items() if module)
PACKAGES = {"flashinfer": "flashinfer-python", "fa3": "vllm", "cudnn_paged": "nvidia-cudnn-frontend"}
TENSOR_CORES = "tensor cores"
DTYPES = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
#: vLLM's, for CUDA graphs.
FA3_MAX_SPLITS = 32
#: vLLM's, for FlashInfer.
WORKSPACE_BYTES = 394 << 20
#: A library must agree with our kernels so well, as |difference| / |row| of each head of each token. Weights and outputs
#: in bf16 make 0.4 % each; a block of 16 that was left out of 1,024 tokens makes 12 %.
MAX_ERROR = 0.02


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    return {PACKAGES[name]: metadata.version(PACKAGES[name]) for name in NAMES}


def ways_of(
    name: str, batch: CudaAttentionBatch, lengths: Sequence[tuple[int, int]], heads: Heads
) -> dict[str, Callable[[], Call]]:
    """Of this library, its ways to compute attention of `batch` in bf16, by name; each is planned when it is called.

    name: of NAMES. lengths: (new tokens, all tokens) of each sequence, as in the batch; those that decode come last.
    """
    num_prompts = sum(new > 1 for new, _ in lengths)
    assert all(new > 1 for new, _ in lengths[:num_prompts]), "those that decode come last"
    if name == "fa3":
        return {
            f"at most {num_splits} pieces" if num_splits else "own choice of pieces": partial(
                _fa3, batch, heads, num_splits
            )
            for num_splits in ((0,) if num_prompts else (FA3_MAX_SPLITS, 0))
        }
    if name == "cudnn_paged":
        return {"first of its plans": partial(_cudnn, batch, heads)}
    ways: dict[str, Callable[[], Call]] = {"persistent": partial(_flashinfer_persistent, batch, heads)}
    prompts, decoding = slice(num_prompts), slice(num_prompts, len(lengths))
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.context_lens.device)
    of_prompts = {
        f"{backend} kernels": partial(_flashinfer_prompts, batch, prompts, heads, workspace, backend)
        for backend in ("fa3", "fa2")
    }
    of_decode = {
        cores: partial(_flashinfer_decode, batch, decoding, heads, workspace, cores == TENSOR_CORES)
        for cores in ((TENSOR_CORES, "CUDA cores") if heads.query == heads.kv else (TENSOR_CORES,))
    }
    if num_prompts == 0:
        return ways | of_decode
    if num_prompts == len(lengths):
        return ways | of_prompts
    num_rows = int(batch.query_starts[num_prompts])
    for (backend, first), (cores, second) in product(of_prompts.items(), of_decode.items()):
        ways[f"{backend}, {cores}"] = partial(_both, first, second, num_rows)
    return ways


def check(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Both [num_tokens, num_heads, head_dim]. Raises ValueError where a library computes something else than ours."""
    wanted = expected.float()
    error = ((output.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
    if not error <= MAX_ERROR:
        raise ValueError(f"differs from our kernels by {error:.2g}")


def _both(first: Callable[[], Call], second: Callable[[], Call], num_rows: int) -> Call:
    """The first of so many rows, the second of the others."""
    head, tail = first(), second()

    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        head(query[:num_rows], keys, values, out[:num_rows])
        tail(query[num_rows:], keys, values, out[num_rows:])

    return call


def pages_of(batch: CudaAttentionBatch, chosen: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's block tables of some sequences, int32.

    Where each begins, [len + 1]; all blocks, one after the other; how many tokens the last block of each has, [len].
    """
    context_lens, tables = batch.context_lens[chosen], batch.block_tables[chosen]
    num_blocks = -(-context_lens // batch.block_size)
    starts = F.pad(num_blocks.cumsum(0), (1, 0)).to(torch.int32)
    is_used = torch.arange(tables.shape[1], device=tables.device) < num_blocks[:, None]
    return starts, tables[is_used], (context_lens - 1) % batch.block_size + 1


def _flashinfer_decode(
    batch: CudaAttentionBatch, chosen: slice, heads: Heads, workspace: torch.Tensor, use_tensor_cores: bool
) -> Call:
    starts, indices, last_lens = pages_of(batch, chosen)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=use_tensor_cores,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last_lens.clone(),
    )
    wrapper.plan(starts, indices, last_lens, *heads, batch.block_size, **DTYPES)
    return _run_of(wrapper)


def _flashinfer_prompts(
    batch: CudaAttentionBatch, chosen: slice, heads: Heads, workspace: torch.Tensor, backend: str
) -> Call:
    pages = pages_of(batch, chosen)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    wrapper.plan(batch.query_starts[: len(pages[0])], *pages, *heads, batch.block_size, causal=True, **DTYPES)
    return _run_of(wrapper)


def _flashinfer_persistent(batch: CudaAttentionBatch, heads: Heads) -> Call:
    starts, indices, _ = pages_of(batch, slice(None))
    wrapper = flashinfer.BatchAttention("NHD", device=str(batch.context_lens.device))
    wrapper.plan(
        batch.query_starts,
        starts,
        indices,
        batch.context_lens,
        *heads,
        head_dim_vo=heads.dim,
        page_size=batch.block_size,
        causal=batch.max_query_len > 1,
        **DTYPES,
    )
    return _run_of(wrapper)


def _run_of(wrapper: Any) -> Call:
    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        wrapper.run(query, (keys, values), out=out)

    return call


def _fa3(batch: CudaAttentionBatch, heads: Heads, num_splits: int) -> Call:
    schedule = fa3.get_scheduler_metadata(
        len(batch.context_lens),
        batch.max_query_len,
        batch.max_context_len,
        *heads,
        cache_seqlens=batch.context_lens,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=batch.query_starts,
        page_size=batch.block_size,
        causal=True,
        num_splits=num_splits,
    )

    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        fa3.flash_attn_varlen_func(
            query,
            keys,
            values,
            batch.max_query_len,
            batch.query_starts,
            batch.max_context_len,
            seqused_k=batch.context_lens,
            causal=True,
            block_table=batch.block_tables,
            out=out,
            scheduler_metadata=schedule,
            num_splits=num_splits,
            fa_version=3,
        )

    return call


def _cudnn(batch: CudaAttentionBatch, heads: Heads) -> Call:
    handle = cudnn.create_handle()
    rows_at = batch.query_starts.to(torch.int64)[:, None, None, None] * (heads.query * heads.dim)
    query_lens = batch.query_starts.diff().reshape(-1, 1, 1, 1)
    context_lens = batch.context_lens.reshape(-1, 1, 1, 1)
    tables = batch.block_tables[:, None, :, None]
    made: list[tuple[Any, dict[Any, torch.Tensor], torch.Tensor]] = []

    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        if not made:
            inputs = {
                "rows": rows_at,
                "table": tables,
                "query_lens": query_lens,
                "context_lens": context_lens,
            }
            made.append(_cudnn_graph(handle, batch, heads, (keys, values), inputs))
        graph, known, workspace = made[0]
        moving = {"query": query, "keys": keys.transpose(1, 2), "values": values.transpose(1, 2), "out": out}
        cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
        graph.execute(
            {**known, **{UIDS[name]: one for name, one in moving.items()}}, workspace, handle=handle
        )

    return call


#: Of tensors that each call has others of.
UIDS = {name: uid for uid, name in enumerate(("query", "keys", "values", "out"), 1)}


def _cudnn_graph(
    handle: Any,
    batch: CudaAttentionBatch,
    heads: Heads,
    caches: tuple[torch.Tensor, torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> tuple[Any, dict[Any, torch.Tensor], torch.Tensor]:
    """The graph, its tensors that are the same in each call, and its workspace."""
    kind = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kind.BFLOAT16,
        intermediate_data_type=kind.FLOAT,
        compute_data_type=kind.FLOAT,
        handle=handle,
    )
    ids = {name: 10 + number for number, name in enumerate(inputs)}

    def known(name: str, uid: int) -> Any:
        return graph.tensor_like(inputs[name]).set_uid(uid)

    rows = heads.query * heads.dim
    shape = (len(batch.context_lens), heads.query, batch.max_query_len, heads.dim)
    stride = (batch.max_query_len * rows, heads.dim, rows, 1)
    query = graph.tensor(name="query", dim=shape, stride=stride, data_type=kind.BFLOAT16)
    query.set_uid(UIDS["query"]).set_ragged_offset(known("rows", ids["rows"]))
    keys, values = (
        graph.tensor_like(cache.transpose(1, 2)).set_uid(UIDS[name])
        for name, cache in zip(("keys", "values"), caches, strict=True)
    )
    out, _ = graph.sdpa(
        name="attention",
        q=query,
        k=keys,
        v=values,
        seq_len_q=known("query_lens", ids["query_lens"]),
        seq_len_kv=known("context_lens", ids["context_lens"]),
        use_padding_mask=True,
        attn_scale=heads.dim**-0.5,
        generate_stats=False,
        use_causal_mask_bottom_right=True,
        paged_attention_k_table=known("table", ids["table"]),
        paged_attention_v_table=known("table", 20),
        paged_attention_max_seq_len_kv=batch.max_context_len,
    )
    out.set_output(True).set_dim(shape).set_stride(stride).set_data_type(kind.BFLOAT16)
    out.set_uid(UIDS["out"]).set_ragged_offset(known("rows", 21))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(
        max(1, graph.get_workspace_size()), dtype=torch.uint8, device=inputs["rows"].device
    )
    found = {ids[name]: one for name, one in inputs.items()}
    return graph, {**found, 20: inputs["table"], 21: inputs["rows"]}, workspace
