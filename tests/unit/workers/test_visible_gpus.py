"""Workers see their own GPU first, and then the others of the host."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.config import TransportChoice
from tests.support.fake_nvml import FakeNvml
from tests.support.worker_client import worker_spec
from workers.api import Device, WorkerSpec
from workers.device.visible_gpus import VISIBLE, see_others, with_others

UUIDS = ("GPU-a1", "GPU-b2", "GPU-b3")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", "0,1,2"),
        ("2", "2,0,1"),
        ("2, 0", "2,0,1"),
        ("0,1,2", "0,1,2"),
        ("GPU-b2", "GPU-b2,GPU-a1,GPU-b3"),
        # Its beginning names a GPU too.
        ("GPU-a", "GPU-a,GPU-b2,GPU-b3"),
        # None, an instance of MIG, a number that there is not, and what CUDA makes of two ways to name them.
        ("", ""),
        ("-1", "-1"),
        ("MIG-1234", "MIG-1234"),
        ("0,GPU-b2", "0,GPU-b2"),
        ("7", "7,0,1,2"),
    ],
)
def test_the_others_come_behind_its_own(visible: str, expected: str) -> None:
    assert with_others(visible, UUIDS) == expected


@given(st.lists(st.integers(0, 7), unique=True, min_size=1), st.integers(8, 16))
def test_each_is_named_once_and_its_own_keep_their_places(own: list[int], num_gpus: int) -> None:
    found = with_others(",".join(map(str, own)), [f"GPU-{i}" for i in range(num_gpus)]).split(",")
    assert found[: len(own)] == [str(index) for index in own]
    assert sorted(map(int, found)) == list(range(num_gpus))


def cuda_spec(**changes: object) -> WorkerSpec:
    return replace(worker_spec(Path("model")), device=Device.CUDA, **changes)  # type: ignore[arg-type]


def seen(spec: WorkerSpec, nvml: FakeNvml | None = None) -> str:
    environment = {VISIBLE: "1"}
    see_others(spec, environment=environment, nvml=nvml or FakeNvml())
    return environment[VISIBLE]


@pytest.mark.parametrize("transport", [TransportChoice.AUTO, TransportChoice.CUDA_IPC])
def test_a_worker_on_a_gpu_sees_them(transport: TransportChoice) -> None:
    spec = cuda_spec()
    assert seen(replace(spec, kv_transfer=replace(spec.kv_transfer, transport=transport))) == "1,0"


def test_others_see_their_own_alone() -> None:
    spec = cuda_spec()
    assert seen(replace(spec, device=Device.CPU)) == "1"
    assert seen(replace(spec, sm_percentage=50.0)) == "1"
    assert seen(replace(spec, engine=replace(spec.engine, tensor_parallel=2))) == "1"
    grpc = replace(spec.kv_transfer, transport=TransportChoice.GRPC)
    assert seen(replace(spec, kv_transfer=grpc)) == "1"


def test_where_nothing_is_hidden_or_nobody_says_what_there_is_all_stays_as_it_is() -> None:
    environment: dict[str, str] = {}
    see_others(cuda_spec(), environment=environment, nvml=FakeNvml())
    assert environment == {}
    nvml = FakeNvml()
    nvml.failing["count"] = nvml.NVML_ERROR_NOT_SUPPORTED
    assert seen(cuda_spec(), nvml) == "1"
