"""SM shares on a real GPU: disjoint layouts, and processes that share memory.

    python -m pytest tests/gpu/test_sm_share.py -q

needs torch with CUDA, cuda-bindings and Triton; the processes also nvidia-cuda-mps-control.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests.support.share_works import make_product
from workers.api import Phase
from workers.device.capability import capability_of
from workers.device.device_facts import device_facts
from workers.device.mps import MpsDaemon
from workers.device.phase_processes import PhaseProcesses
from workers.device.resident_memory import ResidentMemory, attach
from workers.device.resident_owner import ResidentOwner
from workers.device.shared_blocks import SharedBlocks
from workers.device.sm_share import SmShares, open_sm_shares, plain_streams
from workers.errors import ResidentMemoryGone, SharingUnsupported

CAPABILITY = capability_of(device_facts())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
needs_green_contexts = pytest.mark.skipif(
    CAPABILITY.green_contexts is not None, reason=f"green contexts: {CAPABILITY.green_contexts}"
)
needs_mps = pytest.mark.skipif(CAPABILITY.mps is not None, reason=f"MPS: {CAPABILITY.mps}")
BOUND_S = 120.0
NUM_BLOCKS = 64


def free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def sm_ids(stream: torch.cuda.Stream) -> set[int]:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.support import sm_ids as ids

    return ids.sm_ids(stream)


# Green contexts.


@pytest.fixture(scope="module")
def two() -> Iterator[SmShares]:
    shares = open_sm_shares(0, (Phase.PREFILL, Phase.DECODE), step_groups=1)
    yield shares
    shares.close()


@needs_green_contexts
def test_every_layout_of_the_table_computes(two: SmShares) -> None:
    assert two.dropped == ()
    assert len(two.layouts) > 2


@needs_green_contexts
def test_kernels_run_on_the_sms_of_their_part_and_on_no_other(two: SmShares) -> None:
    for live in two.layouts[1:]:
        used = [sm_ids(live.streams[part.phase]) for part in live.layout.parts]
        assert [len(ids) for ids in used] == [part.num_sms for part in live.layout.parts], str(live.layout)
        assert not used[0] & used[1], str(live.layout)


@needs_green_contexts
def test_three_phases_have_three_parts() -> None:
    shares = open_sm_shares(0, tuple(Phase), step_groups=4)
    try:
        assert shares.dropped == ()
        for live in shares.layouts[1:]:
            used = [sm_ids(live.streams[part.phase]) for part in live.layout.parts]
            assert sum(map(len, used)) == len(set().union(*used)) == live.layout.num_sms
    finally:
        shares.close()


@needs_green_contexts
def test_work_after_a_switch_sees_what_was_written_before(two: SmShares) -> None:
    values = torch.zeros(1 << 24, device="cuda")
    torch.cuda.synchronize()
    for number, live in enumerate([*two.layouts, *two.layouts[::-1]]):
        with torch.cuda.stream(two.switch(Phase.DECODE, live)):
            for _ in range(20):
                values += 1
            total = values.sum(dtype=torch.float64)
        live.streams[Phase.DECODE].synchronize()
        assert float(total) == (number + 1) * 20 * len(values)


@needs_green_contexts
def test_closing_leaves_what_the_driver_keeps_of_each_context_and_no_more() -> None:
    open_sm_shares(0, (Phase.PREFILL, Phase.DECODE)).close()
    before, num_contexts = free_bytes(), 0
    for _ in range(3):
        shares = open_sm_shares(0, (Phase.PREFILL, Phase.DECODE))
        num_contexts += 2 * (len(shares.layouts) - 1)
        assert free_bytes() < before
        shares.close()
    # Seen: 4 MiB, with driver 580.159. The products of the check took far more.
    assert before - free_bytes() <= num_contexts * (6 << 20)


@needs_green_contexts
def test_a_graph_is_captured_in_its_layout_and_replays_there(two: SmShares) -> None:
    left = torch.randn((64, 1024), device="cuda", dtype=torch.bfloat16)
    right = torch.randn((1024, 1024), device="cuda", dtype=torch.bfloat16)
    expected = left.float() @ right.float()
    for live in two.layouts:
        stream = live.streams[Phase.DECODE]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            left @ right
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = left @ right
        live.kept["decode graph"] = graph
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()
        assert float((out.float() - expected).norm() / expected.norm()) < 0.01


def test_plain_streams_need_nothing() -> None:
    shares = plain_streams(0, tuple(Phase))
    assert (
        shares.layouts[0].streams[Phase.DECODE].priority < shares.layouts[0].streams[Phase.PREFILL].priority
    )
    shares.close()


@needs_green_contexts
def test_parts_that_nobody_can_have_are_refused() -> None:
    with pytest.raises(SharingUnsupported, match="too few for 2 parts of 4096"):
        open_sm_shares(0, (Phase.PREFILL, Phase.DECODE), least_sms=4096)


# Memory of another process.


def make_tensors() -> Mapping[str, torch.Tensor]:
    """The small ones share an allocation."""
    return {
        "weight": torch.ones((4096, 4096), device="cuda", dtype=torch.bfloat16),
        "kv": torch.zeros((NUM_BLOCKS, 16, 256), device="cuda"),
        "small": torch.arange(12, device="cuda", dtype=torch.int32),
        "turned": torch.arange(12, device="cuda", dtype=torch.float16).reshape(3, 4).t(),
        "empty": torch.zeros((0, 5), device="cuda"),
    }


def make_nothing() -> Mapping[str, torch.Tensor]:
    """An owner that cannot load."""
    raise RuntimeError("there is no such model")


@pytest.fixture(scope="module")
def owner() -> Iterator[ResidentOwner]:
    with ResidentOwner(make_tensors) as found:
        yield found


def test_tensors_of_an_owner_are_mapped_as_they_are(owner: ResidentOwner) -> None:
    memory = attach(owner.manifest)
    small, turned = memory.tensors["small"], memory.tensors["turned"]
    assert small.tolist() == list(range(12))
    assert torch.equal(turned.cpu(), torch.arange(12, dtype=torch.float16).reshape(3, 4).t())
    assert memory.tensors["empty"].shape == (0, 5)
    assert bool((memory.tensors["weight"] == 1).all())
    small[3] = 77
    torch.cuda.synchronize()
    del small, turned
    memory.close()
    memory.close()
    again = attach(owner.manifest)
    assert int(again.tensors["small"][3]) == 77
    again.close()


def test_an_owner_that_dies_leaves_what_is_mapped_and_nothing_else() -> None:
    before = free_bytes()
    with ResidentOwner(make_tensors) as owner:
        memory = attach(owner.manifest)
        assert not memory.is_owner_gone
        os.kill(owner.pid, signal.SIGKILL)
        owner.stop()
        assert memory.is_owner_gone
        assert not owner.is_alive
        assert memory.tensors["small"].tolist() == list(range(12))
        memory.close()
        with pytest.raises(ResidentMemoryGone, match="has ended; start its owner again"):
            attach(owner.manifest)
    assert before - free_bytes() < 8 << 20


def test_an_owner_that_cannot_load_says_why() -> None:
    with pytest.raises(ResidentMemoryGone, match="there is no such model"):
        ResidentOwner(make_nothing)


def test_a_process_does_not_map_its_own() -> None:
    memory = ResidentMemory({"a": torch.zeros(4, device="cuda")})
    with pytest.raises(ResidentMemoryGone, match="this same process"):
        attach(memory.manifest)
    with pytest.raises(ValueError, match="of one GPU"):
        ResidentMemory({"a": torch.zeros(4)})


# Processes of two phases.


class Phases:
    """Prefill and decode over one owner and one pool, each in processes of its own."""

    def __init__(self, folder: Path, owner: ResidentOwner, daemon: MpsDaemon | None) -> None:
        self.path = folder / "blocks"
        SharedBlocks.create(self.path, NUM_BLOCKS).close()
        memory = attach(owner.manifest)
        memory.tensors["kv"].zero_()
        memory.close()
        self.prefill, self.decode = (
            PhaseProcesses(phase, make_product, owner.manifest, self.path, daemon)
            for phase in (Phase.PREFILL, Phase.DECODE)
        )
        self.prefill.ask(60, "start")
        self.decode.ask(40, "start")
        for one in (self.prefill, self.decode):
            one.settle(BOUND_S)

    def owned(self) -> dict[str, list[int]]:
        blocks = SharedBlocks(self.path)
        found = {}
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            assert phase.switch.serving is not None
            found[name] = blocks.blocks_of(phase.owner(phase.switch.serving.number))
        blocks.close()
        return found

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


@pytest.fixture(params=["MPS", "all SMs"])
def phases(request: pytest.FixtureRequest, tmp_path: Path, owner: ResidentOwner) -> Iterator[Phases]:
    if request.param == "all SMs":
        found = Phases(tmp_path, owner, None)
        yield found
        found.close()
        return
    if CAPABILITY.mps is not None:
        pytest.skip(f"MPS: {CAPABILITY.mps}")
    with MpsDaemon() as daemon:
        found = Phases(tmp_path, owner, daemon)
        assert found.prefill.readies[1].num_sms < torch.cuda.get_device_properties(0).multi_processor_count
        yield found
        found.close()


def wait_for_steps(memory_kv: torch.Tensor, blocks: list[int], at_least: float) -> None:
    """Until the phase that has these blocks has written so many steps into them."""
    give_up_s = time.monotonic() + BOUND_S
    while float(memory_kv[blocks[0], 0, 0]) < at_least:
        assert time.monotonic() < give_up_s, "it computes no more"


def test_one_process_is_killed_and_the_other_goes_on(phases: Phases, owner: ResidentOwner) -> None:
    memory = attach(owner.manifest)
    kv = memory.tensors["kv"]
    mine = phases.owned()["decode"]
    wait_for_steps(kv, mine, 5)
    pid, num_prefills = phases.decode.pid(), len(phases.prefill.steps)
    os.kill(phases.prefill.pid(), signal.SIGKILL)
    phases.prefill.tick(BOUND_S)
    reached = float(kv[mine[0], 0, 0])
    wait_for_steps(kv, mine, reached + 50)
    assert phases.decode.pid() == pid
    phases.prefill.settle(BOUND_S)
    assert len(phases.prefill.steps) == num_prefills + 1
    owned = phases.owned()
    wait_for_steps(kv, owned["prefill"], 5)
    assert set(mine) <= set(owned["decode"])
    assert not set(owned["prefill"]) & set(owned["decode"])
    del kv
    memory.close()


def test_a_share_changes_while_both_compute_and_the_work_goes_on_where_it_was(
    phases: Phases, owner: ResidentOwner
) -> None:
    memory = attach(owner.manifest)
    kv = memory.tensors["kv"]
    mine = phases.owned()["decode"]
    wait_for_steps(kv, mine, 5)
    before = float(kv[mine[0], 0, 0])
    phases.decode.ask(70, "test")
    phases.decode.settle(BOUND_S)
    # The count of steps came along, and the blocks.
    wait_for_steps(kv, mine, before + 5)
    assert set(mine) <= set(phases.owned()["decode"])
    del kv
    memory.close()


def test_nothing_is_left_on_the_gpu(tmp_path: Path) -> None:
    before = free_bytes()
    with ResidentOwner(make_tensors) as owner:
        found = Phases(tmp_path, owner, None)
        found.decode.ask(70, "test")
        found.decode.settle(BOUND_S)
        os.kill(found.prefill.pid(), signal.SIGKILL)
        found.close()
    assert before - free_bytes() < 8 << 20
    assert threading.active_count() < 10
