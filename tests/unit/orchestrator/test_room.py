"""Prompts go where there is room for their KV."""

from dataclasses import replace

from orchestrator.bench.records import OK
from orchestrator.control.prefill_speed import prefill_speeds
from orchestrator.control.router import (
    LoadLedger,
    PromptLoad,
    Route,
    choose_decode,
    choose_route,
    kept_tokens,
    rooms_of,
)
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from tests.support.quiet_workers import QuietWorkers
from tests.support.sim import BOTH, LLAMA_ON_H100, SHAPES, D, P, load
from tests.support.sim import run as simulate
from workers.api import (
    KvTransferred,
    PhaseSet,
    RequestId,
    TokensGenerated,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.step_shape import FactorSource

COSTS = replace(LLAMA_ON_H100.costs(), source=FactorSource.FITTED)
PROMPT = PromptLoad(num_tokens=100, max_tokens=300)


def seen(name: str, phases: PhaseSet, room: int | None) -> WorkerView:
    told = WorkerStatus(WorkerId(name), 1, phases, WorkerState.READY, step_costs=COSTS, room_tokens=room)
    return WorkerView(WorkerId(name), 1, phases, LifecycleState.READY, f"{name}:1", status=told)


def route(*workers: WorkerView, ledger: LoadLedger | None = None, by_seconds: bool = True) -> Route:
    view = ClusterView("d", 1, 1, "m", workers)
    speeds = prefill_speeds(view, {}) if by_seconds else None
    ledger = LoadLedger() if ledger is None else ledger
    chosen = choose_route(view, ledger, lambda _: True, PROMPT, speeds, rooms=rooms_of(view))
    assert isinstance(chosen, Route)
    return chosen


def test_a_prompt_goes_where_there_is_room_for_it_though_more_waits_there() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b"), prefill_tokens=5000)
    enough = kept_tokens(100, 300)
    assert enough == 150
    for by_seconds in (True, False):
        chosen = route(
            seen("a", BOTH, enough - 1), seen("b", BOTH, enough), ledger=ledger, by_seconds=by_seconds
        )
        assert chosen.prefill.worker_id == "b"
        assert "; 1 of 2 workers have room for its KV" in chosen.reason


def test_where_nobody_has_room_it_goes_where_it_is_computed_first() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b"), prefill_tokens=5000)
    chosen = route(seen("a", BOTH, 0), seen("b", BOTH, 10), ledger=ledger)
    assert chosen.prefill.worker_id == "a"
    assert "room" not in chosen.reason


def test_what_was_promised_since_the_view_takes_room() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("a"), coming_tokens=51)
    assert route(seen("a", BOTH, 200), seen("b", BOTH, 150), ledger=ledger).prefill.worker_id == "b"


def test_where_one_worker_does_not_say_rooms_do_not_matter() -> None:
    ledger = LoadLedger()
    ledger.add(WorkerId("b"), prefill_tokens=5000)
    for rooms in ((None, 10_000), (0, None), (None, None)):
        a, b = (seen(name, BOTH, room) for name, room in zip("ab", rooms, strict=True))
        assert route(a, b, ledger=ledger).prefill.worker_id == "a"
        a, b = (seen(name, D, room) for name, room in zip("ab", rooms, strict=True))
        assert route(seen("p", P, 0), a, b).decode.worker_id == "a"


def test_a_worker_that_does_not_say_gets_no_more_than_others() -> None:
    workers = QuietWorkers({"a": BOTH, "b": BOTH, "old": BOTH})
    rooms: dict[str, int | None] = {"a": 0, "b": 0, "old": None}
    workers.see(rooms)
    workers.submit(300, 1000, 100)
    assert set(workers.num_at.values()) == {100}
    # Nor is it a place for those that wait for room.
    workers.see(rooms)
    assert set(workers.num_at.values()) == {100}


def test_who_only_prefills_needs_room_for_the_prompt_and_who_decodes_it_for_all() -> None:
    chosen = route(seen("b", BOTH, 149), seen("p", P, 100), seen("d", D, 299), seen("e", D, 300))
    assert (chosen.prefill.worker_id, chosen.decode.worker_id) == ("p", "e")
    view = ClusterView("d", 1, 1, "m", (seen("d", D, 299), seen("e", D, 300)))
    ledger = LoadLedger()
    ledger.add(WorkerId("e"), decode_sequences=9)
    for max_tokens, expected in ((299, "d"), (300, "e"), (301, "d")):
        found = choose_decode(view, ledger, lambda _: True, rooms=rooms_of(view), max_tokens=max_tokens)
        assert found is not None
        assert found.worker_id == expected


def test_prompts_take_room_where_they_are_only_prefilled() -> None:
    """p1 has room for one prompt; the others are computed as soon at either."""
    workers = QuietWorkers({"p0": P, "p1": P, "d": D})
    workers.see({"p0": 0, "p1": 100, "d": 10**6})
    workers.submit(50, 100, 100)
    assert workers.num_at == {("p0", "d"): 25, ("p1", "d"): 25}


def test_each_worker_keeps_as_much_for_answers_as_its_manifest_says() -> None:
    """A prompt of 100 tokens that may come to 300: a keeps room for all of these, b for none, and of c nothing is known."""
    reserves = {WorkerId("a"): 1.0, WorkerId("b"): 0.0}
    workers = QuietWorkers({"a": BOTH, "b": BOTH, "c": BOTH}, growth_reserves=reserves)
    for rooms, chosen in (((299, 100, 149), "b"), ((299, 99, 150), "c"), ((300, 99, 149), "a")):
        workers.see(dict(zip("abc", rooms, strict=True)))
        workers.submit(1, 100, 200)
        assert workers.num_at == {(chosen, chosen): 1}
        [request] = workers.dispatcher._requests
        workers.dispatcher.abort(request)
        workers.dispatcher.check_invariants()


def token(workers: QuietWorkers, name: str, position: int) -> None:
    """Each request has one of this worker, with this position in its sequence."""
    for sample in list(workers.dispatcher._running.values()):
        event = TokensGenerated(key=sample.machine.key, token_ids=(1,), first_position=position)
        workers.says(name, event)


def transferred(workers: QuietWorkers, name: str) -> None:
    """The KV of each request has gone from there."""
    for sample in list(workers.dispatcher._running.values()):
        workers.says(
            name,
            KvTransferred(key=sample.machine.key, num_bytes=1, num_chunks=1, transfer_s=0.1, exposed_s=0.1),
        )


def promised(workers: QuietWorkers, name: str) -> int:
    return workers.dispatcher._ledger.of(WorkerId(name)).coming_tokens


def test_sequences_that_move_take_room_where_they_go() -> None:
    """d1 has room for one of 40, and d2 for none: the others are spread evenly."""
    workers = QuietWorkers({"p": P, "d0": D, "d1": D, "d2": D})
    workers.see({"p": 10**6, "d0": 10**6, "d1": 0, "d2": 0})
    workers.submit(40, 1000, 1000)
    token(workers, "p", 1000)
    transferred(workers, "p")
    assert workers.num_at == {("p", "d0"): 40}
    workers.see({"p": 10**6, "d0": 10**6, "d1": 2000, "d2": 1999}, leaving={"d0": D})
    assert workers.num_at == {("p", "d1"): 20, ("p", "d2"): 20}
    assert (promised(workers, "d0"), promised(workers, "d1")) == (0, 20 * 2000)
    transferred(workers, "d0")
    assert (promised(workers, "d1"), promised(workers, "d2")) == (0, 0)
    for request_id in list(workers.dispatcher._requests):
        workers.dispatcher.abort(request_id)
    workers.dispatcher.check_invariants()
    assert workers.dispatcher._ledger.loads == {}


def test_prompts_go_to_the_one_worker_that_has_room_though_more_sequences_decode_there() -> None:
    """w0 has three answers of 2,500 tokens that last 15 s, beside which there is no room for a prompt of 4,000."""
    plan = load(
        [
            *((0.2 * i, 2500, 2500 if i in (0, 3, 4) else 400) for i in range(6)),
            *((3.5 + 0.2 * i, 600, 300) for i in range(4)),
            *((4.5 + 0.2 * i, 4000, 400) for i in range(2)),
        ]
    )
    result, simulation = simulate(SHAPES["two"], plan, noise=0.0)
    assert {one.status for one in result.load.records} == {OK}
    found = [simulation.dispatcher.records.get(RequestId(f"r{i}")) for i in range(len(plan))]
    used = [one.samples[0].attempts[0].route.prefill.worker_id for one in found if one is not None]
    assert used[-2:] == ["w1", "w1"]
    assert max(one.token_times_s[0] for one in result.load.records[-2:]) < 0.2
