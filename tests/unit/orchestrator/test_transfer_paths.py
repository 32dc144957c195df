"""How long KV takes between two workers, and that requests are routed by it."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.encode_split import EncoderMemory
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.prefill_speed import prefill_speeds
from orchestrator.control.router import LoadLedger, Move, PromptLoad, Route, choose_decode, choose_route
from orchestrator.control.transfer_paths import ANSWER_TOKENS, LEAST_BYTES, TransferPaths
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import (
    ImagesEncoded,
    KvDirection,
    KvPeer,
    Phase,
    PhaseSet,
    RequestId,
    RequestKey,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.latency_model import LatencyModel
from workers.step_shape import FactorSource

P, D = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
LLAMA = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
COSTS = replace(LLAMA.costs(), source=FactorSource.FITTED)
KV = MODELS["llama-3-8b"].kv_token_bytes
ADDRESSES = {"p": "a:1", "p2": "b:3", "near": "a:2", "far": "b:1", "far2": "b:2", "both": "c:1"}
rates = st.one_of(st.floats(1e6, 1e12), st.sampled_from((0.0, -1.0, math.nan, math.inf)))


def worker(name: str, phases: PhaseSet, **sends: float) -> WorkerView:
    peers = tuple(
        KvPeer(ADDRESSES.get(to, to), KvDirection.SENDING, "grpc", "", "none", 1, LEAST_BYTES, rate)
        for to, rate in sends.items()
    )
    status = WorkerStatus(WorkerId(name), 1, phases, WorkerState.READY, step_costs=COSTS, peers=peers)
    return WorkerView(WorkerId(name), 1, phases, LifecycleState.READY, ADDRESSES[name], status=status)


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", workers)


def paths_of(seen: ClusterView) -> TransferPaths:
    found = TransferPaths.of(seen)
    assert found is not None
    return found


def route(seen: ClusterView, ledger: LoadLedger, num_tokens: int, *, by_paths: bool = True) -> Route:
    paths = TransferPaths.of(seen) if by_paths else None
    chosen = choose_route(
        seen, ledger, lambda _: True, PromptLoad(num_tokens), prefill_speeds(seen, {}), paths
    )
    assert isinstance(chosen, Route)
    return chosen


def sequences(**num: int) -> LoadLedger:
    ledger = LoadLedger()
    for name, count in num.items():
        ledger.add(WorkerId(name), decode_sequences=count)
    return ledger


def test_a_pair_that_has_met_has_its_own_rate_and_others_that_of_their_kind() -> None:
    seen = view(
        worker("p", P, near=10e9, far=1e9, far2=3e9), worker("near", D), worker("far", D), worker("far2", D)
    )
    paths = paths_of(seen)
    p, near, far, far2 = seen.workers
    assert paths.move_s(p, near, 1000) == 1000 * KV / 10e9
    assert paths.move_s(p, far, 1000) == 1000 * KV / 1e9
    # Two of one host that have not met are as fast as those that have; others as the middle of them.
    assert paths.move_s(far, far2, 1000) == 1000 * KV / 10e9
    assert paths.move_s(near, far2, 1000) == 1000 * KV / 2e9
    assert paths.move_s(p, p, 1000) == 0.0


def test_a_decode_worker_on_another_host_loses_when_its_way_is_not_hidden() -> None:
    slow = view(worker("p", P, near=50e9, far=1e9), worker("far", D), worker("near", D))
    # It has fewer sequences, and a second of waiting weighs more.
    busy = sequences(near=3)
    chosen = route(slow, busy, 8000)
    assert chosen.decode.worker_id == "near"
    assert route(slow, busy, 8000, by_paths=False).decode.worker_id == "far"
    assert chosen.reason.endswith("; its KV takes about 0.021 s, 0 s of it after prefill")
    far_only = view(worker("p", P, far=1e9), worker("far", D))
    assert "its KV takes about 1 s, 0.8" in route(far_only, busy, 8000).reason
    # Hidden behind the prompt's own computing it costs nothing.
    fast = view(worker("p", P, near=50e9, far=20e9), worker("far", D), worker("near", D))
    assert route(fast, busy, 8000).decode.worker_id == "far"


def test_so_many_sequences_outweigh_a_slow_way() -> None:
    seen = view(worker("p", P, near=50e9, far=1e9), worker("far", D), worker("near", D))
    paths = paths_of(seen)
    exposed_s = Move(paths, seen.workers[0], 8000, 0.0).exposed_s(seen.workers[1])
    num = math.ceil(exposed_s / (ANSWER_TOKENS * paths.sequence_s)) + 1
    assert route(seen, sequences(near=num + 100), 8000).decode.worker_id == "far"


def test_a_prompt_is_computed_where_its_kv_has_a_way() -> None:
    """Of two equal prefill workers the one whose KV would have to leave the host slowly loses."""
    seen = view(worker("p", P, far=0.5e9), worker("p2", P, far=50e9), worker("far", D))
    assert route(seen, LoadLedger(), 8000).prefill.worker_id == "p2"
    assert route(seen, LoadLedger(), 8000, by_paths=False).prefill.worker_id == "p"
    # One that decodes itself moves nothing.
    seen = view(worker("p", P, far=0.5e9), worker("both", P | D), worker("far", D))
    assert route(seen, LoadLedger(), 8000).prefill.worker_id == "both"


def test_a_sequence_that_moves_while_it_waits_goes_to_the_nearer_worker() -> None:
    seen = view(worker("near", D, p=10e9, far=1e9), worker("far", D), worker("both", D), worker("p", D))
    source = seen.workers[0]
    others = [one for one in seen.workers if one is not source]
    target = choose_decode(seen, sequences(p=2), lambda w: w in others, Move(paths_of(seen), source, 8000))
    assert target is not None
    assert target.worker_id == "p"


def test_nothing_learnt_or_measured_is_as_before() -> None:
    status = worker("p", P).status
    assert status is not None
    mute = view(replace(worker("p", P), status=replace(status, step_costs=None)))
    assert TransferPaths.of(mute) is None
    seen = view(worker("p", P), worker("near", D), worker("far", D))
    assert paths_of(seen).best == {}
    chosen = route(seen, sequences(near=1), 8000)
    assert chosen.decode.worker_id == "far"
    assert "KV" not in chosen.reason


def test_the_rate_of_small_transfers_is_not_taken() -> None:
    seen = view(worker("p", P, near=1e6, far=1e9), worker("near", D), worker("far", D))
    status = seen.workers[0].status
    assert status is not None
    small = tuple(replace(one, num_transfers=10) for one in status.peers)
    first = replace(seen.workers[0], status=replace(status, peers=small))
    assert paths_of(replace(seen, workers=(first, *seen.workers[1:]))).pairs == {}


@given(
    st.dictionaries(st.sampled_from(("near", "far", "far2", "gone:9", "")), rates, max_size=5),
    st.dictionaries(st.sampled_from(("near", "far", "far2")), st.integers(0, 300), max_size=3),
    st.integers(1, 100_000),
)
def test_whatever_was_measured_a_route_is_found_and_times_are_sane(
    sends: dict[str, float], num: dict[str, int], num_tokens: int
) -> None:
    seen = view(
        worker("p", P, **sends), worker("near", D), worker("far", D), worker("far2", D), worker("both", P | D)
    )
    paths, ledger = paths_of(seen), sequences(**num)
    chosen = route(seen, ledger, num_tokens)
    assert chosen.decode is chosen.prefill or chosen.prefill.worker_id == "p"
    for source in seen.workers:
        for target in seen.workers:
            move_s = paths.move_s(source, target, num_tokens)
            assert 0.0 <= move_s < math.inf
            exposed_s = Move(paths, source, num_tokens, 0.01).exposed_s(target)
            assert max(0.0, move_s - 0.01) == exposed_s
            if source is target:
                assert move_s == 0.0
        assert 0.0 <= paths.best_exposed_s(source, num_tokens, 0.0) < math.inf


@given(st.floats(1e8, 1e11), st.floats(1.0, 1e3), st.integers(0, 50), st.integers(1, 50_000))
def test_a_faster_way_never_makes_a_worker_lose(
    rate: float, factor: float, num_near: int, num_tokens: int
) -> None:
    def chosen(far: float) -> str:
        seen = view(worker("p", P, near=5e9, far=far), worker("near", D), worker("far", D))
        return route(seen, sequences(near=num_near, far=10), num_tokens).decode.worker_id

    if chosen(rate) == "far":
        assert chosen(rate * factor) == "far"


def test_the_way_of_embeddings_is_learnt_and_counted() -> None:
    memory, e, f, p = EncoderMemory(), WorkerId("e"), WorkerId("f"), WorkerId("p")
    assert memory.move_seconds(e, p) == 0.0
    done = ImagesEncoded(RequestKey(RequestId("r"), 1), 1, 0, 64, 1, 0.0, 0.0, 1.0, 6.4)
    memory.observe(e, [], done, p)
    assert memory.move_seconds(e, p) == 0.1
    # One that has not met it is taken to be as fast as the fastest, so that it is tried.
    memory.observe(f, [], replace(done, transfer_s=0.64), p)
    assert memory.move_seconds(f, WorkerId("q")) == 0.01
    memory.observe(p, [], done, p)
    assert memory.move_seconds(p, p) == 0.0
