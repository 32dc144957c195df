"""Split steps with the engine's own code on a CPU, whose streams are stand-ins."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.contract.split_contract import NUM_TOKENS, SOME, Make, SplitContract
from tests.support.device_engine import TINY, DeviceEngine, greedy, random_weights
from tests.support.split_shares import fake_shares
from workers.api import SamplingParams
from workers.model.llama import Llama

BUCKETS = (2, 8)


@pytest.fixture(scope="module")
def model() -> Llama:
    config = replace(TINY, max_context_tokens=128)
    return Llama(config, random_weights(config))


@pytest.fixture(scope="module")
def expected(model: Llama) -> list[list[int]]:
    return DeviceEngine(model, buckets=None).serve(SOME, greedy(NUM_TOKENS))


class TestFake(SplitContract):
    @pytest.fixture
    def make(self, model: Llama) -> Make:
        def made(sharing: object, **options: object) -> DeviceEngine:
            sizes = {"buckets": BUCKETS, "mixed_buckets": (32, 64)}
            return DeviceEngine(model, sharing=sharing, shares=fake_shares(), **sizes, **options)

        return made

    @pytest.fixture
    def wanted_of(self, model: Llama) -> Callable[[Callable[[int], SamplingParams]], object]:
        return lambda sampling: DeviceEngine(model, buckets=None).serve(SOME, sampling)
