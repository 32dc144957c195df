"""The engine with pictures: what is asked for, when prefill goes on, and what the prefix cache takes for the same."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_embeddings import EngineWithEmbeddings
from tests.support.engine_fakes import (
    BOTH,
    CLAIM_S,
    CONFIG,
    PREFILL,
    assert_empty,
    key,
    make_engine,
    outputs_of,
    run_step,
    submit,
)
from tests.support.kv_memory import KvMemory
from workers.api import (
    Abort,
    CautiousDecoding,
    DecodingMethod,
    FailureCode,
    ImageTile,
    PhaseSet,
    RequestFailed,
    Submit,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.engine.batch import Batch
from workers.engine.engine import Engine
from workers.engine.host_tier import PackedBlock
from workers.engine.messages import (
    ImageReady,
    ImagesGranted,
    ImagesLost,
    ImagesNeeded,
    ImagesReleased,
    StartTransfer,
)
from workers.engine.prefix_index import PrefixMatch
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.step_result import RowDetail, StepResult

CACHED = replace(CONFIG, is_prefix_cache_on=True)
PICTURE = 9


def _submit(
    name: str,
    *tiles: tuple[int, int, str],
    num_prompt: int = 20,
    max_new: int = 3,
    phases: PhaseSet = BOTH,
    first_token: int = 100,
) -> Submit:
    """tiles: start, embeddings, and what they are of."""
    plain = submit(name, phases, num_prompt=num_prompt, max_new=max_new)
    token_ids = list(range(first_token, first_token + num_prompt))
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


def _asking(engine: Engine, name: str) -> int:
    sequence = engine._sequences.get(key(name))
    return sequence.images.asking if sequence is not None and sequence.images is not None else 0


def _grant(engine: Engine, name: str) -> None:
    engine.handle(ImagesGranted(key(name), _asking(engine, name)), 0.0)


def _ready(engine: Engine, name: str, *tiles: int) -> None:
    asking = _asking(engine, name)
    for tile in tiles:
        engine.handle(ImageReady(key(name), tile, (tile,), asking), 0.0)


def _finish(engine: Engine) -> None:
    while run_step(engine, 1.0) is not None:
        pass


def test_prefill_goes_up_to_the_first_picture_that_has_not_come() -> None:
    engine = make_engine()
    engine.handle(_submit("r1", (5, 3, "a"), (12, 4, "b")), 0.0)
    assert _needed(engine) == {"r1": [0, 1]}
    # Before there is room for them it takes neither a place nor blocks.
    assert run_step(engine, 1.0) is None
    assert engine.num_running == 0
    engine.handle(ImagesGranted(key("r1"), asking=7), 0.0)
    assert run_step(engine, 1.0) is None
    _grant(engine, "r1")
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
        match data.draw(st.sampled_from(["submit", "ready", "grant", "step", "step", "abort"])):
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
            case "grant" if wanted:
                _grant(engine, data.draw(st.sampled_from(wanted))[0])
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


# With the store.


def _world(
    *, num_places: int = 4, num_blocks: int = 32, room: int, host_blocks: int = 0
) -> EngineWithEmbeddings:
    """room: blocks of embeddings."""
    packer = KvMemory(num_blocks, CONFIG.block_size).packer
    config = replace(CACHED, growth_reserve=0.0, max_running_sequences=num_places)
    config = replace(config, host_cache_bytes=host_blocks * packer.block_bytes)
    engine = Engine(
        config,
        BOTH,
        num_blocks=num_blocks,
        max_context_tokens=64,
        claim_s=CLAIM_S,
        packer=packer if host_blocks else None,
    )
    return EngineWithEmbeddings(engine, room)


def test_who_has_a_place_does_not_wait_for_who_has_the_embeddings() -> None:
    world = _world(num_places=1, room=2)
    # The first holds all room for embeddings. The second could begin with its text, and would take the only place.
    world.handle(_submit("r1", (0, 8, "a")))
    world.handle(_submit("r2", (8, 8, "b"), first_token=200))
    world.run(encodes=False)
    assert world.engine.num_running == 0
    world.run()
    assert world.ended == {"r1": "", "r2": ""}
    world.check_empty()


def test_when_kv_is_gone_that_was_known_all_is_asked_for_anew() -> None:
    world = _world(num_blocks=16, room=3)
    for name, content, first in (("r1", "a", 100), ("r2", "b", 200)):
        world.handle(_submit(name, (4, 8, content), num_prompt=13, first_token=first, max_new=1))
    world.run()
    world.asked.clear()
    # Of the first picture the KV is known, so the second alone is asked for.
    world.handle(_submit("r3", (4, 8, "a"), (14, 4, "c"), first_token=100, max_new=1))
    world.handle(_submit("r4", (4, 8, "b"), (14, 4, "d"), first_token=200, max_new=1))
    world.deliver()
    assert world.asked == [("r3", [1]), ("r4", [1])]
    # Meanwhile others take the blocks. With both needs held and more asked for, neither would ever get it.
    world.engine._batch.waiting.sort(key=lambda one: one.rank)
    fill = replace(submit("r5", num_prompt=60, max_new=1), token_ids=tuple(range(1000, 1060)), priority=9)
    world.handle(fill)
    world.run(encodes=False)
    assert "r5" in world.ended
    world.run()
    assert world.ended == dict.fromkeys(("r1", "r2", "r3", "r4", "r5"), "")
    assert ("r3", [0, 1]) in world.asked
    assert ("r4", [0, 1]) in world.asked
    world.check_empty()
    assert_empty(world.engine)


def test_prompts_that_lack_pictures_leave_places_to_others() -> None:
    world = _world(num_places=4, num_blocks=64, room=16)
    for i in range(4):
        world.handle(_submit(f"r{i}", (6, 8, f"{i}"), first_token=100 * (i + 1)))
    world.run(encodes=False)
    assert world.engine.num_running == 1
    world.handle(submit("text"))
    world.run(encodes=False)
    assert world.ended == {"text": ""}
    world.run()
    assert len(world.ended) == 5
    world.check_empty()


def test_who_waits_for_pictures_is_looked_at_again_when_one_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _world(num_blocks=64, room=32)
    for i in range(5):
        world.handle(_submit(f"r{i}", (0, 8, f"{i}"), (8, 8, f"other {i}")))
    looks: list[str] = []
    match = Batch.match

    def count(batch: Batch, sequence: Sequence) -> PrefixMatch:
        looks.append(sequence.key.request_id)
        return match(batch, sequence)

    monkeypatch.setattr(Batch, "match", count)
    assert world.step() is None
    assert looks == []
    # There is room: each is looked at once.
    world.deliver()
    for _ in range(3):
        assert world.step() is None
    assert looks == [f"r{i}" for i in range(5)]
    # A second tile alone is not enough to begin with.
    looks.clear()
    world.encode(world.wanted.index((key("r2"), 1)))
    world.deliver()
    for _ in range(3):
        assert world.step() is None
    assert looks == ["r2"]
    monkeypatch.undo()
    world.run()
    assert len(world.ended) == 5


def test_what_the_host_tier_cannot_put_back_is_asked_for_anew() -> None:
    """A prompt that was admitted with less than was known gives up its place again, hand-off or not."""
    world = _world(num_blocks=8, room=8, host_blocks=16)
    world.handle(_submit("r1", (4, 20, "a"), num_prompt=27, max_new=1))
    world.run()
    # Its blocks go to host memory.
    fill = replace(submit("r2", num_prompt=31, max_new=1), token_ids=tuple(range(1000, 1031)))
    world.handle(fill)
    world.run()
    world.asked.clear()
    world.handle(_submit("r3", (4, 20, "a"), num_prompt=27, phases=PREFILL))
    assert world.asked == []
    pool = world.engine.pool
    find_saved, num_looks = pool.find_saved, 0

    def lose_some(parents: list[bytes], token_ids: list[int], num_known: int) -> list[PackedBlock]:
        nonlocal num_looks
        num_looks += 1
        found = find_saved(parents, token_ids, num_known)
        return found[:2] if num_looks == 2 else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "find_saved", lose_some)
        assert world.step() is None
        assert num_looks == 2
    assert world.asked == [("r3", [0])]
    assert world.engine.num_running == 0
    world.run()
    assert world.ended == {"r1": "", "r2": "", "r3": ""}
    world.check_empty()
    assert_empty(world.engine)


@pytest.mark.parametrize(
    ("decoding", "detail"),
    [
        (None, RowDetail()),
        (CautiousDecoding(max_branches=2, max_branch_tokens=2), RowDetail(branches=((50, -0.1), (51, -0.2)))),
        (SuperposedDecoding(num_drafts=2), RowDetail(top=((50, -0.1), (51, -2.5)))),
    ],
)
@pytest.mark.parametrize("phases", [BOTH, PREFILL])
def test_embeddings_are_given_back_when_the_prompt_is_computed(
    decoding: DecodingMethod | None, detail: RowDetail, phases: PhaseSet
) -> None:
    engine = make_engine()
    request = _submit("r1", (0, 4, "a"), num_prompt=8, max_new=9, phases=phases)
    engine.handle(replace(request, sampling=replace(request.sampling, decoding=decoding)), 0.0)
    _ready(engine, "r1", 0)
    plan = engine.schedule(1.0)
    assert plan is not None
    engine.complete(plan, StepResult([50], {0: detail}), 1.0)
    assert outputs_of(engine, ImagesReleased) == [ImagesReleased(key("r1"))]
    assert engine._sequences[key("r1")].state is not SequenceState.PREFILL


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_all_requests_end_when_places_blocks_and_room_for_embeddings_are_scarce(data: st.DataObject) -> None:
    world = _world(
        num_places=data.draw(st.integers(1, 3)),
        num_blocks=data.draw(st.integers(9, 16)),
        room=data.draw(st.integers(2, 4)),
        host_blocks=data.draw(st.sampled_from([0, 6])),
    )
    number = 0
    for _ in range(data.draw(st.integers(5, 50))):
        match data.draw(st.sampled_from(["submit", "submit", "deliver", "encode", "step", "step", "abort"])):
            case "submit":
                number += 1
                world.handle(_draw_submit(data, f"r{number}"))
            case "deliver":
                world.deliver(data.draw(st.integers(1, 3)))
            case "encode" if world.wanted:
                index = data.draw(st.integers(0, len(world.wanted) - 1))
                world.encode(index, succeeds=data.draw(st.sampled_from([True, True, False])))
            case "abort" if number:
                name = f"r{data.draw(st.integers(1, number))}"
                world.ended.setdefault(name, "aborted")
                world.handle(Abort(key(name)))
            case _:
                world.step()
    world.run(max_steps=600)
    assert set(world.ended) == {f"r{i}" for i in range(1, number + 1)}
    assert_empty(world.engine)
    world.check_empty()


def _draw_submit(data: st.DataObject, name: str) -> Submit:
    """Prompts that begin alike, with pictures that several have, or none."""
    start = data.draw(st.sampled_from([0, 4, 6]))
    contents = data.draw(st.sampled_from(["", "a", "b", "ab", "ac", "bd"]))
    sizes = {"a": 5, "b": 4, "c": 3, "d": 5}
    tiles = [(start + 6 * i, sizes[content], content) for i, content in enumerate(contents)]
    request = _submit(
        name,
        *tiles,
        num_prompt=data.draw(st.integers(18, 24)),
        max_new=data.draw(st.integers(1, 8)),
        phases=data.draw(st.sampled_from([BOTH, BOTH, PREFILL])),
        first_token=data.draw(st.sampled_from([100, 200])),
    )
    return replace(request, priority=data.draw(st.integers(0, 1)))
