"""Short ways to make what an engine is given, and a runner without a model."""

from collections.abc import Callable

from workers.api import (
    BlockCounts,
    EngineConfig,
    Handoff,
    KvLedger,
    LedgerKind,
    Phase,
    PhaseSet,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
)
from workers.engine.engine import Engine
from workers.engine.messages import Output, TokensDecoded
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.latency_model import LatencyModel
from workers.step_shape import DeviceShape, FactorSource, ModelShape, StepCosts

PREFILL = frozenset({Phase.PREFILL})
DECODE = frozenset({Phase.DECODE})
BOTH = PREFILL | DECODE
STOP_TOKEN = 7
#: Every prompt begins alike here, and nobody is to be preempted but where a test is about that.
CONFIG = EngineConfig(
    block_size=4,
    token_budget=16,
    max_running_sequences=4,
    max_waiting_requests=6,
    kv_cache_bytes=0,
    growth_reserve=1.0,
    is_prefix_cache_on=False,
)
CLAIM_S = 5.0
#: 10 ms a step and 1 ms a token; attending costs next to nothing.
STEP_MODEL = ModelShape("m", 1_000_000, 0, 4.0, 1, 16, 64)
STEP_DEVICE = DeviceShape("cpu", 2e9, 1e15, 1e15, 0.01, 1e9, 1e9, is_reading_hidden=False)


def learnt(
    num_steps: int = 100, mean_error: float = 0.0, source: FactorSource = FactorSource.FITTED
) -> LatencyModel:
    """A latency model that has seen so many such steps, and was so far off."""
    costs = StepCosts(STEP_MODEL, STEP_DEVICE, (1.0, 1.0, 1.0, 1.0), num_steps, mean_error, 1.1, source)
    return LatencyModel.fitted(costs)


def make_engine(
    phases: PhaseSet = BOTH,
    *,
    config: EngineConfig = CONFIG,
    num_blocks: int = 16,
    max_context_tokens: int = 64,
    latency: LatencyModel | None = None,
) -> Engine:
    return Engine(
        config,
        phases,
        num_blocks=num_blocks,
        max_context_tokens=max_context_tokens,
        claim_s=CLAIM_S,
        latency=latency,
    )


def key(name: str, attempt: int = 1) -> RequestKey:
    return RequestKey(RequestId(name), attempt)


def submit(
    name: str = "r1",
    phases: PhaseSet = BOTH,
    *,
    num_prompt: int = 5,
    max_new: int = 3,
    timeout_s: float = 60.0,
    transfer_id: str | None = None,
    attempt: int = 1,
) -> Submit:
    """With a hand-off exactly when the phases are only one; its transfer is named like the request."""
    handoff = None
    if phases != BOTH or transfer_id is not None:
        address, incarnation = ("d:1", 3) if phases == PREFILL else ("", 0)
        handoff = Handoff(transfer_id or f"t-{name}", address, incarnation)
    return Submit(
        key(name, attempt),
        phases,
        tuple(range(100, 100 + num_prompt)),
        SamplingParams(max_new, stop_token_ids=frozenset({STOP_TOKEN})),
        timeout_s,
        handoff,
    )


def run_step(engine: Engine, now_s: float, token_id: int | Callable[[int], int] = 50) -> StepPlan | None:
    """One step in which every slice yields this token, or this function of its index; checks the engine."""
    plan = engine.schedule(now_s)
    if plan is None:
        return None
    num_tokens = sum(part.yields_token for part in plan.slices)
    choose = token_id if callable(token_id) else lambda _index: token_id
    engine.complete(plan, StepResult([choose(i) for i in range(num_tokens)]), now_s)
    engine.check_invariants()
    return plan


def outputs_of(engine: Engine, *kinds: type) -> list[Output]:
    """What has come out since the last look, of these kinds alone when any is named."""
    outputs = expanded(engine.take_outputs())
    return [output for output in outputs if not kinds or isinstance(output, kinds)]


def expanded(outputs: list[Output]) -> list[Output]:
    """With an event for each request in place of TokensDecoded."""
    each = [output.events() if isinstance(output, TokensDecoded) else [output] for output in outputs]
    return [output for some in each for output in some]


def assert_ledger(engine: Engine, now_s: float) -> KvLedger:
    """The ledger accounts for every block, and agrees with the pool's own counts."""
    ledger = engine.ledger(now_s)
    assert ledger.leaked_block_ids == ()
    num_blocks = dict.fromkeys(LedgerKind, 0)
    for entry in ledger.entries:
        assert entry.age_s is None or entry.age_s >= 0, entry
        num_blocks[entry.kind] += entry.num_blocks - entry.num_shared_blocks
    counts = engine.block_counts()
    leased = (LedgerKind.SENDING, LedgerKind.RECEIVING, LedgerKind.UNCLAIMED)
    found = BlockCounts(
        free=num_blocks[LedgerKind.FREE],
        cached=num_blocks[LedgerKind.CACHED],
        in_use=num_blocks[LedgerKind.SEQUENCE],
        leased=sum(num_blocks[kind] for kind in leased),
        total=ledger.num_accounted_blocks,
    )
    assert found == counts == ledger.counts
    return ledger


def assert_empty(engine: Engine) -> None:
    """Nothing runs, waits or holds a block."""
    engine.check_invariants()
    ledger = engine.ledger(0.0)
    assert {entry.kind for entry in ledger.entries} == {LedgerKind.CACHED, LedgerKind.FREE}, ledger
    counts = engine.block_counts()
    assert counts.free + counts.cached == counts.total, counts
    assert (engine.num_leases, engine.num_running, engine.num_waiting) == (0, 0, 0)


class FakeRunner:
    """Every slice that yields a token yields `token_id`; raises `failure` when there is one."""

    def __init__(self, token_id: int = 50, num_layers: int = 2) -> None:
        self.token_id = token_id
        self.failure: Exception | None = None
        self.plans: list[StepPlan] = []
        self._num_layers = num_layers

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        self.plans.append(plan)
        if self.failure is not None:
            raise self.failure
        for layer in range(self._num_layers):
            on_layers(layer, layer + 1)
        return StepResult([self.token_id for part in plan.slices if part.yields_token])
