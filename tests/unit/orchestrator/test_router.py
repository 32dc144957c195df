"""Which workers a request is routed to."""

from orchestrator.control.router import (
    SEQUENCE_TOKENS,
    LoadLedger,
    PromptLoad,
    Refuse,
    Route,
    Wait,
    choose_route,
)
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import Phase, PhaseSet, WorkerId

PREFILL = frozenset({Phase.PREFILL})
DECODE = frozenset({Phase.DECODE})
BOTH = PREFILL | DECODE


def worker(
    name: str, phases: PhaseSet, state: LifecycleState = LifecycleState.READY, reason: str = ""
) -> WorkerView:
    return WorkerView(WorkerId(name), 1, phases, state, f"{name}:1", reason)


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", workers)


def route(seen: ClusterView | None, ledger: LoadLedger | None = None, unlinked: str = "") -> object:
    return choose_route(seen, ledger or LoadLedger(), lambda w: w.worker_id != unlinked)


def names(chosen: object) -> tuple[str, str]:
    assert isinstance(chosen, Route), chosen
    return chosen.prefill.worker_id, chosen.decode.worker_id


def test_each_phase_goes_to_its_least_loaded_worker() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("p-0"), prefill_tokens=100)
    ledger.add(WorkerId("p-1"), prefill_tokens=7)
    ledger.add(WorkerId("d-0"), decode_sequences=2)
    seen = view(worker("p-0", PREFILL), worker("p-1", PREFILL), worker("d-0", DECODE), worker("d-1", DECODE))
    chosen = route(seen, ledger)
    assert names(chosen) == ("p-1", "d-1")
    assert isinstance(chosen, Route)
    assert chosen.reason == "least loaded: p-1 with 7 prompt tokens, d-1 with 0 sequences"


def test_a_worker_that_serves_both_phases_keeps_the_request() -> None:
    chosen = route(view(worker("a-0", PREFILL), worker("b-0", BOTH), worker("d-0", DECODE)))
    assert names(chosen) == ("b-0", "b-0")
    assert isinstance(chosen, Route)
    assert chosen.is_colocated


def test_a_busy_co_located_worker_gives_way_to_an_idle_prefill_worker() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b-0"), prefill_tokens=10, decode_sequences=1)
    assert names(route(view(worker("b-0", BOTH), worker("p-0", PREFILL)), ledger)) == ("p-0", "b-0")


def test_sequences_that_decode_are_spread_over_equal_co_located_workers() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b-0"), decode_sequences=1)
    assert names(route(view(worker("b-0", BOTH), worker("b-1", BOTH)), ledger)) == ("b-1", "b-1")


def test_ties_go_to_the_smaller_id_whatever_the_order_of_the_view() -> None:
    assert names(route(view(worker("b-1", BOTH), worker("b-0", BOTH)))) == ("b-0", "b-0")


def test_a_worker_without_a_link_is_not_used() -> None:
    seen = view(worker("b-0", BOTH), worker("b-1", BOTH))
    assert names(route(seen, unlinked="b-0")) == ("b-1", "b-1")
    waiting = route(view(worker("b-0", BOTH)), unlinked="b-0")
    assert waiting == Wait("no worker can prefill now (b-0 is ready, and not connected yet)")


def test_a_request_waits_while_a_worker_is_coming_and_is_refused_when_none_is() -> None:
    starting = worker("d-0", DECODE, LifecycleState.STARTING, "loads the weights")
    assert route(view(worker("p-0", PREFILL), starting)) == Wait(
        "no worker can decode now (d-0 is starting: loads the weights)"
    )
    failed = worker("d-0", DECODE, LifecycleState.FAILED, "no model")
    assert route(view(worker("p-0", PREFILL), failed)) == Refuse(
        "no worker can decode now (d-0 is failed: no model)"
    )
    assert route(view()) == Refuse("no worker can prefill now (none is declared)")


def test_without_a_view_a_request_waits() -> None:
    assert isinstance(route(None), Wait)


def test_the_ledger_forgets_idle_workers() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("a"), prefill_tokens=5, decode_sequences=1)
    ledger.add(WorkerId("a"), prefill_tokens=-5)
    assert ledger.of(WorkerId("a")).decode_sequences == 1
    ledger.add(WorkerId("a"), decode_sequences=-1)
    assert ledger.loads == {}


def test_what_the_ledger_has_told_stays_as_it_was() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("a"), prefill_tokens=5)
    some, none = ledger.of(WorkerId("a")), ledger.of(WorkerId("b"))
    ledger.add(WorkerId("a"), prefill_tokens=1)
    ledger.add(WorkerId("b"), prefill_tokens=1)
    assert (some.prefill_tokens, none.prefill_tokens) == (5, 0)


# What workers have cached.


def with_cache(ledger: LoadLedger | None = None, num_tokens: int = 1000, **cached: int) -> Route:
    seen = view(worker("b_0", BOTH), worker("b_1", BOTH), worker("b_2", BOTH))
    prompt = PromptLoad(num_tokens, {(WorkerId(name), 1): num for name, num in cached.items()})
    chosen = choose_route(seen, ledger or LoadLedger(), lambda _: True, prompt)
    assert isinstance(chosen, Route)
    return chosen


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    chosen = with_cache(b_1=512, b_2=900)
    assert names(chosen) == ("b_2", "b_2")
    assert chosen.num_cached_tokens == 900
    assert chosen.reason == "b_2 serves both phases with 0 prompt tokens, and 900 of the prompt's 1000 cached"


def test_but_not_behind_more_work_than_that_saves() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b_2"), prefill_tokens=901)
    assert names(with_cache(ledger, b_2=900)) == ("b_0", "b_0")
    ledger.add(WorkerId("b_2"), prefill_tokens=-2)
    assert names(with_cache(ledger, b_2=900)) == ("b_2", "b_2")


def test_nor_where_many_sequences_decode() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b_2"), decode_sequences=1000 // SEQUENCE_TOKENS + 1)
    assert names(with_cache(ledger, b_2=1000)) == ("b_0", "b_0")


def test_those_that_have_most_are_asked_first() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b_1"), prefill_tokens=5000)
    ledger.add(WorkerId("b_2"), prefill_tokens=5000)
    chosen = with_cache(ledger, b_1=100, b_2=900)
    assert [peer.address for peer in chosen.prefix_peers] == ["b_2:1", "b_1:1"]


def test_what_an_earlier_process_had_is_nothing() -> None:
    seen = view(worker("p-0", PREFILL), worker("p-1", PREFILL), worker("d-0", DECODE))
    prompt = PromptLoad(100, {(WorkerId("p-1"), 2): 90})
    assert names(choose_route(seen, LoadLedger(), lambda _: True, prompt)) == ("p-0", "d-0")


def test_an_idle_cluster_spreads_what_it_caches() -> None:
    seen = view(worker("b-0", BOTH), worker("b-1", BOTH), worker("b-2", BOTH))
    num_blocks = {(WorkerId("b-0"), 1): 7, (WorkerId("b-1"), 1): 3, (WorkerId("b-2"), 1): 3}
    chosen = choose_route(seen, LoadLedger(), lambda _: True, PromptLoad(100, {}, num_blocks))
    assert names(chosen) == ("b-1", "b-1")
