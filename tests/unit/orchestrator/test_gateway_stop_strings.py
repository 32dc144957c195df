"""Stop strings in text that comes in pieces."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.stop_strings import StopSearch, StopStrings

pieces_of_text = st.lists(st.text("abc", max_size=4), max_size=12)
some_strings = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=5)


def searched(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """Text and stop string of the whole search."""
    search = StopSearch(StopStrings(strings))
    texts: list[str] = []
    for piece in pieces:
        text, stop = search.push(piece)
        texts.append(text)
        if stop is not None:
            return "".join(texts), stop
    return "".join(texts) + search.finish(), None


@given(some_strings, pieces_of_text)
def test_how_text_is_cut_into_pieces_makes_no_difference(strings: list[str], pieces: list[str]) -> None:
    assert searched(strings, pieces) == searched(strings, ["".join(pieces)])


@given(some_strings, pieces_of_text)
def test_no_stop_string_is_in_the_text_and_all_before_it_is(strings: list[str], pieces: list[str]) -> None:
    text, stop = searched(strings, pieces)
    assert not any(string in text for string in strings)
    whole = "".join(pieces)
    assert whole == text if stop is None else whole.startswith(text + stop)


@given(some_strings, pieces_of_text)
def test_where_none_contains_another_the_first_occurrence_ends_the_text(
    strings: list[str], pieces: list[str]
) -> None:
    apart = [one for one in strings if not any(other in one for other in strings if other != one)]
    whole = "".join(pieces)
    places = [whole.find(string) for string in apart if string in whole]
    assert searched(apart, pieces)[0] == whole[: min(places, default=len(whole))]


@given(some_strings, st.text("abc", max_size=20))
def test_no_more_is_held_back_than_may_begin_a_stop_string(strings: list[str], whole: str) -> None:
    search = StopSearch(StopStrings(strings))
    for i, character in enumerate(whole):
        stop = search.push(character, can_stop=False)[1]
        assert stop is None
        seen = whole[: i + 1]
        held = max(
            (k for string in strings for k in range(len(string)) if seen.endswith(string[:k])), default=0
        )
        assert len(search.finish()) == held or seen.endswith(tuple(strings))


@pytest.mark.parametrize(
    ("strings", "text", "expected"),
    [
        (["ab", "abc"], "xabc", ("x", "ab")),
        (["bc", "abc"], "xabc", ("x", "abc")),
        (["b", "abc"], "xabc", ("xa", "b")),
        (["aab"], "aaab", ("a", "aab")),
        (["zz"], "xabc", ("xabc", None)),
    ],
)
def test_the_string_complete_first_wins_and_then_the_longest(
    strings: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    assert searched(strings, list(text)) == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


class Counted(dict[str, int]):
    """Counts look-ups."""

    num_looked_up = 0

    def get(self, key: str, default: Any = None) -> Any:
        Counted.num_looked_up += 1
        return super().get(key, default)


def test_long_stop_strings_cost_two_steps_per_character_at_most() -> None:
    stops = StopStrings(["a" * 2000 + "b", "a" * 1000 + "c", "ca" * 300])
    stops.children = [Counted(children) for children in stops.children]
    search = StopSearch(stops)
    Counted.num_looked_up = 0
    text = ("a" * 1999 + "x" + "ca" * 299) * 5
    assert "".join(search.push(character)[0] for character in text) + search.finish() == text
    assert Counted.num_looked_up <= 2 * len(text)
