"""A worker's share of the SMs: taken before the GPU is used, or refused with what to do; with doubles of NVML and of the daemon."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_mps import write_fake
from tests.support.fake_nvml import FakeNvml
from tests.support.waiting import until_in_thread
from workers.api import Device, Phase, WorkerId, WorkerSpec
from workers.device import mps_share
from workers.device.capability import PERCENTAGE, PIPE_DIRECTORY
from workers.device.mps import LOG_DIRECTORY
from workers.device.mps_share import first_gpu, take_share
from workers.device.nvml import NvmlUnavailable
from workers.errors import GpuUnavailable, SharingUnsupported
from workers.loaded_shapes import gpu_shape

ROOT = Path(__file__).parents[3]
SPEC = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "none", device=Device.CUDA, sm_percentage=62.5)
WHOLE = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "none", device=Device.CUDA)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing of the environment that is set lasts, and nothing of a daemon."""
    for name in (PIPE_DIRECTORY, LOG_DIRECTORY, PERCENTAGE, "CUDA_VISIBLE_DEVICES"):
        # Once set, what is there before is put back whatever happens to it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found = tmp_path / "root"
    found.mkdir()
    yield found
    until_in_thread(lambda: not list(found.iterdir()), "the end of the folder")


def test_a_worker_without_a_share_is_no_member(root: Path) -> None:
    assert take_share(WHOLE, nvml=None, root=root) is None
    assert PIPE_DIRECTORY not in os.environ


def test_a_share_is_in_the_environment_of_the_process(tmp_path: Path, root: Path) -> None:
    command = write_fake(tmp_path)
    member = take_share(SPEC, nvml=FakeNvml(), command=command, root=root)
    assert member is not None
    assert os.environ[PERCENTAGE] == "62.5"
    assert os.environ[PIPE_DIRECTORY] == str(member.folder)
    # As a worker that fails and is started again in one process, which only tests do.
    again = take_share(SPEC, nvml=FakeNvml(), command=command, root=root)
    assert again is not None
    assert again.folder == member.folder
    member.leave()
    again.leave()


def test_a_daemon_of_somebody_else_is_not_taken_for_ours(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPE_DIRECTORY, "/elsewhere")
    with pytest.raises(SharingUnsupported, match=r"is /elsewhere, of another MPS daemon .*; unset it where"):
        take_share(SPEC, nvml=FakeNvml(), command=write_fake(tmp_path), root=root)
    assert os.environ[PIPE_DIRECTORY] == "/elsewhere"


def test_a_gpu_in_mig_mode_is_not_shared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.is_mig = True
    with pytest.raises(SharingUnsupported, match=r"^resources.smPercentage 62.5: the GPU is in MIG mode"):
        take_share(SPEC, nvml=nvml, root=root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,GPU-1")
    with pytest.raises(SharingUnsupported, match="give each worker a MIG instance of its own"):
        take_share(SPEC, nvml=FakeNvml(), root=root)


def test_without_nvml_or_the_command_it_says_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NvmlUnavailable("nvidia-ml-py is not installed; pip install nvidia-ml-py")

    monkeypatch.setattr(mps_share, "open_nvml", missing)
    with pytest.raises(
        SharingUnsupported, match=r"cannot be told .* pip install nvidia-ml-py; see to that, or"
    ):
        take_share(SPEC, root=root)
    says = (
        r"^resources.smPercentage 62.5: no-such-command-here is not on the PATH; install the driver's compute"
    )
    with pytest.raises(SharingUnsupported, match=says):
        take_share(SPEC, nvml=FakeNvml(), command="no-such-command-here", root=root)


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        (None, "GPU-1"),
        ("0", "GPU-1"),
        ("1,0", "GPU-other"),
        (" 1 ", "GPU-other"),
        ("GPU-ot", "GPU-other"),
        ("MIG-5", "MIG-5"),
    ],
)
def test_the_first_gpu_that_is_visible_is_found_without_using_it(visible: str | None, uuid: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert first_gpu(environment, FakeNvml()) == uuid


@pytest.mark.parametrize("visible", ["", "2", "-1", "GPU-3", "NoDevFiles"])
def test_where_no_gpu_is_visible_it_says_so(visible: str) -> None:
    with pytest.raises(GpuUnavailable, match="names none of GPU-1, GPU-other; see what nvidia-smi"):
        first_gpu({"CUDA_VISIBLE_DEVICES": visible}, FakeNvml())


def test_a_driver_that_does_not_list_its_gpus_is_as_none() -> None:
    nvml = FakeNvml()
    nvml.failing["count"] = 999
    with pytest.raises(NvmlUnavailable, match="does not say which GPUs there are"):
        first_gpu({}, nvml)


def test_nothing_that_a_worker_imports_uses_the_gpu() -> None:
    """What does has the whole GPU from then on, whatever the environment says."""
    code = (
        "import torch; used = []\n"
        "for name in ('is_available', 'device_count', '_lazy_init', 'get_device_properties', 'current_device'):\n"
        "    setattr(torch.cuda, name, lambda *a, name=name, **k: used.append(name) or 0)\n"
        "import workers.actor, workers.worker, workers.device.placing, workers.device.pictures\n"
        "assert not used, used"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_a_share_begins_with_what_is_reached_on_such_a_part() -> None:
    whole, half = gpu_shape("gpu", 80 * 10**9), gpu_shape("gpu", 80 * 10**9, sm_percentage=50)
    assert gpu_shape("gpu", 80 * 10**9, sm_percentage=100) == whole
    # 66 of 132 SMs in docs/sm-share.md: products as the SMs, memory more than that.
    assert half.flops_per_s == pytest.approx(0.59 * whole.flops_per_s, rel=0.02)
    assert half.attention_flops_per_s / whole.attention_flops_per_s == half.flops_per_s / whole.flops_per_s
    assert 0.65 * whole.bytes_per_s < half.bytes_per_s < 0.85 * whole.bytes_per_s
