"""The cluster view survives the wire, and a newer sender does no harm."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.control.view_wire import view_from_pb, view_to_pb
from protos import control_pb2 as pb
from workers.api import BlockCounts, Phase, WorkerId, WorkerState, WorkerStatus

numbers = st.integers(0, 2**32 - 1)
phase_sets = st.frozensets(st.sampled_from(Phase))
statuses = st.builds(
    WorkerStatus,
    worker_id=st.text().map(WorkerId),
    incarnation=numbers,
    phases=phase_sets,
    state=st.sampled_from(WorkerState),
    message=st.text(),
    num_waiting=numbers,
    num_running=numbers,
    blocks=st.builds(
        BlockCounts, free=numbers, cached=numbers, in_use=numbers, leased=numbers, total=numbers
    ),
    num_leases=numbers,
    num_steps=numbers,
    pid=numbers,
    memory_bytes=numbers,
)
workers = st.builds(
    WorkerView,
    worker_id=st.text().map(WorkerId),
    incarnation=numbers,
    phases=phase_sets,
    state=st.sampled_from(LifecycleState),
    address=st.text(),
    reason=st.text(),
    num_restarts=numbers,
    status=st.none() | statuses,
)
views = st.builds(
    ClusterView,
    deployment=st.text(),
    controller_epoch=numbers,
    version=numbers,
    model=st.text(),
    workers=st.lists(workers, max_size=3).map(tuple),
    controller_pid=numbers,
)


@given(views)
def test_a_view_comes_back_as_it_was(view: ClusterView) -> None:
    message = pb.ClusterView.FromString(view_to_pb(view).SerializeToString())
    assert view_from_pb(message) == view


def test_states_and_phases_of_a_newer_version_make_a_worker_unusable_and_nothing_worse() -> None:
    message = pb.ClusterView(version=1)
    worker = message.workers.add(worker_id="w-0", incarnation=2)
    worker.MergeFromString(b"\x20\x63\x18\x63\x18\x02")  # state = 99, phases = [99, prefill]
    (seen,) = view_from_pb(message).workers
    assert seen.state is LifecycleState.LOST
    assert seen.phases == {Phase.PREFILL}


def test_a_worker_without_a_state_is_not_ready() -> None:
    (seen,) = view_from_pb(pb.ClusterView(workers=[pb.WorkerView(worker_id="w-0")])).workers
    assert seen.state is LifecycleState.LOST
    assert seen.status is None
