"""After how many layers KV leaves: few where computing is slow, many where messages are dear."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine_pair import REPORT
from workers.engine.pacing import GPU_LAYER_LAUNCH_S, GROUP_COST_S, LayerPacing, best_group_size

MIB = 2**20


def size(
    *, layer_s: float = 0.01, layer_bytes: int = MIB, message_s: float = 0.001, bytes_per_s: float = 1e9
) -> int:
    return best_group_size(
        30,
        layer_s=layer_s,
        layer_bytes=layer_bytes,
        max_chunk_bytes=2 * MIB,
        message_s=message_s,
        bytes_per_s=bytes_per_s,
    )


def test_each_layer_leaves_alone_where_computing_takes_longest() -> None:
    # What is left after the last layer is one layer's KV, and what the groups cost is little beside it.
    assert size(layer_s=1.0, layer_bytes=200 * MIB) == 1


def test_all_leave_together_where_nothing_is_gained_by_less() -> None:
    assert size(layer_s=1e-7, layer_bytes=100, message_s=1e-3, bytes_per_s=1e12) == 30


def test_a_dearer_message_makes_larger_groups() -> None:
    sizes = [size(layer_bytes=1000, message_s=message_s) for message_s in (1e-6, 1e-3, 1e-1)]
    assert sizes == sorted(sizes)


@given(
    layer_s=st.floats(1e-6, 1.0),
    layer_bytes=st.integers(1, 10**8),
    message_s=st.floats(1e-6, 0.1),
    bytes_per_s=st.floats(1e6, 1e12),
)
def test_no_other_size_is_better(
    layer_s: float, layer_bytes: int, message_s: float, bytes_per_s: float
) -> None:
    def cost_s(group: int) -> float:
        """Layer by layer: what has not left when the last one is computed, and what the groups cost."""
        clock_s = way_free_s = 0.0
        num_groups = waiting = 0
        for layer in range(1, 31):
            clock_s += layer_s
            waiting += layer_bytes
            if layer % group == 0 or layer == 30:
                num_groups += 1
                send_s = -(-waiting // (2 * MIB)) * message_s + waiting / bytes_per_s
                way_free_s = max(way_free_s, clock_s) + send_s
                waiting = 0
        return way_free_s - clock_s + num_groups * GROUP_COST_S

    best = size(layer_s=layer_s, layer_bytes=layer_bytes, message_s=message_s, bytes_per_s=bytes_per_s)
    assert cost_s(best) <= min(cost_s(group) for group in range(1, 31)) * (1 + 1e-6) + 1e-9


def gpu_size(*, bytes_per_s: float) -> int:
    """Of 2,048 tokens of an 8B model: 4 KiB of KV a token and layer, 1.5 ms a layer."""
    return best_group_size(
        32,
        layer_s=1.5e-3,
        layer_bytes=2048 * 4096,
        max_chunk_bytes=2 * MIB,
        message_s=1e-5,
        bytes_per_s=bytes_per_s,
        layer_launch_s=GPU_LAYER_LAUNCH_S,
    )


def test_a_step_that_would_be_one_graph_is_cut_where_that_hides_more_than_its_launches_take() -> None:
    # Within a GPU all KV leaves in 2 ms, over a network in a quarter of a second.
    assert gpu_size(bytes_per_s=1e11) == 32
    assert gpu_size(bytes_per_s=1e9) < 16


@given(launch_s=st.floats(0.0, 0.01), bytes_per_s=st.floats(1e6, 1e12), layer_s=st.floats(1e-6, 1.0))
def test_launches_that_cost_more_never_cut_a_step_that_was_whole(
    launch_s: float, bytes_per_s: float, layer_s: float
) -> None:
    def best(layer_launch_s: float) -> int:
        return best_group_size(
            30,
            layer_s=layer_s,
            layer_bytes=MIB,
            max_chunk_bytes=2 * MIB,
            message_s=1e-4,
            bytes_per_s=bytes_per_s,
            layer_launch_s=layer_launch_s,
        )

    assert best(launch_s) in (best(0.0), 30)


def test_a_step_that_is_too_large_for_a_graph_is_launched_by_kernels_either_way() -> None:
    pacing, plain = (
        LayerPacing(
            num_layers=32,
            token_bytes=4096,
            max_chunk_bytes=2 * MIB,
            layer_launch_s=launch_s,
            max_graph_tokens=2048,
        )
        for launch_s in (1.0, 0.0)
    )
    assert pacing.group_size(2048) == 32
    assert pacing.group_size(2049) == plain.group_size(2049) < 32


def test_a_size_that_the_manifest_gives_is_taken() -> None:
    pacing = LayerPacing(num_layers=3, token_bytes=1000, max_chunk_bytes=MIB, fixed=10)
    assert pacing.group_size(100) == 3


def test_measured_times_move_the_answer() -> None:
    pacing = LayerPacing(num_layers=30, token_bytes=1536, max_chunk_bytes=2 * MIB)
    for _ in range(50):
        # A slow processor and a way on which bytes are slow.
        pacing.observe_step(256, 0.5)
        pacing.observe_transfer(replace(REPORT, num_bytes=10**8, num_chunks=50, busy_s=1.0))
    few = pacing.group_size(256)
    for _ in range(50):
        # Now a fast processor and a way on which messages are slow.
        pacing.observe_step(256, 0.001)
        pacing.observe_transfer(replace(REPORT, num_bytes=10**6, num_chunks=50, busy_s=5.0))
    assert few < 5 < pacing.group_size(256)


def test_what_cannot_be_a_measurement_changes_nothing() -> None:
    pacing = LayerPacing(num_layers=30, token_bytes=1536, max_chunk_bytes=2 * MIB)
    before = pacing.group_size(256)
    pacing.observe_step(0, 1.0)
    pacing.observe_step(5, 0.0)
    pacing.observe_transfer(replace(REPORT, busy_s=0.0))
    assert pacing.group_size(256) == before


@given(
    steps=st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-12, 1e12)), max_size=20),
    transfers=st.lists(
        st.tuples(st.integers(0, 10**13), st.integers(1, 10**6), st.floats(1e-12, 1e12)), max_size=20
    ),
    fixed=st.one_of(st.none(), st.integers(0, 2000)),
    num_tokens=st.integers(1, 10**6),
)
def test_whatever_is_measured_a_group_is_of_the_model_s_layers(
    steps: list[tuple[int, float]],
    transfers: list[tuple[int, int, float]],
    fixed: int | None,
    num_tokens: int,
) -> None:
    pacing = LayerPacing(num_layers=30, token_bytes=1536, max_chunk_bytes=2 * MIB, fixed=fixed)
    for tokens, step_s in steps:
        pacing.observe_step(tokens, step_s)
    for num_bytes, num_chunks, busy_s in transfers:
        pacing.observe_transfer(replace(REPORT, num_bytes=num_bytes, num_chunks=num_chunks, busy_s=busy_s))
    assert 1 <= pacing.group_size(num_tokens) <= 30


def test_one_wild_measurement_is_forgotten_within_some_usual_ones() -> None:
    pacing = LayerPacing(num_layers=30, token_bytes=1536, max_chunk_bytes=2 * MIB)
    usual = replace(REPORT, num_bytes=10**8, num_chunks=50, busy_s=0.15)

    def observe(num: int) -> int:
        for _ in range(num):
            pacing.observe_step(256, 0.5)
            pacing.observe_transfer(usual)
        return pacing.group_size(256)

    before = observe(50)
    # As when the machine slept.
    pacing.observe_step(1, 1e6)
    pacing.observe_transfer(replace(usual, busy_s=1e6))
    assert observe(100) == before
