"""How the prompts and the decodes of an engine share its device, step by step. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.api import BlockCounts, Phase, PhaseWork
from workers.device.sm_layouts import SmLayout
from workers.latency_model import LatencyModel, rate_at
from workers.step_choice import Head, Layout, Mixed, Step, StepChoice
from workers.step_cost import StepCost
from workers.step_shape import DeviceShape, FactorSource


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine could compute next.

    head: of the prompts, those that are being computed included; num_left is 0 without any. planned_s: asks how long a step with its decodes
    is to be; infinity for no limit.
    """

    work: PhaseWork
    blocks: BlockCounts
    head: Head
    planned_s: Callable[[], float]


class Sharing(Protocol):
    """Chooses. Asked before each step that could begin."""

    def step(self, now_s: float, load: Load) -> Step:
        """What comes next. Of a mixed step the engine's scheduler says how many tokens it has."""
        ...


class PredictedSharing:
    """Side by side only where prompts are predicted to get further so than in mixed steps; see step_choice.py. Implements Sharing.

    latency: of steps on the whole device. layouts: that the device can make.
    """

    def __init__(self, latency: LatencyModel, layouts: Sequence[Layout], max_prefill_tokens: int) -> None:
        self._latency = latency
        self._layouts = tuple(layouts)
        self._max_tokens = max_prefill_tokens

    def step(self, _now_s: float, load: Load) -> Step:
        """See Sharing."""
        mixed, work = Mixed(self._max_tokens), load.work
        if self._latency.source is FactorSource.ROOFLINE or not work.num_decoding or not load.head.num_left:
            return mixed
        cost = StepCost.of(self._latency)
        choice = StepChoice(cost, self._max_tokens, 1, 0, layouts=self._layouts)
        return choice.split(work.num_decoding, work.decode_context, load.planned_s()) or mixed


def layouts_of(device: DeviceShape, decode_shares: Sequence[float]) -> tuple[Layout, ...]:
    """Disjoint divisions in which decode has these shares of the SMs, each above 0 and below 1, with the speeds that the device's curves say."""
    beside = device.contention
    return tuple(
        Layout(
            1 - share,
            share,
            rate_at(1 - share, device.compute_curve) / beside.compute,
            rate_at(share, device.memory_curve) / beside.memory,
        )
        for share in decode_shares
    )


def predicted_sharing(
    latency: LatencyModel, layouts: Sequence[SmLayout], max_prefill_tokens: int
) -> PredictedSharing:
    """By the curves of the device that the latency model is of. The shared layout is none that it chooses: two streams on all SMs take each other's."""
    shares = [one.sm_share(Phase.DECODE) for one in layouts if not one.is_shared]
    return PredictedSharing(latency, layouts_of(latency.device, shares), max_prefill_tokens)


class SharingLog:
    """What a device did for how long."""

    def __init__(self) -> None:
        #: Seconds, by name.
        self.seconds: dict[str, float] = {}
        #: From one that computes to another.
        self.num_switches = 0
        self._name: str | None = None
        self._since_s = 0.0
        self._last_layout: str | None = None

    def note(self, now_s: float, name: str | None) -> None:
        """From now on it does this; None is nothing. `seconds` are up to the last call."""
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now_s - self._since_s
        self._name, self._since_s = name, now_s
        if name is not None:
            self.num_switches += self._last_layout not in (None, name)
            self._last_layout = name
