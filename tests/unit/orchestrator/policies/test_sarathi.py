"""How large steps may be. The batches that Sarathi-Serve's algorithm packs are tested where they are packed: workers/test_scheduler.py."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.policies.sarathi import best_prompt_ratio, max_batch, token_budget
from workers.latency_model import LatencyModel
from workers.step_shape import StepShape, chunk, decodes

H100 = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"])


def test_golden_ratio_of_prompt_to_output() -> None:
    assert best_prompt_ratio(256, 18) == pytest.approx(15.06, abs=0.005)
    assert best_prompt_ratio(256, 1) == math.inf


def test_a_batch_is_what_fits_beside_the_model() -> None:
    sizes = {"model_bytes": 26e9, "max_tokens": 1024, "kv_token_bytes": 819_200}
    # LLaMA-13B's 26 GB and 0.8 MB a token, on 48 GB.
    assert max_batch(device_bytes=48e9, **sizes) == 26
    assert max_batch(device_bytes=24e9, **sizes) == 0


def budget(step_s: object = H100.step_s, target_s: float = 0.05, **options: int) -> int | None:
    given = {"num_decodes": 32, "context_tokens": 2048, "max_prompt_tokens": 8192, **options}
    return token_budget(step_s, target_s=target_s, **given)  # type: ignore[arg-type]


def test_the_budget_is_the_largest_multiple_that_keeps_the_target() -> None:
    def step_s(step: StepShape) -> float:
        return step.num_tokens * 1e-4

    assert budget(step_s, 0.0512) == 512
    assert budget(step_s, 0.0511) == 384
    assert budget(step_s, 0.0512, multiple=64) == 512
    assert budget(step_s, 0.0127) is None
    assert budget(step_s, 9.0) == 4096
    # A smaller step that is slower, by an unlucky tile, makes every larger budget unsafe.
    assert budget(lambda step: 1.0 if step.num_tokens == 256 else 0.0) == 128


def test_a_step_has_all_decodes_and_the_end_of_the_longest_prompt() -> None:
    seen: list[StepShape] = []

    def step_s(step: StepShape) -> float:
        seen.append(step)
        return 0.0

    budget(step_s, most=256)
    assert seen == [decodes(32, 32 * 2048) + chunk(size, 8192 - size) for size in (96, 224)]
    # Decodes are never cut: the first budget is the first that leaves room for a chunk.
    seen.clear()
    budget(step_s, num_decodes=200, most=256)
    assert [step.num_tokens for step in seen] == [256]
    # A budget of several prompts.
    seen.clear()
    budget(step_s, num_decodes=0, max_prompt_tokens=100, most=256)
    assert seen[-1] == chunk(100) + chunk(100) + chunk(56, 44)


def test_what_attends_to_more_has_a_smaller_budget() -> None:
    early, late = budget(max_prompt_tokens=4096), budget(max_prompt_tokens=131_072)
    assert early is not None
    assert late is not None
    assert late < early


@given(st.floats(0.005, 0.5), st.floats(0, 0.2), st.integers(0, 256), st.integers(128, 65_536))
def test_a_looser_target_never_has_a_smaller_budget(
    target_s: float, more_s: float, num_decodes: int, max_prompt: int
) -> None:
    tight = budget(target_s=target_s, num_decodes=num_decodes, max_prompt_tokens=max_prompt)
    loose = budget(target_s=target_s + more_s, num_decodes=num_decodes, max_prompt_tokens=max_prompt)
    assert (loose or 0) >= (tight or 0)
    if tight is not None:
        assert tight % 128 == 0
        assert num_decodes < tight <= 4096
