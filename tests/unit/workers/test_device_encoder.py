"""The encoder of a GPU, on a CPU: whatever the batches, embeddings are those of the vision model itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.device_worker import cpu_as_gpu
from tests.support.tiny_encoders import ENCODERS, SIZES, device_encoder, tiles, weights_of
from tests.support.tiny_vision_models import write_vision_folder
from tests.support.worker_client import worker_spec
from workers.api import Device, ImageReduction, Phase, PhaseSet, WeightDtype
from workers.device.buckets import MAX_GRAPH_TILES, graph_tiles
from workers.device.encoder import DeviceEncoder
from workers.device.memory import GpuMemory, encoder_step_bytes
from workers.errors import NotOnGpu, OutOfMemory
from workers.loading import LoadedModel, load
from workers.model.vision.config import VisionConfig
from workers.model.vision.make import make_encoder

IDEFICS3, QWEN = ENCODERS["idefics3"], ENCODERS["qwen"]
#: fp32 sums in another order, as batches differ.
TOLERANCE = 1e-5
#: Of bfloat16, relative to the norm of all embeddings: 8 bits in each of some dozen operations.
BF16_ERROR = 0.03
MIB = 2**20


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("max_tiles", [1, 2, 8])
def test_embeddings_are_those_of_the_vision_model(config: VisionConfig, max_tiles: int) -> None:
    wanted_from, encoder = make_encoder(config, weights_of(config)), device_encoder(config, max_tiles)
    pixels = tiles(config, encoder, *SIZES)
    for num in range(len(pixels) + 1):
        wanted, found = wanted_from.encode(pixels[:num]), encoder.encode(pixels[:num])
        assert [one.shape for one in found] == [one.shape for one in wanted]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_what_was_returned_stays_when_others_are_encoded() -> None:
    encoder = device_encoder(IDEFICS3, 2)
    pixels = tiles(IDEFICS3, encoder, (30, 20))
    first = encoder.encode(pixels[:1])[0]
    before = first.clone()
    encoder.encode(pixels[1:])
    assert torch.equal(first, before)


def test_embeddings_in_bfloat16_are_near() -> None:
    encoder = device_encoder(IDEFICS3, 2, dtype=torch.bfloat16)
    pixels = tiles(IDEFICS3, encoder, (30, 20), (9, 40))
    found = torch.cat(encoder.encode(pixels))
    assert found.dtype == torch.bfloat16
    wanted = torch.cat(make_encoder(IDEFICS3, weights_of(IDEFICS3)).encode(pixels))
    error = float((found.float() - wanted).norm() / wanted.norm())
    assert error < BF16_ERROR


def test_merged_embeddings_are_those_of_the_vision_model() -> None:
    wanted_from, encoder = make_encoder(IDEFICS3, weights_of(IDEFICS3)), device_encoder(IDEFICS3, 2)
    reduction = ImageReduction(merge_threshold=0.1)
    for tile in tiles(IDEFICS3, encoder, (30, 20)):
        wanted, wanted_kept = wanted_from.encode_reduced(tile, reduction)
        found, kept = encoder.encode_reduced(tile, reduction)
        assert kept == wanted_kept
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_a_graph_has_a_tile_at_least_and_no_more_than_the_budget_otherwise(patches: int, budget: int) -> None:
    num = graph_tiles(patches, budget)
    assert 1 <= num <= MAX_GRAPH_TILES
    assert num == 1 or num * patches <= budget


def test_larger_batches_and_values_need_more() -> None:
    base = encoder_step_bytes(IDEFICS3, 64, 2)
    assert base > 64 * 10 * IDEFICS3.hidden_size * 2
    assert encoder_step_bytes(IDEFICS3, 128, 2) > base
    assert encoder_step_bytes(IDEFICS3, 64, 4) > base
    # A picture that is larger than the budget is encoded all the same, alone.
    assert encoder_step_bytes(QWEN, 1, 2) == encoder_step_bytes(QWEN, QWEN.max_tile_patches, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_vision_folder(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))


def load_on_gpu(folder: Path, phases: PhaseSet, **engine: Any) -> LoadedModel:
    spec = replace(worker_spec(folder, phases, **engine), device=Device.CUDA)
    return load(spec, lambda _what, _done: None)


ENCODE, PREFILL = frozenset({Phase.ENCODE}), frozenset({Phase.PREFILL})


def test_what_each_phase_needs_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    encode = load_on_gpu(folder, ENCODE)
    assert encode.text is None
    assert isinstance(encode.images.tools.encoder, DeviceEncoder)
    assert encode.images.prefill is None
    prefill = load_on_gpu(folder, PREFILL)
    assert prefill.images.tools is None
    assert prefill.images.encode is None
    # Workers of all kinds exchange embeddings.
    layouts = {one.pool.layout for one in (encode.images.encode, prefill.images.prefill)}
    assert {layout.dtype for layout in layouts} == {"float32"}
    assert len(layouts) == 1
    prefill.text.runner.close()
    prefill.text.compiler.close()


def test_weights_that_it_does_not_compute_with_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_as_gpu(monkeypatch)
    with pytest.raises(NotOnGpu, match=r"weightDtype int8"):
        load_on_gpu(folder, ENCODE, weight_dtype=WeightDtype.INT8)


@pytest.mark.parametrize(
    ("free_bytes", "what"),
    [
        (MIB // 2, r"the embeddings of pictures on the GPU: .* lower engine\.imageCacheMiB"),
        (5 * MIB, r"encoding pictures on the GPU: .* lower engine\.encodePatchBudget"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, what: str
) -> None:
    cpu_as_gpu(monkeypatch, GpuMemory(free_bytes, 8 * 2**30))
    with pytest.raises(OutOfMemory, match=what):
        load_on_gpu(folder, ENCODE, image_cache_bytes=MIB)
