"""Finds stop strings in text that arrives in pieces. Pure."""

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """An automaton over the stop strings of one request; the samples of a request share it.

    Constant time per character, however many strings there are and however long they are.
    Raises ValueError for an empty string. Source: Aho and Corasick, CACM 18(6), 1975.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        # A node is a beginning of some string; node 0 is the empty one.
        self.children: list[dict[str, int]] = [{}]
        #: The node of the longest proper suffix that is a node too.
        self.suffix: list[int] = [0]
        #: Characters that led to the node.
        self.depth: list[int] = [0]
        #: Length of the longest string that ends at the node; 0 when none does.
        self.match: list[int] = [0]
        for string in strings:
            if not string:
                raise ValueError("a stop string is empty; allowed: at least one character")
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            child = self.children[node].get(character)
            if child is None:
                child = len(self.children)
                self.children[node][character] = child
                self.children.append({})
                self.suffix.append(0)
                self.depth.append(self.depth[node] + 1)
                self.match.append(0)
            node = child
        self.match[node] = self.depth[node]

    def _link(self) -> None:
        """Suffixes, level by level, as those of a node lie on levels above it."""
        nodes = deque(self.children[0].values())
        while nodes:
            node = nodes.popleft()
            self.match[node] = self.match[node] or self.match[self.suffix[node]]
            for character, child in self.children[node].items():
                self.suffix[child] = self.step(self.suffix[node], character)
                nodes.append(child)

    def step(self, node: int, character: str) -> int:
        """The node after one more character: the longest end of the text that begins some string."""
        children, suffix = self.children, self.suffix
        while True:
            child = children[node].get(character)
            if child is not None:
                return child
            if node == 0:
                return 0
            node = suffix[node]


class StopSearch:
    """Lets the text of one sample through up to the first stop string.

    The string that is complete first wins; of those that end with the same character, the longest. Where no
    string contains another one, this is the first occurrence of any. What may be the beginning of a stop
    string is held back until that is decided.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._first = frozenset(stops.children[0])
        self._node = 0
        self._held = ""

    def push(self, piece: str, *, can_stop: bool = True) -> tuple[str, str | None]:
        """The text that is decided now, and the stop string that ended it.

        can_stop: stop strings that end in this piece count; otherwise they are text.
        """
        if self._node == 0 and self._first.isdisjoint(piece):
            return piece, None
        stops, node = self._stops, self._node
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            node = stops.step(node, character)
            if stops.match[node]:
                if can_stop:
                    begin = end - stops.match[node]
                    return text[:begin], text[begin:end]
                while not stops.children[node] and node:
                    node = stops.suffix[node]
        self._node = node
        num_decided = len(text) - stops.depth[node]
        self._held = text[num_decided:]
        return text[:num_decided], None

    def finish(self) -> str:
        """No more text comes: what was held back."""
        return self._held
