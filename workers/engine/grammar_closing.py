"""Finds a short way from a state of a grammar to its end, so that a text can be closed within its budget."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

#: Points kept at once, ways tried to find them, and ways of one kind out of each. An open JSON object of three
#: fields takes 3 ms of one core at 49152 tokens; a search that fails at 64 tokens took up to 90 ms.
BEAM_WIDTH = 4
MAX_TRIED_WAYS = 24
MAX_OF_A_KIND = 3
MAX_CLOSER_BYTES = 4

#: What ends a text within JSON: a bracket there is more text.
QUOTE = b'"'
#: Other tokens from the first to be tried to the last: what ends a line, what ends things within it, what
#: separates them, the rest.
LINE_END = b"\n"
CLOSERS = b'"}])>'
SEPARATORS = b",:;"
QUOTE_PENALTY, PART_PENALTY, TEXT_PENALTY = 0, 1, 3
#: For a token after which the same tokens may follow as before: most likely the same text is still open.
SAME_PENALTY = 2

Mask = npt.NDArray[np.uint32]


def is_allowed(mask: Mask, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether the mask, one bit for each token, has the bits of these tokens."""
    shifts = (token_ids & 31).astype(np.uint32)
    result: npt.NDArray[np.bool_] = ((mask[token_ids >> 5] >> shifts) & np.uint32(1)).astype(np.bool_)
    return result


class ClosingSearch:
    """Looks for closing paths in the vocabulary of one tokenizer. Its methods can run in any thread."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        ranked: list[tuple[int, int, int, int]] = []
        for token_id in range(vocab_size):
            if tokenizer.is_special_token(token_id):
                continue
            text = tokenizer.decode_bytes([token_id])
            if (rank := _rank(text)) is not None:
                ranked.append((*rank, len(text), token_id))
        ranked.sort()
        self._token_ids = np.array([token_id for *_, token_id in ranked], dtype=np.int64)
        self._kinds = [(penalty, place) for penalty, place, *_ in ranked]
        self._num_words = -(-vocab_size // 32)

    def find(self, matcher: LLMatcher, max_tokens: int) -> tuple[int, ...] | None:
        """Tokens that take `matcher` to a complete text, empty if it is there; None if none are found.

        A beam search: it tries what ends things before what goes on, follows what is forced at once, and
        gives up past `max_tokens`. What it finds is a completion, not always the shortest; that it finds
        none does not prove that there is none. Deterministic. `matcher` stays as it is.
        """
        if matcher.is_accepting():
            return ()
        seen: set[bytes] = set()
        beam = self._beam([_Way(0, (), matcher, (), ())], seen)
        while beam:
            complete = [point.path for point in beam if point.matcher.is_accepting()]
            if complete:
                return min(complete, key=len)
            ways = [
                _Way(point.penalty + penalty, point.path, point.matcher, token_ids, point.trail)
                for point in beam
                for penalty, token_ids in self._ways_on(point)
                if len(point.path) + len(token_ids) <= max_tokens
            ]
            # The sort is stable: among equals the first way of each point comes first.
            ways.sort(key=lambda way: (way.penalty, len(way.path) + len(way.token_ids)))
            beam = self._beam(ways, seen)
        return None

    def _beam(self, ways: list["_Way"], seen: set[bytes]) -> list["_Point"]:
        """The points that the first BEAM_WIDTH ways lead to, of those that differ in what may follow.

        Points that allow the same tokens mostly are the same state, so of two the later one is left out,
        unless it is further on the way of the first, as within a number of twenty digits.
        seen: masks of all points so far; gets those of the new ones.
        """
        points: dict[bytes, _Point] = {}
        for way in ways[:MAX_TRIED_WAYS]:
            if len(points) == BEAM_WIDTH:
                break
            matcher = way.matcher.deep_copy()
            if matcher.try_consume_tokens(list(way.token_ids)) != len(way.token_ids):
                continue
            mask = np.zeros(self._num_words, dtype=np.uint32)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                continue
            bits = mask.tobytes()
            if bits in points or (bits in seen and bits not in way.trail):
                continue
            penalty = way.penalty + (SAME_PENALTY if way.trail[-1:] == (bits,) else 0)
            points[bits] = _Point(penalty, way.path + way.token_ids, matcher, (*way.trail, bits))
        seen.update(points)
        return list(points.values())

    def _ways_on(self, point: "_Point") -> list[tuple[int, tuple[int, ...]]]:
        """(penalty, tokens) of what is worth trying next."""
        if forced := point.matcher.compute_ff_tokens():
            return [(0, tuple(forced))]
        mask = np.frombuffer(point.trail[-1], dtype=np.uint32)
        num_of_kind: Counter[tuple[int, int]] = Counter()
        ways: list[tuple[int, tuple[int, ...]]] = []
        # No kind crowds out another: a text may go on with dozens of tokens of brackets.
        for i in np.flatnonzero(is_allowed(mask, self._token_ids)).tolist():
            num_of_kind[self._kinds[i]] += 1
            if num_of_kind[self._kinds[i]] <= MAX_OF_A_KIND:
                ways.append((self._kinds[i][0], (int(self._token_ids[i]),)))
        if ways:
            return ways
        others = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return [(TEXT_PENALTY, (int(token_id),)) for token_id in others[: 3 * MAX_OF_A_KIND]]


@dataclass(frozen=True, slots=True)
class _Point:
    """Somewhere on a way: the tokens that led there and what may follow."""

    penalty: int
    path: tuple[int, ...]
    matcher: LLMatcher
    #: Masks of the points on its way, its own last.
    trail: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Way:
    """What to try next from a point; it is followed when its turn comes."""

    penalty: int
    path: tuple[int, ...]
    matcher: LLMatcher
    token_ids: tuple[int, ...]
    trail: tuple[bytes, ...]


def _rank(text: bytes) -> tuple[int, int] | None:
    """(penalty, place among equals) of a token; None for one that is not tried first."""
    if 0 < len(text) <= MAX_CLOSER_BYTES and not text.strip(CLOSERS):
        return (QUOTE_PENALTY, 0) if text.startswith(QUOTE) else (PART_PENALTY, 1)
    if text == LINE_END:
        return PART_PENALTY, 0
    if len(text) != 1:
        return None
    if text in SEPARATORS:
        return PART_PENALTY, 2 + SEPARATORS.index(text)
    # A digit ends numbers, a letter words, a space neither; bytes of longer characters need more to follow.
    place = 0 if text.isdigit() else 1 if text.isalpha() else 2 if text[0] < 128 else 3
    return TEXT_PENALTY, place
