"""What the controller's own switches are made from, and that no cluster stops its ticks."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.auto_switch import ALLOWED, AutoSwitch
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.policies.policy import Totals
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import BlockCounts, Phase, PhaseSet, PhaseWork, WorkerId, WorkerState, WorkerStatus
from workers.latency_model import LatencyModel

LEARNT = replace(
    LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False).costs(), num_steps=1000
)
SLO = Slo(1.0, 0.05)
ALL = frozenset(Phase)
SETS: tuple[PhaseSet, ...] = (*ALLOWED, frozenset({Phase.ENCODE}), ALL, frozenset())

counts = st.integers(0, 1000)
works = st.builds(
    lambda num, more, tokens, context: PhaseWork(
        num_prefills=num,
        prefill_tokens=tokens,
        num_decodes=num + more,
        num_decoding=num,
        decode_context=context,
    ),
    counts,
    counts,
    st.integers(0, 10**6),
    st.integers(0, 10**7),
)


def worker(
    number: int,
    phases: PhaseSet,
    state: LifecycleState = LifecycleState.READY,
    work: PhaseWork | None = None,
    num_blocks: int = 1000,
) -> WorkerView:
    name = WorkerId(f"w{number}")
    status = WorkerStatus(
        name,
        1,
        phases,
        WorkerState.READY,
        blocks=BlockCounts(total=num_blocks, free=num_blocks, cached=0, in_use=0, leased=0),
        step_costs=LEARNT,
        work=work or PhaseWork(),
    )
    return WorkerView(name, 1, phases, state, f"{name}:1", status=status)


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", workers)


def auto(seen: ClusterView) -> AutoSwitch:
    return AutoSwitch(SLO, {one.worker_id: 16 for one in seen.workers})


def test_workers_that_all_encode_too_are_left_as_they_are() -> None:
    seen = view(worker(0, ALL), worker(1, ALL))
    policy = auto(seen)
    for second in range(20):
        assert not policy.tick(float(second), seen, Totals(10 * second, 40_000 * second))


def test_a_cluster_without_a_ready_worker_is_waited_for() -> None:
    seen = view(worker(0, ALLOWED[1], LifecycleState.LOST), worker(1, ALLOWED[2], LifecycleState.LOST))
    policy = auto(seen)
    assert not policy.tick(0.0, seen, Totals())
    assert not policy.tick(1.0, seen, Totals(10, 40_000))


@given(
    st.lists(
        st.tuples(st.sampled_from(SETS), st.sampled_from(LifecycleState), works, st.sampled_from((0, 1000))),
        max_size=6,
    ),
    st.lists(counts, min_size=2, max_size=12),
)
def test_any_cluster_can_be_looked_at(
    declared: list[tuple[PhaseSet, LifecycleState, PhaseWork, int]], arrivals: list[int]
) -> None:
    seen = view(*(worker(i, *one) for i, one in enumerate(declared)))
    policy, num = auto(seen), 0
    ready = {one.worker_id: one for one in seen.workers if one.state is LifecycleState.READY}
    for second, more in enumerate(arrivals):
        num += more
        for request in policy.tick(float(second), seen, Totals(num, 1000 * num, 0, num, 10 * num, num // 2)):
            assert ready[request.worker_id].phases in ALLOWED
            assert request.phases in ALLOWED
            assert request.phases != ready[request.worker_id].phases
