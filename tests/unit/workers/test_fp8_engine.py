"""An engine with weights and KV in fp8, or KV in four bits: the forward pass of a GPU on a CPU, with its arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_int4.op import PACKED_DTYPE, values_of
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.padded import paged_attention_padded
from tests.support.device_engine import PROMPTS, TINY, DeviceEngine, greedy, random_weights
from workers.api import EngineConfig, KvDtype, WeightDtype
from workers.device.dtypes import computed_in, kv_dtype
from workers.latency_model import roofline
from workers.loaded_shapes import FP8_SPEED_UP, gpu_shape, model_shape
from workers.model import fp8
from workers.model.forward_batch import ForwardBatch
from workers.model.llama import Llama
from workers.step_shape import chunk, decodes
from workers.tensor_parallel.kv_moves import copy_blocks, move_slots

FP8 = torch.float8_e4m3fn
#: Of logits to those of float32, relative to the norm of the latter: a product is off by 4 % (see test_fp8_linear.py), and three layers
#: have a dozen.
WORST = 0.25
#: Of numbers that are rounded the other way, likewise.
BORDERS = 0.1


def logits_of(made: DeviceEngine) -> torch.Tensor:
    """Of the first step of some prompts, [rows, vocab_size]."""
    found: list[torch.Tensor] = []
    forward = made.runner._run_forward

    def keep(*arguments: object, **options: object) -> torch.Tensor:
        result = forward(*arguments, **options)  # type: ignore[arg-type]
        found.append(result.clone())
        return result

    made.runner._run_forward = keep  # type: ignore[assignment]
    made.serve(PROMPTS[:4], greedy(1))
    return torch.cat(found)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(TINY, sharpness=1.0)


@pytest.mark.parametrize(
    ("is_fp8", "kv_dtype"),
    [(True, torch.float32), (False, FP8), (True, FP8), (False, PACKED_DTYPE)],
    ids=["weights", "kv", "both", "int4"],
)
def test_logits_are_near_those_of_float32(
    weights: dict[str, torch.Tensor], is_fp8: bool, kv_dtype: torch.dtype
) -> None:
    exact = logits_of(DeviceEngine(Llama(TINY, weights)))
    model = Llama(TINY, fp8.all_quantised(weights) if is_fp8 else weights)
    given = logits_of(DeviceEngine(model, kv_dtype=kv_dtype))
    error = float((given - exact).norm() / exact.norm())
    assert 0.001 < error < WORST


def decodes_of(num_sequences: int, num_tokens: int) -> ForwardBatch:
    """The last token of each, over KV that earlier steps wrote."""
    places = num_tokens - 1
    num_blocks = -(-num_tokens // 16)
    tables = np.arange(num_sequences * num_blocks, dtype=np.int32).reshape(num_sequences, num_blocks)
    return ForwardBatch(
        token_ids=torch.arange(7, 7 + num_sequences),
        positions=torch.full((num_sequences,), places),
        slots=torch.from_numpy(tables[:, places // 16].astype(np.int64) * 16 + places % 16),
        block_tables=tables,
        query_lens=np.ones(num_sequences, np.int64),
        context_lens=np.full(num_sequences, num_tokens),
        logit_rows=torch.arange(num_sequences),
    )


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8, PACKED_DTYPE])
@pytest.mark.parametrize("num_sequences", [1, 3, 5, 8])
def test_captured_steps_compute_what_eager_ones_do(
    weights: dict[str, torch.Tensor], kv_dtype: torch.dtype, num_sequences: int
) -> None:
    """But for numbers at the border between two of fp8: sums of a step of another size are off in their last bit."""
    model = Llama(TINY, fp8.all_quantised(weights))
    found = []
    for buckets in ((), (1, 4, 8)):
        made = DeviceEngine(model, kv_dtype=kv_dtype, buckets=buckets)
        assert made.forward is not None
        for num_tokens in (1, 2, 3):
            logits = made.forward(decodes_of(num_sequences, num_tokens))
        assert made.forward.num_replayed == (3 if buckets else 0)
        found.append(logits.clone())
    assert (found[1] - found[0]).norm() < BORDERS * found[0].norm()


@pytest.mark.parametrize("kv_dtype", [FP8, PACKED_DTYPE])
def test_kv_in_fewer_bits_moves_as_it_is(kv_dtype: torch.dtype) -> None:
    kv_cache = convert(torch.randn(2, 2, 3, 4, 1, 16), kv_dtype)
    before = kv_cache.clone()
    copy_blocks(kv_cache, {2: 0})
    move_slots(kv_cache, torch.tensor([4, 5]), torch.tensor([5, 0]))
    assert torch.equal(kv_cache[:, :, 2].float(), before[:, :, 0].float())
    moved, flat = kv_cache.flatten(2, 3).float(), before.flatten(2, 3).float()
    assert torch.equal(moved[:, :, [4, 5]], flat[:, :, [5, 0]])


@pytest.mark.parametrize("kv_dtype", [FP8, PACKED_DTYPE])
def test_attention_over_kv_in_fewer_bits_is_that_over_its_numbers(kv_dtype: torch.dtype) -> None:
    query = torch.randn(3, 4, 16)
    caches = convert(torch.randn(1, 2, 5, 8, 2, 16), kv_dtype)[0].unbind()
    batch = CudaAttentionBatch(
        torch.tensor([[1, 3], [2, 0]], dtype=torch.int32),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.tensor([12, 5], dtype=torch.int32),
        8,
        3,
        2,
        12,
    )
    expected = paged_attention_padded(query, *(values_of(one, torch.float32) for one in caches), batch)
    assert torch.equal(paged_attention_padded(query, *caches, batch), expected)


def test_matrices_alone_are_in_fp8(weights: dict[str, torch.Tensor]) -> None:
    found = fp8.all_quantised(weights)
    in_fp8 = {name.rpartition(".")[2] for name, one in found.items() if one.dtype is FP8}
    assert in_fp8 == {"qkv", "attention_out", "gate_up", "down"}
    assert found["embedding"] is weights["embedding"]
    assert sum(one.nbytes for one in found.values()) == fp8.weights_bytes(
        {name: tuple(one.shape) for name, one in weights.items()}, WeightDtype.FP8, 4
    )


@pytest.mark.parametrize(
    ("weights_in", "kv", "computed", "kept"),
    [
        (WeightDtype.FP8, KvDtype.AUTO, "bfloat16", "bfloat16"),
        (WeightDtype.FP8, KvDtype.FP8, "bfloat16", "float8_e4m3fn"),
        (WeightDtype.FLOAT16, KvDtype.AUTO, "float16", "float16"),
        (WeightDtype.FLOAT32, KvDtype.FP8, "float32", "float8_e4m3fn"),
        (WeightDtype.BFLOAT16, KvDtype.INT4, "bfloat16", "int4"),
    ],
)
def test_what_is_computed_in_and_what_kv_is_kept_in(
    weights_in: WeightDtype, kv: KvDtype, computed: str, kept: str
) -> None:
    assert computed_in(weights_in) == computed
    assert kv_dtype(EngineConfig(weight_dtype=weights_in, kv_dtype=kv)) == kept


def test_the_latency_model_reads_fewer_bytes_and_multiplies_faster() -> None:
    config = replace(TINY, num_layers=32, vocab_size=1000)
    shapes = {
        dtype: (
            model_shape(
                config, "m", dtype, kv_head_bytes=(1 if dtype is WeightDtype.FP8 else 2) * config.head_dim
            ),
            gpu_shape("gpu", 80 * 10**9, dtype),
        )
        for dtype in (WeightDtype.BFLOAT16, WeightDtype.FP8)
    }
    (wide, gpu), (narrow, faster) = shapes.values()
    layers, head = wide.num_weights, wide.num_head_weights
    assert narrow.weight_bytes * (layers + head) == pytest.approx(layers + 2 * head)
    assert narrow.kv_token_bytes * 2 == wide.kv_token_bytes
    # A prompt is computed as much faster as was measured, a decode reads its KV in half of the time.
    long, few = chunk(4096), decodes(1, 1000)
    assert roofline(long, narrow, faster)[1] == pytest.approx(roofline(long, wide, gpu)[1] / FP8_SPEED_UP)
    assert roofline(few, narrow, faster)[2] == pytest.approx(roofline(few, wide, gpu)[2] / 2)
