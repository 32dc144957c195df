"""Seconds of a prompt at each worker, and routes by them."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.prefill_speed import (
    DEFAULT_BUDGET,
    PrefillSpeed,
    learnt_cost,
    most_learnt,
    prefill_speeds,
)
from orchestrator.control.router import LoadLedger, PromptLoad, Route, choose_route
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import Phase, PhaseSet, PhaseWork, WorkerId, WorkerState, WorkerStatus
from workers.latency_model import LatencyModel
from workers.step_cost import StepCost
from workers.step_shape import ENOUGH_STEPS, FactorSource, StepCosts

PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
BOTH = PREFILL | DECODE
LLAMA = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
COST = StepCost.of(LLAMA)

seconds = st.floats(0.0, 1.0)
speeds = st.builds(PrefillSpeed, seconds, seconds, seconds, seconds, seconds, seconds, st.integers(1, 4096))
numbers = st.integers(0, 10_000)


def costs(
    num_steps: int = ENOUGH_STEPS, slowness: float = 1.0, source: FactorSource = FactorSource.FITTED
) -> StepCosts:
    c0, c1, c2, c3 = (slowness * factor for factor in LLAMA.factors)
    return replace(LLAMA.costs(), factors=(c0, c1, c2, c3), num_steps=num_steps, source=source)


def worker(
    name: str, phases: PhaseSet = PREFILL, learnt: StepCosts | None = None, work: PhaseWork | None = None
) -> WorkerView:
    status = WorkerStatus(
        WorkerId(name), 1, phases, WorkerState.READY, step_costs=learnt, work=work or PhaseWork()
    )
    return WorkerView(WorkerId(name), 1, phases, LifecycleState.READY, f"{name}:1", status=status)


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", (*workers, worker("z-decode", DECODE)))


def route(seen: ClusterView, ledger: LoadLedger, prompt: PromptLoad, *, by_seconds: bool = True) -> Route:
    known = prefill_speeds(seen, {}) if by_seconds else None
    chosen = choose_route(seen, ledger, lambda _: True, prompt, known)
    assert isinstance(chosen, Route)
    return chosen


@given(speeds, numbers, numbers, numbers, st.integers(0, 300), numbers, st.integers(0, 50))
def test_more_that_waits_or_decodes_never_makes_a_worker_faster(
    speed: PrefillSpeed, waiting: int, new: int, before: int, num: int, more: int, more_sequences: int
) -> None:
    least = speed.prefill_s(waiting, new, before, num)
    assert speed.prefill_s(waiting + more, new, before, num) >= least * (1 - 1e-12)
    assert speed.prefill_s(waiting, new, before, num + more_sequences) >= least * (1 - 1e-12)


def test_a_prompt_that_fits_a_step_takes_that_step() -> None:
    speed = PrefillSpeed.of(COST, 512, mean_context=1000.0)
    assert speed.prefill_s(0, 100, 0, 0) == COST.prompt_s(100)
    assert speed.prefill_s(0, 100, 50, 3) == COST.step_s(3, 3000, 100, 100 * (50 + 101 / 2))
    # As many steps as the budget asks for, less what sequences take of it.
    whole = COST.step_s(12, 12_000, 500)
    assert abs(speed.prefill_s(4000, 1000, 0, 12) - 10 * whole - COST.pair_s * 1000 * 1001 / 2) < 1e-9


def test_a_worker_that_has_learnt_too_little_takes_what_the_most_learnt_one_has() -> None:
    too_little = costs(ENOUGH_STEPS - 1, 9.0, FactorSource.ROOFLINE)
    assert most_learnt(view(worker("a", learnt=too_little))) is None
    assert prefill_speeds(view(worker("a")), {}) is None
    seen = view(
        worker("a", learnt=too_little),
        worker("b"),
        worker("c", learnt=costs(50, 3.0)),
        worker("d", learnt=costs(60, 2.0)),
    )
    found = prefill_speeds(seen, {WorkerId("c"): 77})
    assert found is not None
    assert {name: round(one.token_s / COST.token_s) for name, one in found.items()} == {
        "a": 2,
        "b": 2,
        "c": 3,
        "d": 2,
    }
    assert (found[WorkerId("c")].budget_tokens, found[WorkerId("d")].budget_tokens) == (77, DEFAULT_BUDGET)


def test_a_profile_is_believed_before_the_first_step_and_a_fitted_model_more() -> None:
    profiled = worker("a", learnt=costs(0, 3.0, FactorSource.PROFILE))
    rooflines = [
        worker(name, learnt=costs(ENOUGH_STEPS - 1, 9.0, FactorSource.ROOFLINE)) for name in ("b", "c")
    ]
    found = prefill_speeds(view(profiled, *rooflines), {})
    assert found is not None
    assert {round(one.token_s / COST.token_s) for one in found.values()} == {3}
    found = prefill_speeds(view(profiled, worker("b", learnt=costs(ENOUGH_STEPS, 2.0)), rooflines[1]), {})
    assert found is not None
    assert [round(found[WorkerId(name)].token_s / COST.token_s) for name in "abc"] == [3, 2, 2]


def test_a_sequences_context_is_that_of_the_last_look() -> None:
    seen = view(worker("a", BOTH, costs(), PhaseWork(num_decoding=2, decode_context=600)), worker("b", BOTH))
    found = prefill_speeds(seen, {})
    assert found is not None
    assert [found[WorkerId(name)].sequence_s for name in "ab"] == [COST.context_s * 300] * 2


@given(st.lists(numbers, min_size=1, max_size=6), st.integers(1, 10_000))
def test_equal_workers_that_only_prefill_are_ordered_as_by_tokens(waiting: list[int], length: int) -> None:
    ledger = LoadLedger()
    for number, num_tokens in enumerate(waiting):
        ledger.add(WorkerId(f"p-{number}"), prefill_tokens=num_tokens)
    seen = view(*(worker(f"p-{number}", learnt=costs()) for number in range(len(waiting))))
    prompt = PromptLoad(length)
    found, by_tokens = route(seen, ledger, prompt), route(seen, ledger, prompt, by_seconds=False)
    assert found.prefill is by_tokens.prefill
    assert by_tokens.predicted is None
    assert found.predicted is not None
    assert 0.0 <= found.predicted.wait_s <= found.predicted.ttft_s


@given(numbers, st.integers(1, 10_000))
def test_of_two_workers_with_equal_loads_the_one_twice_as_fast_is_taken(waiting: int, length: int) -> None:
    ledger = LoadLedger()
    for name in ("a", "b"):
        ledger.add(WorkerId(name), prefill_tokens=waiting)
    seen = view(worker("a", learnt=costs(slowness=2.0)), worker("b", learnt=costs()))
    assert route(seen, ledger, PromptLoad(length)).prefill.worker_id == "b"


def test_equal_workers_whose_models_differ_by_a_little_share_what_comes() -> None:
    seen = view(worker("a", learnt=costs(slowness=1.04)), worker("b", learnt=costs()))
    found = route(seen, LoadLedger(), PromptLoad(1000, {}, {(WorkerId("b"), 1): 5}))
    assert found.prefill.worker_id == "a"
    assert (
        found.reason
        == "least loaded: a with 0 prompt tokens, z-decode with 0 sequences; first token in about 0.027 s"
    )


def test_long_contexts_that_decode_make_a_worker_slow() -> None:
    ledger = LoadLedger()
    for name in ("a", "b"):
        ledger.add(WorkerId(name), decode_sequences=20)
    long = PhaseWork(num_decoding=20, decode_context=20 * 30_000)
    short = PhaseWork(num_decoding=20, decode_context=20 * 100)
    seen = view(worker("a", BOTH, costs(), long), worker("b", BOTH, costs(), short))
    assert route(seen, ledger, PromptLoad(3000)).prefill.worker_id == "b"


#: Steps of decodes have few tokens, and nearly as many every time: a fit of them says anything of a token, as one on two busy cores did.
DECODED = replace(costs(300), factors=(1.0, 0.0, 3.0, 1.0))
PROMPTED = costs(ENOUGH_STEPS, 2.0, FactorSource.FITTED)


def test_what_a_token_of_a_prompt_takes_is_of_who_has_computed_prompts() -> None:
    seen = view(
        worker("a", BOTH, replace(DECODED, num_prompt_steps=ENOUGH_STEPS - 1)),
        worker("b", PREFILL, replace(PROMPTED, num_prompt_steps=ENOUGH_STEPS)),
        worker("c", BOTH, DECODED),
    )
    found = prefill_speeds(seen, {})
    assert found is not None
    assert {round(one.token_s / COST.token_s, 6) for one in found.values()} == {2.0}
    assert {round(one.pair_s / COST.pair_s, 6) for one in found.values()} == {2.0}
    # All else it has measured itself.
    assert [round(found[WorkerId(name)].overhead_s / COST.overhead_s, 6) for name in "abc"] == [1.0, 2.0, 1.0]


def test_a_few_steps_of_prompts_say_more_of_them_than_many_of_decodes() -> None:
    few = replace(costs(5, 2.0, FactorSource.ROOFLINE), num_prompt_steps=5)
    found = learnt_cost(view(worker("a", PREFILL, few), worker("b", DECODE, DECODED)))
    assert found is not None
    assert (found.token_s, found.pair_s) == (2 * COST.token_s, 2 * COST.pair_s)
    assert found.context_s == 3 * COST.context_s


def test_a_profile_knows_prompts_before_the_first_one() -> None:
    profiled = costs(0, 3.0, FactorSource.PROFILE)
    found = prefill_speeds(
        view(worker("a", learnt=profiled), worker("b", learnt=replace(PROMPTED, num_prompt_steps=40))), {}
    )
    assert found is not None
    assert [round(found[WorkerId(name)].token_s / COST.token_s) for name in "ab"] == [3, 2]
