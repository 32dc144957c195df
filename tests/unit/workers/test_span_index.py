"""Spans that are found are what the blocks hold; and nothing long enough is missed."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.block_hash import block_hash, root_hash
from workers.engine.span_reuse.span_index import MAX_PLACES, MIN_SPAN_TOKENS, Span, SpanIndex, window_hashes

ROOT = root_hash("m", "t", "")
OTHER_ROOT = root_hash("m", "t", "another tenant")


@dataclass
class World:
    """An index, and what was put into it."""

    block_size: int = 16
    sequences: list[tuple[bytes, list[int], list[int]]] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.index = SpanIndex(self.block_size)
        self.held: dict[int, tuple[bytes, int, list[int]]] = {}
        self._next = 0

    def add(self, token_ids: list[int], root: bytes = ROOT) -> list[int]:
        """Full blocks of a sequence, each with a new id unless a block of that name is known."""
        size, parent, block_ids = self.block_size, root, []
        for position in range(0, len(token_ids) - size + 1, size):
            part = token_ids[position : position + size]
            name = block_hash(parent, part)
            known = next((i for i, (other, _, _) in self.held.items() if other == name), None)
            if known is None:
                known, self._next = self._next, self._next + 1
                self.index.add(known, root=root, name=name, parent=parent, position=position, token_ids=part)
                self.held[known] = (name, position, part)
            block_ids.append(known)
            parent = name
        self.sequences.append((root, token_ids, block_ids))
        return block_ids

    def remove(self, block_id: int) -> None:
        self.index.remove(block_id)
        del self.held[block_id]

    def find(
        self, token_ids: list[int], root: bytes = ROOT, start: int = 0, end: int | None = None
    ) -> list[Span]:
        bounds = start, len(token_ids) if end is None else end
        spans = self.index.find(root, token_ids, *bounds, lambda block_id: block_id not in self.pending)
        self.check(token_ids, spans, *bounds)
        return spans

    def check(self, token_ids: list[int], spans: list[Span], start: int, end: int) -> None:
        """Every token of a span is where it says, at the position that it says."""
        at = start
        for span in spans:
            assert at <= span.start
            assert span.num_tokens >= MIN_SPAN_TOKENS
            at = span.end
            for i in range(span.num_tokens):
                block, offset = divmod(span.offset + i, self.block_size)
                _, position, tokens = self.held[span.block_ids[block]]
                assert span.block_ids[block] not in self.pending
                assert tokens[offset] == token_ids[span.start + i]
                assert position + offset == span.old_start + i
            assert len(span.block_ids) == (span.offset + span.num_tokens - 1) // self.block_size + 1
        assert at <= end
        self.index.check_invariants()


def numbers(first: int, num: int) -> list[int]:
    return list(range(first, first + num))


def test_a_document_in_the_middle_of_another_prompt_is_found_whole() -> None:
    world = World()
    document = numbers(1000, 100)
    known = [*numbers(0, 7), *document, *numbers(500, 21)]
    table = world.add(known)
    prompt = [*numbers(200, 40), *document, *numbers(300, 9)]
    (span,) = world.find(prompt)
    assert (span.start, span.num_tokens, span.old_start, span.offset) == (40, 100, 7, 7)
    assert span.block_ids == tuple(table[:7])


def test_what_another_tenant_computed_is_not_found() -> None:
    world = World()
    document = numbers(1000, 100)
    world.add(document, OTHER_ROOT)
    assert world.find([1, *document]) == []
    assert world.find([1, *document], OTHER_ROOT) != []


def test_both_of_two_documents_are_found_in_another_order() -> None:
    world = World()
    first, second = numbers(1000, 64), numbers(2000, 70)
    world.add([*first, *second])
    spans = world.find([5, *second, 6, 7, *first, 8])
    # The last blocks that are known end before the last tokens.
    assert [(span.start, span.num_tokens, span.old_start) for span in spans] == [(1, 64, 64), (73, 64, 0)]


@pytest.mark.parametrize("block_size", [4, 16, 17, 24, 32, 40])
@pytest.mark.parametrize("offset", range(0, 48, 7))
def test_the_shortest_span_is_found_wherever_it_lies(block_size: int, offset: int) -> None:
    world = World(block_size)
    world.add(numbers(1000, 200))
    prompt = [*numbers(0, 5), *numbers(1000 + offset, MIN_SPAN_TOKENS), 0]
    (span,) = world.find(prompt)
    assert (span.start, span.num_tokens, span.old_start) == (5, MIN_SPAN_TOKENS, offset)


def test_a_shorter_one_is_not() -> None:
    world = World()
    world.add(numbers(1000, 200))
    assert world.find([1, *numbers(1016, MIN_SPAN_TOKENS - 1), 2]) == []


def test_only_what_was_asked_for_is_found() -> None:
    world = World()
    document = numbers(1000, 160)
    world.add(document)
    (span,) = world.find([1, *document], start=11, end=100)
    assert (span.start, span.end, span.old_start) == (11, 100, 10)


def test_a_removed_block_cuts_what_is_found() -> None:
    world = World()
    document = numbers(1000, 160)
    table = world.add(document)
    world.remove(table[4])
    spans = world.find([1, *document])
    assert [(span.old_start, span.num_tokens) for span in spans] == [(0, 64), (80, 80)]
    for block_id in (*table[:4], *table[5:]):
        world.remove(block_id)
    assert world.find([1, *document]) == []
    assert world.index.block_ids() == ()


def test_a_block_that_is_not_computed_yet_is_not_found() -> None:
    world = World()
    document = numbers(1000, 160)
    table = world.add(document)
    world.pending = {table[0], table[9]}
    (span,) = world.find([1, *document])
    assert (span.old_start, span.num_tokens) == (16, 128)


def test_the_longest_of_several_places_is_taken() -> None:
    world = World()
    document = numbers(1000, 128)
    world.add([*document[:48], *numbers(10, 32)])
    world.add([0, *document])
    world.add([7, 7, *document[:64]])
    (span,) = world.find([5, 5, 5, *document])
    assert (span.old_start, span.num_tokens) == (1, 127)


def test_places_of_a_window_that_is_everywhere_are_bounded() -> None:
    world = World()
    for i in range(3 * MAX_PLACES):
        world.add([i + 1] + [0] * 100)
    world.index.check_invariants()
    (span,) = world.find([0] * 60)
    assert span.num_tokens == 60


def test_removing_what_is_not_known_does_nothing() -> None:
    World().index.remove(3)


def test_hashes_of_windows_depend_on_order_and_place_nothing_else() -> None:
    hashes = window_hashes([1, 2, 3, 1, 2, 3, 2, 1], 3)
    assert len(hashes) == 6
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 5
    assert len(window_hashes([1, 2], 3)) == 0


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[int]]:
    """Sequences and a prompt of pieces of a few documents, so that much of it is common."""
    world = World(draw(st.sampled_from([4, 8, 16, 20])))
    documents = [draw(st.lists(st.integers(0, 5), min_size=20, max_size=90)) for _ in range(3)]

    def text() -> list[int]:
        pieces = []
        for _ in range(draw(st.integers(1, 4))):
            document = draw(st.sampled_from(documents))
            first = draw(st.integers(0, len(document) - 1))
            pieces += document[first : draw(st.integers(first, len(document)))]
        return pieces

    for _ in range(draw(st.integers(0, 4))):
        world.add(text(), draw(st.sampled_from([ROOT, ROOT, OTHER_ROOT])))
    for block_id in draw(st.sets(st.sampled_from(sorted(world.held)), max_size=4)) if world.held else ():
        world.remove(block_id)
    return world, text()


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_no_long_span_is_left_between_those_that_are_found(case: tuple[World, list[int]]) -> None:
    world, prompt = case
    spans = world.find(prompt)
    known = stretches(world)
    gaps = [0, *(edge for span in spans for edge in (span.start, span.end)), len(prompt)]
    for first, end in zip(gaps[::2], gaps[1::2], strict=True):
        for start in range(first, end - MIN_SPAN_TOKENS + 1):
            window = prompt[start : start + MIN_SPAN_TOKENS]
            assert not any(contains(stretch, window) for stretch in known)


def stretches(world: World) -> list[list[int]]:
    """What the tenant's sequences hold without a break."""
    found = []
    for root, token_ids, table in world.sequences:
        run: list[int] = []
        for i, block_id in enumerate(table):
            if block_id not in world.held or root != ROOT:
                found.append(run)
                run = []
            else:
                run += token_ids[i * world.block_size : (i + 1) * world.block_size]
        found.append(run)
    return found


def contains(stretch: list[int], window: list[int]) -> bool:
    return any(stretch[i : i + len(window)] == window for i in range(len(stretch) - len(window) + 1))
