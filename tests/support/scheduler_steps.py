"""A scheduler and its batch without an engine."""

import math
from dataclasses import replace
from typing import Any

from tests.support.engine_fakes import BOTH, CONFIG, submit
from workers.api import EngineConfig, PhaseSet
from workers.engine.batch import Batch
from workers.engine.block_pool import BlockPool
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.step_plan import StepPlan
from workers.latency_model import LatencyModel

MAX_BLOCKS = 4096


class Steps:
    """A scheduler and its batch, which a test fills by hand."""

    def __init__(
        self,
        config: EngineConfig = CONFIG,
        *,
        num_blocks: int = 100,
        attention_tokens: float = math.inf,
        latency: LatencyModel | None = None,
    ) -> None:
        self.config = config
        self.batch = Batch(config, BlockPool(num_blocks, config.block_size), MAX_BLOCKS)
        self.scheduler = Scheduler(config, self.batch, attention_tokens=attention_tokens, latency=latency)
        self.num_arrived = 0

    def wait(
        self,
        num_prompt: int,
        max_new: int = 3,
        phases: PhaseSet = BOTH,
        *,
        priority: int = 0,
        timeout_s: float = 60.0,
        **targets: Any,
    ) -> Sequence:
        """A request arrives, one second after the one before."""
        self.num_arrived += 1
        request = submit(phases=phases, num_prompt=num_prompt, max_new=max_new, timeout_s=timeout_s)
        sequence = Sequence.from_submit(
            replace(request, priority=priority, **targets),
            float(self.num_arrived),
            root=b"root",
            number=self.num_arrived,
        )
        self.batch.wait(sequence)
        return sequence

    def prefilling(self, num_prompt: int, num_computed: int, **options: Any) -> Sequence:
        """It has begun to run before."""
        sequence = self.wait(num_prompt, **options)
        self.batch.admit(sequence, self.batch.match(sequence))
        self.batch.grow(sequence, num_computed)
        sequence.num_computed_tokens = num_computed
        return sequence

    def decoding(self, num_prompt: int = 5, **options: Any) -> Sequence:
        """It has one token, which needs no new block."""
        sequence = self.prefilling(num_prompt, num_prompt, **options)
        sequence.append(50)
        self.batch.grow(sequence, num_prompt + 1)
        self.batch.move(sequence, SequenceState.DECODE)
        return sequence

    def plan(
        self, *, now_s: float = 0.0, num_places: int | None = None, arrived_until_s: float = math.inf
    ) -> StepPlan:
        places = self.config.max_running_sequences if num_places is None else num_places
        plan = self.scheduler.plan(now_s, num_places=places, arrived_until_s=arrived_until_s)
        self.batch.check_invariants()
        self.batch.pool.check_invariants()
        return plan

    def compute(self, plan: StepPlan, step_s: float = 0.0) -> None:
        """The step has run, and every prompt that ended got a token."""
        self.batch.pool.index.settle(self.batch.pool.index.pending)
        self.scheduler.observe(plan, step_s)
        for sequence in plan.decodes:
            sequence.num_computed_tokens = len(sequence.token_ids)
            sequence.append(50)
        for part in plan.chunks:
            part.sequence.num_computed_tokens = part.end
            if part.yields_token:
                part.sequence.append(50)
                self.batch.move(part.sequence, SequenceState.DECODE)
