"""An engine in which so many sequences decode, and a runner that gives every one the same token at once."""

from collections.abc import Callable

from workers.api import EngineConfig, Phase, RequestId, RequestKey, SamplingParams, Submit
from workers.engine.engine import Engine
from workers.engine.step_loop import StepLoop
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 64
TOKEN_ID = 1
PHASES = frozenset({Phase.PREFILL, Phase.DECODE})


class NoModel:
    """All that a step costs is the engine's own."""

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        del on_layers
        num_tokens = len(plan.decodes) + sum(part.yields_token for part in plan.chunks)
        return StepResult([TOKEN_ID] * num_tokens)


def decoding_engine(num_sequences: int, num_steps: int) -> Engine:
    """All of these sequences decode, and will for more than `num_steps` steps.

    No two prompts begin alike, and they end at different places of a block: each step some sequences fill one
    and take another, as many as in every other step.
    """
    # Prefill takes a step or two, and the last token is never to be reached.
    max_new_tokens = num_steps + 8
    max_prompt_tokens = NUM_PROMPT_TOKENS + BLOCK_SIZE - 1
    max_tokens = max_prompt_tokens + max_new_tokens
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        token_budget=num_sequences * max_prompt_tokens,
        max_running_sequences=num_sequences,
        max_waiting_requests=num_sequences,
    )
    engine = Engine(
        config,
        PHASES,
        num_blocks=num_sequences * -(-max_tokens // BLOCK_SIZE),
        max_context_tokens=max_tokens,
        claim_s=30.0,
    )
    for i in range(num_sequences):
        submit = Submit(
            key=RequestKey(RequestId(f"request-{i}"), 1),
            phases=PHASES,
            token_ids=(3 + i, *range(1000, 999 + NUM_PROMPT_TOKENS + i % BLOCK_SIZE)),
            sampling=SamplingParams(max_new_tokens, stop_token_ids=frozenset({0, 2})),
            timeout_s=600.0 + i,
        )
        engine.handle(submit, 0.0)
    loop = step_loop(engine)
    loop.step()
    loop.step()
    assert engine.num_running == num_sequences
    assert engine.num_waiting == 0
    return engine


def step_loop(engine: Engine) -> StepLoop:
    """A loop whose time stands still and whose outputs go nowhere."""
    return StepLoop(engine, NoModel(), lambda _outputs: None, lambda _reason: None, clock=lambda: 1.0)
