"""Weights that workers have in common: one keeper for each kind of them, with real processes and doubles of what a GPU does."""

import asyncio
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvtransfer.transports.cuda_mapping import this_process
from tests.support.device_engine import ENGINE, TINY
from tests.support.fake_nvml import FakeNvml
from tests.support.keeper_members import KeeperPlace
from tests.support.keeper_starts import refuse, tell_environment, write_line
from tests.support.tiny_model import write_tiny_gguf
from tests.support.waiting import until_in_thread
from tests.support.worker_client import DECODE, PREFILL, running_worker, worker_spec
from workers.api import Device, Phase, WeightDtype, WorkerId, WorkerSpec
from workers.device import gpu, gpu_telemetry, placing, resident_weights
from workers.device.memory import GpuMemory
from workers.device.resident_memory import AttachedMemory
from workers.device.resident_weights import ResidentWeights, map_weights
from workers.errors import GpuUnavailable, OutOfMemory, ResidentMemoryGone, SharingUnsupported
from workers.loading import LoadedModel, load
from workers.model.prepare import WEIGHTS, PreparedModel

CPU = torch.device("cpu")
BF16, FP8 = WeightDtype.BFLOAT16, WeightDtype.FP8


def nothing(*_progress: object) -> None:
    """Nobody is told."""


def prepared(folder: Path) -> PreparedModel:
    return PreparedModel(folder, "digest", TINY, b"", "")


class Place(KeeperPlace):
    """With what workers map. closed: what was unmapped, by the process of its keeper."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.models = path / "models"
        self.closed: list[bytes] = []

    def open_memory(self, kept: bytes) -> AttachedMemory:
        return AttachedMemory(this_process(), {"a": torch.zeros(4)}, 4096, lambda: self.closed.append(kept))

    def map(
        self,
        model: str = "model-v4",
        dtype: WeightDtype = BF16,
        uuid: str = "GPU-1",
        start: Callable[..., Any] = write_line,
        **options: Any,
    ) -> ResidentWeights:
        begin = partial(start, self.log, self.gate)
        options = {"progress": nothing, "open_memory": self.open_memory, **options}
        return map_weights(prepared(self.models / model), dtype, uuid, start=begin, root=self.root, **options)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Nothing is left at the end."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(resident_weights, "GRACE_S", 0.0)
    found = Place(tmp_path)
    yield found
    until_in_thread(lambda: not list(found.root.iterdir()), "the end of the keepers")


def test_the_same_weights_of_one_gpu_have_one_keeper(place: Place) -> None:
    one, other = place.map(), place.map()
    assert len(place.pids) == 1
    assert one.tensors.keys() == {"a"}
    assert one.num_bytes == 4096
    one.close()
    one.close()
    assert len(place.closed) == 1
    again = place.map()
    assert len(place.pids) == 1
    for mapped in (other, again):
        mapped.close()
    assert len(place.closed) == 3


def test_other_weights_have_another_keeper(place: Place) -> None:
    mapped = [
        place.map(**{"model": "model-v4", "uuid": "GPU-1", "dtype": BF16, **change})
        for change in ({}, {"model": "model-v5"}, {"uuid": "GPU-2"}, {"dtype": FP8})
    ]
    assert len(place.pids) == 4
    for one in mapped:
        one.close()


def test_the_keeper_is_no_client_of_mps_and_has_an_allocator_of_its_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others cannot map what expandable segments hold."""
    names = {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "PYTORCH_CUDA_ALLOC_CONF"}
    for name in names:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    told: list[bytes] = []

    def open_memory(kept: bytes) -> AttachedMemory:
        told.append(kept)
        return place.open_memory(kept)

    map_weights(
        *(prepared(place.models), BF16, "GPU-1", nothing),
        start=tell_environment,
        open_memory=open_memory,
        root=place.root,
    ).close()
    found = set(told[0].decode().splitlines())
    assert not names & found
    assert "CUDA_VISIBLE_DEVICES" in found


def test_what_stops_the_keeper_stops_the_worker_and_the_next_one_tries_anew(place: Place) -> None:
    with pytest.raises(OutOfMemory, match="lower it"):
        place.map(start=refuse)
    place.map(start=refuse).close()
    assert len(place.pids) == 2


def test_a_worker_that_cannot_map_them_is_no_member_and_the_next_one_has_another_keeper(place: Place) -> None:
    other = place.map()

    def fail(_kept: bytes) -> AttachedMemory:
        raise ResidentMemoryGone(7, "it has ended")

    with pytest.raises(ResidentMemoryGone):
        place.map(open_memory=fail)
    place.map().close()
    assert len(place.pids) == 2
    other.close()


def test_a_worker_that_waits_is_told_how_far_it_is(place: Place) -> None:
    place.gate.unlink()
    told: list[float] = []

    def tell(done: float) -> None:
        told.append(done)
        if done == 0.5:
            place.gate.touch()

    place.map(progress=tell).close()
    assert told[-1] == 0.5


def test_a_gpu_that_failed_does_not_keep_a_worker_from_its_end(place: Place) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    memory = AttachedMemory(this_process(), {}, 1, fail)
    mapped = place.map(open_memory=lambda _kept: memory)
    mapped.close()


def test_a_mig_instance_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with pytest.raises(SharingUnsupported, match="a MIG instance, with which it was not tried; leave it out"):
        place.map()


def test_a_real_keeper_says_that_there_is_no_gpu_as_a_worker_would(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(GpuUnavailable, match=r"^no GPU can be used: "):
        map_weights(prepared(place.models), BF16, "GPU-1", nothing, root=place.root)


# In the process of the keeper, and in that of a worker.


def test_a_keeper_may_take_all_that_is_free_and_gives_it_back_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"norm": torch.randn(64), "embedding": torch.randn(3, 64)}
    save_file(stored, tmp_path / WEIGHTS)
    num_bytes = 2 * 4 * 64
    monkeypatch.setattr(
        gpu, "gpu_memory", lambda _device: GpuMemory(num_bytes, 10 * num_bytes, 9 * num_bytes - 1)
    )
    needed: list[tuple[int, int]] = []

    def open_gpu(*, needed_capability: tuple[int, int]) -> torch.device:
        needed.append(needed_capability)
        return CPU

    kept: list[weakref.ref[torch.Tensor]] = []

    class FakeMemory:
        def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
            self._tensors = dict(tensors)
            kept.extend(map(weakref.ref, self._tensors.values()))
            self.manifest = json.dumps(sorted(self._tensors)).encode()

    monkeypatch.setattr(resident_weights, "open_gpu", open_gpu)
    monkeypatch.setattr(resident_weights, "ResidentMemory", FakeMemory)
    told: list[float] = []
    path = tmp_path / WEIGHTS
    manifest, end = resident_weights._load(path, BF16, tmp_path, told.append)
    assert json.loads(manifest) == ["embedding", "norm"]
    assert told[-1] == 1.0
    assert all(one() is not None for one in kept)
    end()
    assert all(one() is None for one in kept)
    resident_weights._load(path, FP8, tmp_path, nothing)
    assert needed == [(8, 0), (8, 9)]
    monkeypatch.setattr(gpu, "gpu_memory", lambda _device: GpuMemory(num_bytes - 1, 10 * num_bytes))
    with pytest.raises(OutOfMemory, match=r"the model's weights on the GPU.*, or end other programs on it$"):
        resident_weights._load(path, BF16, tmp_path, nothing)


@pytest.mark.parametrize("is_resident", [True, False])
def test_a_worker_has_the_weights_of_a_keeper_or_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_resident: bool
) -> None:
    """And unmaps them when it cannot go on."""
    calls: list[str] = []
    mapped = SimpleNamespace(tensors={"a": "mapped"}, num_bytes=7, close=lambda: calls.append("closed"))

    def map_them(_prepared: object, dtype: WeightDtype, uuid: str, _progress: object) -> SimpleNamespace:
        calls.append(f"{dtype} of {uuid}")
        return mapped

    def place(*arguments: object) -> None:
        calls.append(f"weights {arguments[2]}")
        raise OutOfMemory("the KV cache on the GPU", 2, 1, "lower it")

    monkeypatch.setattr(placing, "open_gpu", lambda **_options: CPU)
    monkeypatch.setattr(placing, "gpu_uuid", lambda: "GPU-1")
    monkeypatch.setattr(placing, "map_weights", map_them)
    monkeypatch.setattr(placing, "load_to_gpu", lambda *_arguments: {"a": "own"})
    monkeypatch.setattr(placing, "_place", place)
    engine = replace(ENGINE, weight_dtype=BF16, are_weights_resident=is_resident)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", engine=engine, device=Device.CUDA)
    with pytest.raises(OutOfMemory):
        placing.place_on_gpu(spec, prepared(tmp_path), nothing)
    if is_resident:
        assert calls == ["bfloat16 of GPU-1", "weights {'a': 'mapped'}", "closed"]
    else:
        assert calls == ["weights {'a': 'own'}"]


def test_a_worker_tells_of_its_weights_and_unmaps_them_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_telemetry, "open_nvml", FakeNvml)
    closed: list[bool] = []

    def load_resident(spec: WorkerSpec, progress: Callable[[str, float], None]) -> LoadedModel:
        loaded = load(spec, progress)
        assert loaded.text is not None
        resident: Any = SimpleNamespace(num_bytes=4096, close=lambda: closed.append(True))
        return replace(loaded, text=replace(loaded.text, resident=resident), gpu_uuid="GPU-1")

    monkeypatch.setattr("workers.worker.load", load_resident)
    spec = worker_spec(write_tiny_gguf(tmp_path / "tiny.gguf"), PREFILL | DECODE)

    async def scenario() -> None:
        async with running_worker(spec) as worker:
            gpu = (await worker.status()).gpu
            assert gpu is not None
            assert gpu.resident_bytes == 4096
            assert not closed

    asyncio.run(scenario())
    assert closed == [True]
