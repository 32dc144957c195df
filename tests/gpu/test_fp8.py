"""Weights and KV in fp8, and KV in four bits, on a GPU: kernels against their specification, engines against the same arithmetic on a CPU, pairs of workers."""

import asyncio
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from tests.support.device_engine import PROMPTS, TINY, DeviceEngine, first_logits, greedy, random_weights
from tests.support.tiny_model import write_tiny_gguf
from tests.support.triton_checks import fp8_linear
from tests.support.triton_checks.interpreter import checks_of
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    greedy_submit,
    handed_off,
    running_pair,
    running_worker,
    worker_spec,
)
from workers.api import Device, KvDtype, NgramDrafts, PhaseSet, SamplingParams, WeightDtype, WorkerSpec
from workers.device.gpu import load_to_gpu, placed
from workers.model import fp8
from workers.model.llama import Llama
from workers.model.prepare import WEIGHTS, load_weights, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs an NVIDIA GPU of compute capability 8.9",
    ),
]

FP8 = torch.float8_e4m3fn
CUDA = torch.device("cuda")
BUCKETS, MIXED = (1, 2, 4, 8), (16, 32, 64)
#: Of logits to those of the same fp8 weights and KV with float32 between them, relative to the norm of the latter: bfloat16 moves one
#: number in twenty across a border of fp8. Rounding to bfloat16 on a CPU makes 0.12 of it.
WORST = 0.25


def test_the_kernels_equal_their_references() -> None:
    for name, check in checks_of(fp8_linear.__name__).items():
        print(name)
        check("cuda")


def test_fast_sums_lose_less_than_half_of_what_fp8_does() -> None:
    """Of the longest product of Llama-3-8B."""
    rows, weight = torch.randn(64, 14336, device=CUDA), torch.randn(512, 14336, device=CUDA)
    (numbers, row_scales), (columns, scales) = map(fp8.quantise_rows, (rows, weight))
    exact = (numbers.double() @ columns.double().t()) * row_scales * scales[:, 0]
    multiply = partial(
        torch._scaled_mm, numbers, columns.t(), scale_a=row_scales, scale_b=scales.t().contiguous()
    )
    errors = [
        float(
            (multiply(out_dtype=torch.bfloat16, use_fast_accum=fast).double() - exact).norm() / exact.norm()
        )
        for fast in (False, True)
    ]
    lost = float((exact - rows.double() @ weight.double().t()).norm() / exact.norm())
    print(f"slow sums {errors[0]:.2e}, fast sums {errors[1]:.2e}, fp8 itself {lost:.2e}")
    assert errors[1] < lost / 2


@cache
def cpu_weights() -> dict[str, torch.Tensor]:
    return random_weights(TINY, sharpness=1.0)


def engine(
    dtype: WeightDtype, kv_dtype: torch.dtype | None, buckets: tuple[int, ...] = (), **options
) -> DeviceEngine:
    weights: dict[str, torch.Tensor] = {}
    for name, values in cpu_weights().items():
        weights |= placed(name, values, CUDA, dtype)
    return DeviceEngine(Llama(TINY, weights), buckets=buckets, kv_dtype=kv_dtype, **options)


DTYPES = pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (WeightDtype.FP8, None),
        (WeightDtype.BFLOAT16, FP8),
        (WeightDtype.FP8, FP8),
        (WeightDtype.BFLOAT16, PACKED_DTYPE),
    ],
    ids=["weights", "kv", "both", "int4"],
)


@DTYPES
@pytest.mark.parametrize("is_captured", [False, True])
def test_logits_are_near_those_of_the_same_arithmetic_on_a_cpu(
    dtype: WeightDtype, kv_dtype: torch.dtype | None, is_captured: bool
) -> None:
    weights = fp8.all_quantised(cpu_weights()) if dtype is WeightDtype.FP8 else cpu_weights()
    wanted = first_logits(DeviceEngine(Llama(TINY, weights), kv_dtype=kv_dtype))
    graphs = {"buckets": BUCKETS, "mixed_buckets": MIXED} if is_captured else {}
    given = first_logits(engine(dtype, kv_dtype, **graphs))
    error = float((given - wanted).norm() / wanted.norm())
    print(f"{dtype}, KV {kv_dtype}: relative error {error:.2e}")
    assert error < WORST


@DTYPES
def test_captured_steps_of_the_same_size_compute_what_eager_ones_do(
    dtype: WeightDtype, kv_dtype: torch.dtype | None
) -> None:
    """One sequence is a step of one row, captured or not: the same kernels, and the same bits."""
    eager, captured = (engine(dtype, kv_dtype, buckets) for buckets in ((), BUCKETS))
    prompts = PROMPTS[1:2]
    assert captured.serve(prompts, greedy()) == eager.serve(prompts, greedy())
    assert captured.forward is not None
    assert captured.forward.num_replayed > 0


@DTYPES
def test_overlapped_and_preempted_requests_are_served(
    dtype: WeightDtype, kv_dtype: torch.dtype | None
) -> None:
    options = {"buckets": BUCKETS, "mixed_buckets": MIXED, "is_overlapping": True}
    found = engine(dtype, kv_dtype, num_blocks=16, **options).serve(PROMPTS, greedy(), steps_between=1)
    assert [len(tokens) for tokens in found] == [24 - i % 5 for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kv_dtype", [FP8, PACKED_DTYPE])
def test_drafts_are_verified_over_kv_in_fewer_bits(kv_dtype: torch.dtype) -> None:
    made = engine(WeightDtype.FLOAT32, kv_dtype)
    prompt = (5, 6, 7, 8) * 8
    found = made.serve([prompt], lambda _i: SamplingParams(16, decoding=NgramDrafts(4)))
    assert len(found[0]) == 16


# Workers.


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers, with heads of 32 and sizes that are multiples of 16."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", hidden=128, num_layers=3)


def spec(
    model: Path,
    phases: PhaseSet = PREFILL | DECODE,
    *,
    weights: WeightDtype = WeightDtype.BFLOAT16,
    kv: KvDtype = KvDtype.FP8,
) -> WorkerSpec:
    made = worker_spec(model, phases, token_budget=SMALL_BUDGET, max_running_sequences=8)
    return replace(made, device=Device.CUDA, engine=replace(made.engine, weight_dtype=weights, kv_dtype=kv))


def test_a_file_is_quantised_as_its_tensors_are(model_path: Path) -> None:
    prepared = prepare(str(model_path), lambda *_progress: None)
    found = load_to_gpu(prepared.folder / WEIGHTS, CUDA, WeightDtype.FP8, 0.9, lambda _done: None)
    expected = fp8.all_quantised(load_weights(prepared))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if values.dtype is FP8:
            assert torch.equal(found[name].cpu().view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("weights", [WeightDtype.BFLOAT16, WeightDtype.FP8])
@pytest.mark.parametrize("kv", list(KvDtype))
def test_a_worker_serves(model_path: Path, weights: WeightDtype, kv: KvDtype) -> None:
    async def scenario() -> None:
        async with running_worker(spec(model_path, weights=weights, kv=kv)) as worker:
            assert len(await worker.generate(greedy_submit(33))) > 0

    asyncio.run(scenario())


async def tokens_alone(model: Path, kv: KvDtype) -> list[int]:
    async with running_worker(spec(model, weights=WeightDtype.FLOAT32, kv=kv)) as worker:
        return await worker.generate(greedy_submit(50))


@pytest.mark.parametrize(
    ("prefill_kv", "decode_kv"),
    [
        (KvDtype.FP8, KvDtype.FP8),
        (KvDtype.AUTO, KvDtype.FP8),
        (KvDtype.FP8, KvDtype.AUTO),
        (KvDtype.INT4, KvDtype.INT4),
        (KvDtype.AUTO, KvDtype.INT4),
        (KvDtype.INT4, KvDtype.AUTO),
    ],
)
def test_kv_in_fewer_bits_goes_from_prefill_to_decode(
    model_path: Path, prefill_kv: KvDtype, decode_kv: KvDtype
) -> None:
    """Float32 between: what differs is the KV alone. Pairs of two kinds convert."""

    async def scenario() -> None:
        pair = [
            spec(model_path, phases, weights=WeightDtype.FLOAT32, kv=kv)
            for phases, kv in ((PREFILL, prefill_kv), (DECODE, decode_kv))
        ]
        async with running_pair(*pair) as (prefill, decode):
            to_prefill, to_decode = handed_off(greedy_submit(50), decode, "t50")
            await prefill.send(to_prefill)
            found = await decode.generate(to_decode)
        assert found
        if prefill_kv == decode_kv:
            assert found == (await tokens_alone(model_path, prefill_kv))[1:]

    asyncio.run(scenario())
