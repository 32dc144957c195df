"""When prompts and decodes are computed side by side, and what a device did for how long."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers.api import BlockCounts, Phase, PhaseWork
from workers.device.sm_layouts import SmGroups, layout_table, shared_layout
from workers.engine.sharing import Load, PredictedSharing, SharingLog, layouts_of, predicted_sharing
from workers.latency_model import LatencyModel
from workers.step_choice import Head, Layout, Mixed, Split
from workers.step_cost import StepCost
from workers.step_shape import Contention, FactorSource, StepCosts

H100 = DEVICES["h100"]
PHASES = (Phase.PREFILL, Phase.DECODE)
BLOCKS = BlockCounts(free=1, cached=0, in_use=0, leased=0, total=1)
#: Every layout of an H100 that green contexts can make.
LAYOUTS = layouts_of(H100, [sms / 132 for sms in range(16, 120, 8)])


def latency(num_steps: int = 100, source: FactorSource = FactorSource.FITTED) -> LatencyModel:
    costs = StepCosts(MODELS["llama-3-8b"], H100, (1.0, 1.0, 1.0, 1.0), num_steps, 0.05, 1.1, source)
    return LatencyModel.fitted(costs)


def load(num: int, context: int, left: int = 5000, planned_s: float = 0.0285) -> Load:
    work = PhaseWork(num_decoding=num, decode_context=context)
    return Load(work, BLOCKS, Head(0, left, 0, math.inf, math.inf), lambda: planned_s)


@given(
    num=st.integers(1, 384),
    context=st.integers(1, 400_000),
    left=st.integers(0, 20_000),
    planned_s=st.one_of(st.floats(0.005, 0.2), st.just(math.inf)),
)
@example(num=218, context=365_588, left=2048, planned_s=0.0364)
def test_on_an_h100_no_step_is_split_that_leaves_prompts_much_time(
    num: int, context: int, left: int, planned_s: float
) -> None:
    """Decodes alone would take up to 62 % of it; the least for which a split was found is 68 %."""
    assume(StepCost.of(latency()).step_s(num, context) <= 0.62 * planned_s)
    sharing = PredictedSharing(latency(), LAYOUTS, 2048)
    assert isinstance(sharing.step(0.0, load(num, context, left, planned_s)), Mixed)


def test_on_an_h100_a_step_may_be_split_that_leaves_prompts_little_time() -> None:
    sharing = PredictedSharing(latency(), LAYOUTS, 2048)
    assert isinstance(sharing.step(0.0, load(218, 365_588, 2048, 0.03275)), Split)


def test_a_split_is_taken_where_prompts_get_further_in_it() -> None:
    for model in (latency(), latency(0, FactorSource.PROFILE)):
        sharing = PredictedSharing(model, (Layout(0.8, 0.2, 0.95, 0.9),), 2048)
        assert sharing.step(0.0, load(64, 64_000)) == Split(0.8, 0.2, 2048, 0)


@pytest.mark.parametrize(
    ("source", "num", "left"),
    [(FactorSource.ROOFLINE, 64, 5000), (FactorSource.PROFILE, 0, 5000), (FactorSource.PROFILE, 64, 0)],
    ids=["new", "no decodes", "no prompts"],
)
def test_there_is_nothing_to_split(source: FactorSource, num: int, left: int) -> None:
    sharing = PredictedSharing(latency(3, source), (Layout(0.8, 0.2, 0.95, 0.9),), 2048)
    assert isinstance(sharing.step(0.0, load(num, 1000 * num, left)), Mixed)


def test_layouts_have_the_speeds_of_the_devices_curves_beside_another_stream() -> None:
    (found,) = layouts_of(H100, [72 / 132])
    assert found.prefill_share + found.decode_share == pytest.approx(1)
    assert found.decode_rate == pytest.approx(0.79 / 1.12)
    # 60 SMs are three quarters of the way from 48 to 64.
    assert found.prefill_rate == pytest.approx((343 + 0.75 * (442 - 343)) / 767 / 1.5)


def test_the_shared_layout_is_not_chosen() -> None:
    """Also where neither phase slows the other down."""
    table = (shared_layout(132, PHASES), *layout_table(SmGroups(8, 15, 12), PHASES, step_groups=3))
    free = replace(H100, compute_curve=((0.01, 1.0),), memory_curve=((0.01, 1.0),), contention=Contention())
    model = LatencyModel.fitted(replace(latency().costs(), device=free))
    step = predicted_sharing(model, table, 2048).step(0.0, load(64, 64_000))
    assert isinstance(step, Split)
    assert step.prefill_share + step.decode_share == pytest.approx(1)
    assert isinstance(predicted_sharing(model, table[:1], 2048).step(0.0, load(64, 64_000)), Mixed)


def test_what_a_device_did_for_how_long() -> None:
    log = SharingLog()
    for now_s, name in (
        (0.0, None),
        (1.0, "a"),
        (2.0, "a"),
        (4.0, "b"),
        (5.0, None),
        (9.0, "b"),
        (10.0, "a"),
        (11.0, "a"),
    ):
        log.note(now_s, name)
    # Of what it does still: until it was said last.
    assert log.seconds == {"a": 4.0, "b": 2.0}
    log.note(12.0, None)
    assert log.seconds == {"a": 5.0, "b": 2.0}
    assert log.num_switches == 2
