"""What a step costs without a model; run by scheduler_step.py. Nothing here says how long it may take."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.engine_without_model import BLOCK_SIZE, TOKEN_ID, decoding_engine, step_loop
from workers.engine.block_pool import BlockPool
from workers.engine.step_result import StepResult

NUM_SEQUENCES = (16, 64, 256)
NUM_WARM_UP = 50

each_size = pytest.mark.parametrize("num_sequences", NUM_SEQUENCES)


@each_size
def test_step(benchmark: BenchmarkFixture, num_sequences: int, num_steps: int) -> None:
    """All that the loop does in a step: expire, schedule, complete, counters, outputs."""
    engine = decoding_engine(num_sequences, NUM_WARM_UP + num_steps)
    loop = step_loop(engine)
    benchmark.pedantic(loop.step, rounds=num_steps, warmup_rounds=NUM_WARM_UP)  # type: ignore[no-untyped-call]
    assert engine.num_running == num_sequences
    engine.check_invariants()


@each_size
def test_schedule_and_complete(benchmark: BenchmarkFixture, num_sequences: int, num_steps: int) -> None:
    """The decisions alone."""
    engine = decoding_engine(num_sequences, NUM_WARM_UP + num_steps)
    result = StepResult([TOKEN_ID] * num_sequences)

    def decide() -> None:
        plan = engine.schedule(1.0)
        assert plan is not None
        engine.complete(plan, result, 1.0)

    benchmark.pedantic(decide, rounds=num_steps, warmup_rounds=NUM_WARM_UP)  # type: ignore[no-untyped-call]
    engine.take_outputs()
    engine.check_invariants()


@each_size
def test_block_pool(benchmark: BenchmarkFixture, num_sequences: int, num_steps: int) -> None:
    """A block for each sequence, taken and given back."""
    pool = BlockPool(num_sequences * 4, BLOCK_SIZE)

    def take_and_free() -> None:
        pool.free(pool.allocate(num_sequences))

    benchmark.pedantic(take_and_free, rounds=num_steps, warmup_rounds=NUM_WARM_UP)  # type: ignore[no-untyped-call]
    pool.check_invariants()
