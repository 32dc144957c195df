"""Layouts made of contexts, without a GPU: what is made, dropped, switched and given back; and what a device refuses."""

import logging
import runpy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from workers.api import Phase
from workers.device.capability import DeviceFacts, capability_of, report
from workers.device.green_contexts import GreenContext, GreenContextError
from workers.device.sm_layouts import SmGroups, SmPart, shared_layout
from workers.device.sm_share import LiveLayout, SmShares, divide
from workers.errors import SharingUnsupported

PHASES = (Phase.PREFILL, Phase.DECODE)
FACTS = DeviceFacts(
    "NVIDIA H100 80GB HBM3", (9, 0), 132, 13_000, False, "13.0.3", "/usr/bin/nvidia-cuda-mps-control", {}
)


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waited_for: list[str] = []
        self.is_destroyed = False

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited_for.append(other.name)

    def synchronize(self) -> None:
        assert not self.is_destroyed


class FakeContexts:
    """`failing`: sizes of parts that the driver does not make; `short`: those that get fewer SMs."""

    def __init__(self, failing: frozenset[int] = frozenset(), short: frozenset[int] = frozenset()) -> None:
        self.groups = SmGroups(8, 15, 12)
        self.alive: set[int] = set()
        self._failing, self._short = failing, short
        self._num_made = 0

    def make(self, part: SmPart) -> GreenContext:
        if part.num_sms in self._failing:
            raise GreenContextError("cuGreenCtxCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        self._num_made += 1
        self.alive.add(self._num_made)
        num_sms = part.num_sms - 8 if part.num_sms in self._short else part.num_sms
        stream: Any = FakeStream(f"{part.phase} {num_sms}")
        return GreenContext(stream, num_sms, self._num_made)

    def destroy(self, context: GreenContext) -> None:
        self.alive.remove(context.handle)


def shares_of(contexts: FakeContexts, problem: str = "", of: str = "") -> SmShares:
    """Every layout with a stream named `of` has this problem."""

    def check(streams: Sequence[Any]) -> str:
        return problem if of in [stream.name for stream in streams] else ""

    streams: Any = {phase: FakeStream(f"{phase} shared") for phase in PHASES}
    shared = LiveLayout(shared_layout(132, PHASES), streams)
    return divide(contexts, shared, PHASES, check, least_sms=16, step_groups=2)


def sizes(shares: SmShares) -> list[int]:
    return [one.layout.sm_count(Phase.DECODE) for one in shares.layouts]


def test_every_layout_has_a_stream_for_each_phase_and_the_shared_one_comes_first() -> None:
    contexts = FakeContexts()
    shares = shares_of(contexts)
    assert shares.layouts[0].layout.is_shared
    assert sizes(shares) == [132, 16, 32, 48, 64, 80, 96, 112]
    assert len(contexts.alive) == 14
    assert all(set(one.streams) == set(PHASES) for one in shares.layouts)
    assert shares.dropped == ()


@pytest.mark.parametrize(
    ("contexts", "problem", "reason"),
    [
        (
            FakeContexts(),
            "part 0 computed a product with an error of nan",
            "part 0 computed a product with an error of nan",
        ),
        (FakeContexts(failing=frozenset({16})), "", "cuGreenCtxCreate failed with CUDA_ERROR_OUT_OF_MEMORY"),
        (FakeContexts(failing=frozenset({116})), "", "cuGreenCtxCreate failed with CUDA_ERROR_OUT_OF_MEMORY"),
        (FakeContexts(short=frozenset({16})), "", "decode was to have 16 SMs and has 8"),
    ],
    ids=["wrong", "first part", "second part", "fewer SMs"],
)
def test_a_layout_that_fails_is_dropped_and_nothing_of_it_is_left(
    contexts: FakeContexts, problem: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        shares = shares_of(contexts, problem, "decode 16" if problem else "")
    assert sizes(shares) == [132, 32, 48, 64, 80, 96, 112]
    assert [why for _, why in shares.dropped] == [reason]
    assert "sm_layout_dropped" in caplog.text
    assert reason in caplog.text
    assert len(contexts.alive) == 12


def test_each_phase_switches_at_its_own_time_and_after_its_own_work() -> None:
    shares = shares_of(FakeContexts())
    split, reason = shares.pick({Phase.DECODE: 0.3, Phase.PREFILL: 0.7}, keeps=Phase.DECODE)
    assert split.layout.sm_count(Phase.DECODE) == 48
    assert "nearest" in reason
    stream: Any = shares.switch(Phase.DECODE, split)
    assert (stream.name, stream.waited_for) == ("decode 48", ["decode shared"])
    assert shares.current(Phase.DECODE) is split
    assert shares.current(Phase.PREFILL) is shares.layouts[0]
    again: Any = shares.switch(Phase.DECODE, split)
    assert again is stream
    assert stream.waited_for == ["decode shared"]
    back: Any = shares.switch(Phase.DECODE, shares.layouts[0])
    assert back.waited_for == ["decode 48"]


def test_a_part_is_the_least_that_is_enough_whatever_the_other_phases_have() -> None:
    shares = shares_of(FakeContexts())
    for phase in PHASES:
        sizes = sorted(live.layout.sm_count(phase) for live in shares.layouts)
        for share in (0.0, 0.3, 0.5, 0.65, sizes[1] / 132, 0.99, 1.0):
            found = shares.pick_part(phase, share).layout.sm_count(phase)
            assert found == next(size for size in sizes if size / 132 >= share - 1e-9)


def test_closing_gives_every_context_back_and_drops_what_was_kept() -> None:
    contexts = FakeContexts()
    shares = shares_of(contexts)
    shares.layouts[1].kept["graphs"] = {1: "a graph"}
    shares.close()
    assert contexts.alive == set()
    assert shares.layouts[1].kept == {}
    shares.close()


def test_a_device_that_is_too_small_is_refused_with_what_to_do() -> None:
    contexts = FakeContexts()
    contexts.groups = SmGroups(8, 3, 7)
    with pytest.raises(
        SharingUnsupported, match="31 SMs are too few for 2 parts of 16; lower least_sms, or use plain"
    ):
        shares_of(contexts)


# What a device can do.


def test_an_h100_can_do_both() -> None:
    assert report(FACTS) == [
        "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 SMs, driver 13.0",
        "green contexts: yes",
        "MPS: yes",
    ]


@pytest.mark.parametrize(
    ("facts", "green", "mps"),
    [
        (None, "sees no NVIDIA GPU", "sees no NVIDIA GPU"),
        (replace(FACTS, driver=12_020), "driver 12.2 has no green contexts; install 12.4", ""),
        (
            replace(FACTS, capability=(6, 1)),
            "6.1 is below 7.0; use plain streams",
            "6.1 is below 7.0; use plain streams",
        ),
        (replace(FACTS, bindings=""), "pip install cuda-bindings", ""),
        (replace(FACTS, mps_control=""), "", "not on the PATH; install the driver's compute utilities"),
        (replace(FACTS, is_mig=True), "MIG mode", "MIG mode"),
        (replace(FACTS, is_mig=None), "", ""),
        (replace(FACTS, capability=(12, 1)), "", ""),
    ],
)
def test_what_a_device_cannot_do_is_refused_with_what_to_do(
    facts: DeviceFacts | None, green: str, mps: str
) -> None:
    found = capability_of(facts)
    for refusal, text in ((found.green_contexts, green), (found.mps, mps)):
        assert (refusal is not None) is bool(text)
        assert text in str(refusal)


def test_a_percentage_of_mps_that_caps_green_contexts_is_noted() -> None:
    for value, is_noted in (("60", True), ("100", False), ("", False)):
        found = capability_of(replace(FACTS, environment={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": value}))
        assert found.green_contexts is None
        assert bool(found.notes) is is_noted
    assert (
        "client of the MPS daemon"
        in capability_of(replace(FACTS, environment={"CUDA_MPS_PIPE_DIRECTORY": "/x"})).notes[0]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_report_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("workers.device", run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["green contexts", "MPS"]
    assert all("sees no NVIDIA GPU; name one in CUDA_VISIBLE_DEVICES" in line for line in said)
