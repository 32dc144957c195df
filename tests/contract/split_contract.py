"""What a device on which prompts and decodes run side by side does: its tokens are those of steps one after the other.

Used by test_split_contract_fake.py, without SMs, and by tests/gpu/test_split_gpu.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.device_engine import ENGINE, PROMPTS, DeviceEngine, greedy
from tests.support.split_shares import EVERY_KIND, HALVES, SHARED, Repeated
from workers.api import NgramDrafts, Phase, SamplingParams
from workers.step_choice import Exclusive, Step

SOME = PROMPTS[:6]
NUM_TOKENS = 16
#: A device engine that is split as this says, with these options.
Make = Callable[..., DeviceEngine]


class SplitContract:
    """make: a fixture, as is expected: the greedy tokens of SOME. num_kinds: of halves, shared SMs and decode alone, how many differ on the device."""

    num_kinds = 3

    @pytest.mark.parametrize(("steps", "steps_between"), [((HALVES,), 1), ((SHARED,), 0), (EVERY_KIND, 2)])
    def test_tokens_are_those_of_steps_one_after_the_other(
        self, make: Make, expected: list[list[int]], steps: tuple[Step, ...], steps_between: int
    ) -> None:
        made = make(Repeated(*steps, turns=3))
        assert made.serve(SOME, greedy(NUM_TOKENS), steps_between=steps_between) == expected
        assert any(name.startswith("split") for name in made.log.seconds)

    def test_preempted_sequences(self, make: Make, expected: list[list[int]]) -> None:
        config = replace(ENGINE, growth_reserve=0.0)
        made = make(Repeated(HALVES), num_blocks=10, config=config)
        assert made.serve(SOME, greedy(NUM_TOKENS)) == expected
        assert made.engine.num_preemptions > 0

    def test_prompts_from_the_prefix_cache(self, make: Make, expected: list[list[int]]) -> None:
        made = make(Repeated(HALVES), config=replace(ENGINE, is_prefix_cache_on=True))
        assert made.serve(SOME, greedy(NUM_TOKENS)) == expected
        assert made.serve(SOME, greedy(NUM_TOKENS), steps_between=1) == expected
        assert made.engine.reuse_counts().num_cached_tokens > 80

    def test_aborted_prompts_and_decodes(self, make: Make, expected: list[list[int]]) -> None:
        made = make(Repeated(HALVES), num_blocks=20)
        aborted = {2: 1, 5: 5, 9: 0}
        found = made.serve(SOME, greedy(NUM_TOKENS), steps_between=1, aborted=aborted)
        for i, (some, whole) in enumerate(zip(found, expected, strict=True)):
            assert some == (whole[: len(some)] if i in aborted.values() else whole)
        counts = made.engine.block_counts()
        assert counts.free == counts.total

    def test_drafts(self, make: Make, expected: list[list[int]]) -> None:
        made = make(Repeated(HALVES))

        def sampling(i: int) -> SamplingParams:
            return SamplingParams(NUM_TOKENS - i % 5, decoding=NgramDrafts(4) if i % 2 else None)

        assert made.serve(SOME, sampling, steps_between=1) == expected

    def test_tokens_that_are_chosen_on_the_host(self, make: Make, wanted_of: Callable[..., object]) -> None:
        def sampling(i: int) -> SamplingParams:
            if i % 3 == 0:
                return SamplingParams(12, repetition_penalty=1.5, num_logprobs=1)
            return SamplingParams(9 + i)

        made = make(Repeated(HALVES))
        assert made.serve(SOME, sampling, steps_between=1) == wanted_of(sampling)

    def test_a_layout_is_changed_by_each_phase_at_its_own_boundary(self, make: Make) -> None:
        made = make(Repeated(HALVES, SHARED, Exclusive(Phase.DECODE, 0), turns=2))
        made.serve(SOME, greedy(NUM_TOKENS), steps_between=2)
        assert len(made.log.seconds) >= self.num_kinds
        assert made.log.num_switches >= 4
