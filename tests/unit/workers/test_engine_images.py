"""The engine with pictures: what is asked for, when prefill goes on, and what the prefix cache takes for the same."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_fakes import (
    CONFIG,
    PREFILL,
    assert_empty,
    key,
    make_engine,
    outputs_of,
    run_step,
    submit,
)
from workers.api import Abort, FailureCode, ImageTile, RequestFailed, Submit, TokensGenerated
from workers.engine.engine import Engine
from workers.engine.messages import (
    ImageReady,
    ImagesLost,
    ImagesNeeded,
    ImagesReleased,
    StartTransfer,
)

CACHED = replace(CONFIG, is_prefix_cache_on=True)
PICTURE = 9


def _submit(name: str, *tiles: tuple[int, int, str], num_prompt: int = 20, max_new: int = 3) -> Submit:
    """tiles: start, embeddings, and what they are of."""
    plain = submit(name, num_prompt=num_prompt, max_new=max_new)
    token_ids = list(plain.token_ids)
    images = []
    for start, num, content in tiles:
        token_ids[start : start + num] = [PICTURE] * num
        images.append(ImageTile(start, num, content.encode()))
    return replace(plain, token_ids=tuple(token_ids), images=tuple(images))


def _needed(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in outputs_of(engine, ImagesNeeded):
        assert isinstance(output, ImagesNeeded)
        found.setdefault(output.key.request_id, []).extend(i for i, _ in output.tiles)
    return found


def _ready(engine: Engine, name: str, *tiles: int) -> None:
    sequence = engine._sequences.get(key(name))
    asking = sequence.images.asking if sequence is not None and sequence.images is not None else 0
    for tile in tiles:
        engine.handle(ImageReady(key(name), tile, (tile,), asking), 0.0)


def _finish(engine: Engine) -> None:
    while run_step(engine, 1.0) is not None:
        pass


def test_prefill_goes_up_to_the_first_picture_that_has_not_come() -> None:
    engine = make_engine()
    engine.handle(_submit("r1", (5, 3, "a"), (12, 4, "b")), 0.0)
    assert _needed(engine) == {"r1": [0, 1]}
    computed = []
    while (plan := run_step(engine, 1.0)) is not None:
        computed += [(part.start, part.end) for part in plan.chunks]
    # Whole blocks of four first.
    assert computed == [(0, 4), (4, 5)]
    _ready(engine, "r1", 1)
    assert run_step(engine, 1.0) is None
    _ready(engine, "r1", 0)
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert (plan.chunks[0].start, plan.chunks[0].end) == (5, 20)
    assert outputs_of(engine, ImagesReleased) == [ImagesReleased(key("r1"))]
    _finish(engine)
    assert_empty(engine)


def test_who_waits_for_a_picture_lets_others_pass() -> None:
    engine = make_engine()
    engine.handle(_submit("r1", (0, 3, "a"), num_prompt=5), 0.0)
    engine.handle(submit("r2"), 0.1)
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert [part.sequence.key for part in plan.chunks] == [key("r2")]
    _ready(engine, "r1", 0)
    _finish(engine)
    keys = {
        output.key for output in outputs_of(engine, TokensGenerated) if isinstance(output, TokensGenerated)
    }
    assert keys == {key("r1"), key("r2")}
    assert_empty(engine)


def test_the_same_picture_is_cached_and_another_is_not() -> None:
    engine = make_engine(config=CACHED)
    engine.handle(_submit("r1", (2, 8, "a")), 0.0)
    _ready(engine, "r1", 0)
    _finish(engine)
    outputs_of(engine)
    engine.handle(_submit("r2", (2, 8, "a")), 0.0)
    # All that stands for it is in the cache, so its embeddings are not needed.
    assert _needed(engine) == {}
    plan = run_step(engine, 1.0)
    assert plan is not None
    assert plan.chunks[0].start == 19
    engine.handle(_submit("r3", (2, 8, "b")), 0.0)
    assert _needed(engine) == {"r3": [0]}
    _ready(engine, "r3", 0)
    plan = run_step(engine, 1.0)
    assert plan is not None
    # Two tokens of text before it are the same, and copied.
    assert plan.chunks[0].start == 2
    _finish(engine)
    assert_empty(engine)


def test_a_hand_off_is_bound_to_the_pictures() -> None:
    digests = set()
    for content in ("a", "b"):
        engine = make_engine(PREFILL)
        request = replace(
            _submit("r1", (2, 8, content)), phases=PREFILL, handoff=submit("r1", PREFILL).handoff
        )
        engine.handle(request, 0.0)
        _ready(engine, "r1", 0)
        run_step(engine, 1.0)
        [start] = outputs_of(engine, StartTransfer)
        assert isinstance(start, StartTransfer)
        digests.add(start.token_digest)
    assert len(digests) == 2


def test_pictures_that_cannot_be_had_fail_the_request_alone() -> None:
    engine = make_engine()
    engine.handle(_submit("r1", (0, 3, "a")), 0.0)
    engine.handle(submit("r2"), 0.1)
    engine.handle(ImagesLost(key("r1"), FailureCode.INVALID, "too many"), 0.2)
    outputs = outputs_of(engine, RequestFailed, ImagesReleased)
    assert outputs == [ImagesReleased(key("r1")), RequestFailed(key("r1"), FailureCode.INVALID, "too many")]
    _finish(engine)
    assert_empty(engine)


def test_aborted_while_it_waits_it_releases_what_it_asked_for() -> None:
    engine = make_engine()
    engine.handle(_submit("r1", (6, 3, "a")), 0.0)
    run_step(engine, 1.0)
    engine.handle(Abort(key("r1")), 2.0)
    assert outputs_of(engine, ImagesReleased) == [ImagesReleased(key("r1"))]
    # What comes late is nobody's.
    _ready(engine, "r1", 0)
    assert_empty(engine)


def test_preempted_it_asks_again() -> None:
    engine = make_engine(config=replace(CONFIG, growth_reserve=0.0), num_blocks=8)
    engine.handle(_submit("r1", (1, 4, "a"), num_prompt=8, max_new=16), 0.0)
    engine.handle(_submit("r2", (1, 4, "b"), num_prompt=8, max_new=16), 0.1)
    _ready(engine, "r1", 0)
    _ready(engine, "r2", 0)
    outputs_of(engine)
    asked = False
    for _ in range(60):
        if run_step(engine, 1.0) is None:
            break
        if "r2" in _needed(engine):
            asked = True
            _ready(engine, "r2", 0)
    assert engine.num_preemptions > 0
    assert asked
    assert_empty(engine)


def test_what_comes_for_an_earlier_asking_is_not_used() -> None:
    """Its blocks may be others' by now."""
    engine = make_engine(config=replace(CONFIG, growth_reserve=0.0), num_blocks=8)
    engine.handle(_submit("r1", (1, 4, "a"), num_prompt=8, max_new=16), 0.0)
    engine.handle(_submit("r2", (1, 4, "b"), num_prompt=8, max_new=16), 0.1)
    _ready(engine, "r1", 0)
    _ready(engine, "r2", 0)
    outputs_of(engine)
    while "r2" not in _needed(engine):
        assert run_step(engine, 1.0) is not None
    sequence = engine._sequences[key("r2")]
    assert sequence.images is not None
    engine.handle(ImageReady(key("r2"), 0, (99,), 0), 1.0)
    assert sequence.images.block_ids == {}
    _ready(engine, "r2", 0)
    assert sequence.images.block_ids == {0: (0,)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_row_of_a_picture_is_computed_before_it_has_come(data: st.DataObject) -> None:
    """Whatever the order in which pictures come, blocks run out and requests end."""
    engine = make_engine(
        config=replace(CACHED, growth_reserve=0.0), num_blocks=data.draw(st.integers(10, 16))
    )
    wanted: list[tuple[str, int]] = []
    here: set[tuple[str, int]] = set()
    number = 0
    for _ in range(data.draw(st.integers(5, 40))):
        match data.draw(st.sampled_from(["submit", "ready", "step", "step", "abort"])):
            case "submit":
                number += 1
                content = data.draw(st.sampled_from("ab"))
                start = data.draw(st.integers(0, 10))
                tiles = [(start, 4, content), (start + 4 + data.draw(st.integers(0, 2)), 3, "c")]
                engine.handle(_submit(f"r{number}", *tiles, max_new=6), float(number))
            case "ready" if wanted:
                name, tile = wanted.pop(data.draw(st.integers(0, len(wanted) - 1)))
                here.add((name, tile))
                _ready(engine, name, tile)
            case "abort" if number:
                engine.handle(Abort(key(f"r{data.draw(st.integers(1, number))}")), 50.0)
            case _:
                _check_step(engine, here)
        _note(engine, wanted, here)
    for _ in range(400):
        for name, tile in wanted:
            here.add((name, tile))
            _ready(engine, name, tile)
        wanted.clear()
        plan = _check_step(engine, here)
        _note(engine, wanted, here)
        if not plan and not wanted:
            break
    assert_empty(engine)


def _check_step(engine: Engine, here: set[tuple[str, int]]) -> bool:
    plan = engine.schedule(99.0)
    if plan is None:
        return False
    for part in plan.chunks:
        images = part.sequence.images
        assert images is not None
        for tile in images.overlapping(part.start, part.end):
            assert (part.sequence.key.request_id, tile) in here
            assert tile in images.block_ids
    from workers.engine.step_result import StepResult

    engine.complete(plan, StepResult([50] * sum(part.yields_token for part in plan.slices)), 99.0)
    engine.check_invariants()
    return True


def _note(engine: Engine, wanted: list[tuple[str, int]], here: set[tuple[str, int]]) -> None:
    for output in outputs_of(engine, ImagesNeeded, ImagesReleased):
        name = output.key.request_id  # type: ignore[union-attr]
        if isinstance(output, ImagesReleased):
            here.difference_update({one for one in here if one[0] == name})
            wanted[:] = [one for one in wanted if one[0] != name]
        elif isinstance(output, ImagesNeeded):
            wanted += [(name, i) for i, _ in output.tiles]
