"""The SMs of a GPU divided among phases of one process: layouts made once at start, each with a stream for each phase.

To switch is to put the next work of a phase on the stream of another layout, at that phase's own boundary; the other phases stay
where they are until theirs, so for a moment SMs may be in two parts or in none (Nexus, section 2.5, asynchronous switching).
Beside the disjoint layouts there is always the shared one: plain streams on all SMs, decode at the highest priority.

What the next work uses may have been written on the stream before: `SmShares.switch` orders the two.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from workers.api import Phase
from workers.device.capability import capability_of
from workers.device.device_facts import device_facts
from workers.device.green_contexts import GreenContext, GreenContextError, GreenContexts
from workers.device.sm_check import PartCheck
from workers.device.sm_layouts import (
    LEAST_SMS,
    SmGroups,
    SmLayout,
    SmPart,
    choose,
    layout_table,
    shared_layout,
)
from workers.errors import SharingUnsupported

logger = logging.getLogger(__name__)

#: Of plain streams; lower goes first.
PRIORITIES = {Phase.DECODE: -2, Phase.ENCODE: -1, Phase.PREFILL: 0}
#: Says what is wrong with parts whose streams these are; empty when they compute as they should.
Check = Callable[[Sequence[torch.cuda.Stream]], str]


class Contexts(Protocol):
    """What `GreenContexts` does."""

    groups: SmGroups

    def make(self, part: SmPart) -> GreenContext: ...
    def destroy(self, context: GreenContext) -> None: ...


@dataclass(slots=True)
class LiveLayout:
    """A layout that can be used. kept: what belongs to it and to nobody here, as an engine's decode graphs, which are bound to
    the context that they were captured in; it is dropped when the layout is closed.
    """

    layout: SmLayout
    streams: Mapping[Phase, torch.cuda.Stream]
    kept: dict[str, Any] = field(default_factory=dict)


class SmShares:
    """All layouts of one GPU; made by `open_sm_shares` or `plain_streams`. Of one thread.

    layouts: the shared one first. dropped: layouts that did not compute as they should, and why.
    """

    def __init__(self, layouts: Sequence[LiveLayout], dropped: Sequence[tuple[SmLayout, str]] = ()) -> None:
        self.layouts = tuple(layouts)
        self.dropped = tuple(dropped)
        self._current = dict.fromkeys(self.layouts[0].streams, self.layouts[0])
        self._contexts: Contexts | None = None
        self._made: list[GreenContext] = []

    def pick(self, shares: Mapping[Phase, float], *, keeps: Phase) -> tuple[LiveLayout, str]:
        """The layout for these shares, and why; see sm_layouts.choose. Raises ValueError."""
        choice = choose([one.layout for one in self.layouts], shares, keeps=keeps)
        return next(one for one in self.layouts if one.layout == choice.layout), choice.reason

    def pick_part(self, phase: Phase, share: float) -> LiveLayout:
        """Where this phase has the least that is no less than its share, of 0 to 1; parts of other phases may overlap it."""
        enough = [one for one in self.layouts if one.layout.sm_share(phase) >= share - 1e-9]
        return min(enough, key=lambda one: one.layout.sm_count(phase))

    def switch(self, phase: Phase, to: LiveLayout) -> torch.cuda.Stream:
        """The stream on which the phase goes on, after all that its stream before was given."""
        before, after = self._current[phase].streams[phase], to.streams[phase]
        if before is not after:
            after.wait_stream(before)
            self._current[phase] = to
        return after

    def current(self, phase: Phase) -> LiveLayout:
        """Where the phase is."""
        return self._current[phase]

    def close(self) -> None:
        """Wait for all streams, and give the contexts back. Closing twice does nothing."""
        for live in self.layouts:
            for stream in live.streams.values():
                stream.synchronize()
        # Not before: what runs uses it.
        for live in self.layouts:
            live.kept.clear()
        if self._contexts is not None:
            for context in self._made:
                self._contexts.destroy(context)
        self._made.clear()

    def _own(self, contexts: Contexts, made: list[GreenContext]) -> None:
        self._contexts, self._made = contexts, made


def close_shares(shares: SmShares) -> None:
    """A GPU that has failed takes nothing back, and whoever closes is to end all the same."""
    try:
        shares.close()
    except (RuntimeError, GreenContextError) as error:
        logger.warning("layouts_not_closed reason=%s", error)


def plain_streams(device_index: int, phases: Sequence[Phase]) -> SmShares:
    """Only the shared layout: what there is where a GPU cannot be divided."""
    num_sms = torch.cuda.get_device_properties(device_index).multi_processor_count
    return SmShares([_shared(device_index, num_sms, phases)])


def open_sm_shares(
    device_index: int,
    phases: Sequence[Phase],
    *,
    least_sms: int = LEAST_SMS,
    step_groups: int = 2,
) -> SmShares:
    """The shared layout and every disjoint one, for two or three phases; each has computed a product rightly.

    least_sms, step_groups: see sm_layouts.layout_table. Raises SharingUnsupported with what to do.
    """
    refusal = capability_of(device_facts(device_index)).green_contexts
    if refusal is not None:
        raise SharingUnsupported("green contexts", refusal.problem, refusal.remedy)
    try:
        contexts = GreenContexts(device_index)
    except GreenContextError as error:
        raise SharingUnsupported("green contexts", str(error), "use plain streams") from error
    shared = _shared(device_index, contexts.groups.num_sms, phases)
    with PartCheck(device_index) as check:
        return divide(contexts, shared, phases, check.problem, least_sms=least_sms, step_groups=step_groups)


def divide(
    contexts: Contexts,
    shared: LiveLayout,
    phases: Sequence[Phase],
    check: Check,
    *,
    least_sms: int,
    step_groups: int,
) -> SmShares:
    """What `open_sm_shares` does, with contexts and a check of any kind."""
    table = layout_table(contexts.groups, phases, least_sms=least_sms, step_groups=step_groups)
    if not table:
        problem = f"{contexts.groups.num_sms} SMs are too few for {len(phases)} parts of {least_sms}"
        raise SharingUnsupported("green contexts", problem, "lower least_sms, or use plain streams")
    live, dropped, made = [shared], list[tuple[SmLayout, str]](), list[GreenContext]()
    for layout in table:
        found = _make(contexts, layout, check)
        if isinstance(found, str):
            logger.warning("sm_layout_dropped layout=%s reason=%s", layout, found)
            dropped.append((layout, found))
        else:
            made += found
            streams = {part.phase: context.stream for part, context in zip(layout.parts, found, strict=True)}
            live.append(LiveLayout(layout, streams))
    shares = SmShares(live, dropped)
    shares._own(contexts, made)
    return shares


def _make(contexts: Contexts, layout: SmLayout, check: Check) -> list[GreenContext] | str:
    """Its contexts, or what is wrong with it, and then nothing of it is left."""
    made: list[GreenContext] = []
    problem = ""
    try:
        for part in layout.parts:
            made.append(contexts.make(part))
            if made[-1].num_sms != part.num_sms:
                problem = f"{part.phase} was to have {part.num_sms} SMs and has {made[-1].num_sms}"
        problem = problem or check([context.stream for context in made])
    except GreenContextError as error:
        problem = str(error)
    if not problem:
        return made
    for context in made:
        contexts.destroy(context)
    return problem


def _shared(device_index: int, num_sms: int, phases: Sequence[Phase]) -> LiveLayout:
    return LiveLayout(
        shared_layout(num_sms, phases), {phase: _plain_stream(device_index, phase) for phase in phases}
    )


def _plain_stream(device_index: int, phase: Phase) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index, priority=PRIORITIES[phase])  # type: ignore[no-untyped-call]
