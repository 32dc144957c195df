"""Prompts and decodes of one engine at the same time on a GPU: what is promised in tests/contract/split_contract.py, and that neither
keeps the other from going on."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.contract.split_contract import NUM_TOKENS, SOME, Make, SplitContract
from tests.support.device_engine import TINY, DeviceEngine, greedy, random_weights
from tests.support.split_shares import HALVES
from workers.api import Phase, SamplingParams
from workers.device.sm_share import SmShares, open_sm_shares, plain_streams
from workers.model.llama import Llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PHASES = (Phase.PREFILL, Phase.DECODE)
BUCKETS = (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@cache
def on_cpu() -> DeviceEngine:
    return DeviceEngine(Llama(TINY, random_weights(TINY)), buckets=None)


@cache
def on_gpu() -> Llama:
    return Llama(TINY, random_weights(TINY, device="cuda"))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return on_cpu().serve(SOME, greedy(NUM_TOKENS))


class OnGpu(SplitContract):
    @pytest.fixture
    def make(self, shares: SmShares) -> Make:
        def made(sharing: object, **options: object) -> DeviceEngine:
            sizes = {"buckets": BUCKETS, "mixed_buckets": (16, 32, 64)}
            return DeviceEngine(on_gpu(), sharing=sharing, shares=shares, **sizes, **options)

        return made

    @pytest.fixture
    def wanted_of(self) -> Callable[[Callable[[int], SamplingParams]], object]:
        return lambda sampling: on_cpu().serve(SOME, sampling)


@pytest.fixture(scope="module")
def disjoint_sms() -> Iterator[SmShares]:
    opened = open_sm_shares(0, PHASES, least_sms=32, step_groups=4)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared_sms() -> Iterator[SmShares]:
    opened = plain_streams(0, PHASES)
    yield opened
    opened.close()


class TestDisjointSms(OnGpu):
    @pytest.fixture
    def shares(self, disjoint_sms: SmShares) -> SmShares:
        return disjoint_sms


class TestSharedSms(OnGpu):
    num_kinds = 2

    @pytest.fixture
    def shares(self, shared_sms: SmShares) -> SmShares:
        return shared_sms


def test_decodes_end_while_a_prompt_is_computed() -> None:
    """By the order of completions: the prompt's stream is held back behind the first piece until ten decode steps have ended."""
    shares = open_sm_shares(0, PHASES, least_sms=32, step_groups=4)
    made = DeviceEngine(
        on_gpu(), sharing=AlwaysHalves(), shares=shares, buckets=BUCKETS, mixed_buckets=(16, 32, 64)
    )
    assert made.split is not None
    live, _ = shares.pick({Phase.PREFILL: 0.5, Phase.DECODE: 0.5}, keeps=Phase.DECODE)
    order: list[str] = []
    complete = made.engine.complete

    def noted(plan, result, now_s) -> None:
        order.append("prefill" if plan.chunks else "decode")
        complete(plan, result, now_s)

    made.engine.complete = noted
    first = made.serve(SOME[:1], greedy(30))
    assert len(first[0]) == 30
    order.clear()
    # The stream of prompts is busy for long, by whatever: decodes of another sequence go on all the while.
    begin = made.split.begin_beside

    def held_back(plan, on_layers, previous, phase, step):
        if phase is Phase.PREFILL and "decode" in order:
            with torch.cuda.stream(live.streams[Phase.PREFILL]):
                torch.cuda._sleep(2_000_000_000)
        return begin(plan, on_layers, previous, phase, step)

    made.split.begin_beside = held_back
    made.serve((SOME[0], SOME[3]), greedy(30), steps_between=8)
    late = order.index("prefill", order.index("decode"))
    assert order[:late].count("decode") >= 10, order
    shares.close()


class AlwaysHalves:
    """Implements Sharing."""

    def step(self, *_: object) -> object:
        return HALVES
