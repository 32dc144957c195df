"""Split steps with the engine's own code on a CPU, whose streams are stand-ins."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.contract.split_contract import NUM_TOKENS, SOME, Make, SplitContract
from tests.support.device_engine import TINY, DeviceEngine, greedy, random_weights
from tests.support.split_shares import fake_shares
from workers.api import SamplingParams
from workers.device.forward import DeviceForward
from workers.device.sampler import DeviceSampler
from workers.engine.runner import ModelRunner
from workers.model.llama import Llama

BUCKETS = (2, 8)


@pytest.fixture(scope="module")
def model() -> Llama:
    config = replace(TINY, max_context_tokens=128)
    return Llama(config, random_weights(config))


@pytest.fixture(scope="module")
def expected(model: Llama) -> list[list[int]]:
    return DeviceEngine(model, buckets=None).serve(SOME, greedy(NUM_TOKENS))


def test_steps_of_several_ranks_are_not_split(model: Llama) -> None:
    kv_cache = torch.zeros(model.kv_cache_shape(4, 16))
    runner = ModelRunner(model, kv_cache, 16, followers=object())
    forward = DeviceForward(model, kv_cache, max_context_tokens=64)
    with pytest.raises(ValueError, match="steps of several ranks are not split"):
        runner.beside(forward, DeviceSampler(model.device))


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
