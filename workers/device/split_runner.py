"""Prompts and decodes of one model at the same time: a stream, captured steps and a runner for each phase of each layout of the SMs.

Weights and KV are those of the one process. Steps of one phase follow each other, also from one layout to the next; steps of the whole device
follow on all before them, and are followed by all after them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from phasewise_kernels.paged_attention.cuda import NUM_SEMAPHORES
from workers.api import Phase
from workers.device.forward import DeviceForward
from workers.device.sampler import DeviceSampler
from workers.device.sm_layouts import SmLayout
from workers.device.sm_share import LiveLayout, SmShares, close_shares
from workers.device.step_graph import MAX_PROMPTS, Side
from workers.engine.runner import BegunStep, ModelRunner
from workers.engine.running import SharedStep
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.model.llama import Llama
from workers.step_choice import Split

logger = logging.getLogger(__name__)

PHASES = (Phase.PREFILL, Phase.DECODE)
#: Layouts of a worker differ by so many groups of SMs: on an H100 they have 16, 40, 64, 88 and 112 for decodes.
STEP_GROUPS = 3
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class BegunBeside:
    """A step that runs on a stream of its own. Implements Begun."""

    step: BegunStep
    stream: torch.cuda.Stream

    @property
    def is_done(self) -> bool:
        """It has ended."""
        return self.step.is_done

    def result(self) -> StepResult:
        """Wait for it."""
        with _on(self.stream):
            return self.step.result()


class SplitRunner:
    """Implements OverlappingRunner and SplitRunner. whole: computes steps of both phases. Of one thread.

    shares: keep a ModelRunner for each phase of each layout. layout_bytes: memory of the device that these have taken.
    """

    def __init__(self, whole: ModelRunner, shares: SmShares, layout_bytes: Mapping[SmLayout, int]) -> None:
        self.layout_bytes = dict(layout_bytes)
        self._whole = whole
        self._shares = shares
        self._picked: dict[tuple[float, float], dict[Phase, LiveLayout]] = {}

    @property
    def layouts(self) -> tuple[SmLayout, ...]:
        """That steps may have, the shared one first."""
        return tuple(live.layout for live in self._shares.layouts)

    def close(self) -> None:
        """Wait for all streams and give them back, and close what computes steps of both phases."""
        self._picked.clear()
        self._whole.close()
        close_shares(self._shares)

    @property
    def may_overlap(self) -> bool:
        """See ModelRunner."""
        return self._whole.may_overlap

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        """See Runner."""
        return self.begin(plan, on_layers).result()

    def begin(self, plan: StepPlan, on_layers: Callable[[int, int], None], previous: Any = None) -> BegunStep:
        """See OverlappingRunner."""
        for phase in PHASES:
            stream = self._shares.current(phase).streams[phase]
            if isinstance(stream, torch.cuda.Stream):
                torch.cuda.current_stream().wait_stream(stream)
        return self._whole.begin(plan, on_layers, previous)

    def begin_beside(
        self,
        plan: StepPlan,
        on_layers: Callable[[int, int], None],
        previous: BegunBeside | None,
        phase: Phase,
        step: SharedStep,
    ) -> BegunBeside:
        """See SplitRunner in workers.engine.running. The layout is changed for this phase alone."""
        live = self._pick(step)[phase]
        stream = self._shares.switch(phase, live)
        if isinstance(stream, torch.cuda.Stream):
            # Blocks that came back from the host, and steps of both phases.
            stream.wait_stream(torch.cuda.current_stream())
        with _on(stream):
            try:
                before = previous.step if previous is not None else None
                begun: BegunStep = live.kept[phase].begin(plan, on_layers, before)
            except BaseException:
                # What was begun of it writes to blocks that are given to others now.
                stream.synchronize()
                raise
        return BegunBeside(begun, stream)

    def layout_name(self, step: SharedStep) -> str:
        """What `begin_beside` takes for it."""
        if not isinstance(step, Split):
            return f"{step.phase} alone"
        picked = self._pick(step)
        counts = ", ".join(f"{phase} {live.layout.sm_count(phase)}" for phase, live in picked.items())
        return f"split: {counts} SMs"

    def _pick(self, step: SharedStep) -> dict[Phase, LiveLayout]:
        """The nearest layout in which decode has no less than it is to have; a phase that is alone has all SMs.

        Of shares that are more than all together each phase has what is nearest for itself, so that the parts overlap.
        """
        if not isinstance(step, Split) or len(self._shares.layouts) == 1:
            return dict.fromkeys(PHASES, self._shares.layouts[0])
        wanted = step.prefill_share, step.decode_share
        if wanted not in self._picked:
            shares = dict(zip(PHASES, wanted, strict=True))
            if sum(wanted) > 1.0 + 1e-9:
                self._picked[wanted] = {
                    phase: self._shares.pick_part(phase, shares[phase]) for phase in PHASES
                }
            else:
                self._picked[wanted] = dict.fromkeys(PHASES, self._shares.pick(shares, keeps=Phase.DECODE)[0])
        return self._picked[wanted]


def open_split(
    whole: ModelRunner,
    model: Llama,
    kv_cache: torch.Tensor,
    shares: SmShares,
    *,
    max_context_tokens: int,
    decode_buckets: Sequence[int],
    prefill_buckets: Sequence[int],
    progress: Progress,
) -> SplitRunner:
    """Capture the decodes and the prompts of all layouts, each on its own stream; whoever opened `shares` closes them. prefill_buckets: tokens of steps of prompts."""
    semaphores = {
        phase: torch.zeros(NUM_SEMAPHORES, dtype=torch.int32, device=model.device) for phase in PHASES
    }
    buckets: dict[Phase, tuple[Sequence[int], Sequence[int]]] = {
        Phase.DECODE: (decode_buckets, ()),
        # More prompts than that in one step are computed without a graph.
        Phase.PREFILL: ((MAX_PROMPTS,), prefill_buckets),
    }
    if model.device.type == "cuda":
        # Streams of layouts wait for nothing that was put on another one before.
        torch.cuda.synchronize(model.device)
    layout_bytes: dict[SmLayout, int] = {}
    for i, live in enumerate(shares.layouts, 1):
        shown = partial(_shown, progress, f"layout {i} of {len(shares.layouts)}: ")
        free_bytes = _free_bytes(model.device)
        for phase in PHASES:
            sizes, mixed_sizes = buckets[phase]
            forward = DeviceForward(
                model,
                kv_cache,
                max_context_tokens=max_context_tokens,
                buckets=sizes,
                mixed_buckets=mixed_sizes,
                side=Side(live.layout.sm_count(phase), semaphores[phase]),
            )
            with _on(live.streams[phase]):
                forward.capture(shown)
            live.kept[phase] = whole.beside(forward, DeviceSampler(model.device))
        layout_bytes[live.layout] = free_bytes - _free_bytes(model.device)
        logger.info("layout_captured layout=%s num_bytes=%d", live.layout, layout_bytes[live.layout])
    return SplitRunner(whole, shares, layout_bytes)


def _shown(progress: Progress, where: str, what: str, done: float) -> None:
    progress(where + what, done)


def _free_bytes(device: torch.device) -> int:
    """Of the device, 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _on(stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
    """Work is put there. A stand-in for a stream, on a CPU, has nothing of that."""
    return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext()
