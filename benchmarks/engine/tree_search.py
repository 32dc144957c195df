"""ADED's draft tree: a Monte Carlo tree search over the n-gram table. Pure and deterministic.

`likeliest_tree` finds better trees in a tenth of the time and is what the engine uses; this one is kept to measure
against. Source: ADED (arXiv 2407.12021), whose rollouts are replaced by the likeliest successor: nothing is drawn.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from workers.engine.decoding.draft_tree import DraftTree, chances_after
from workers.engine.decoding.ngram_table import NgramTable

#: Constants of ADED's code: depth, and the two of the exploration term.
MAX_DEPTH = 4
EXPLORATION_BASE = 32.0
EXPLORATION_SCALE = 8.0
#: Bounds the time: about 10 microseconds each. ADED's code has 150.
MAX_ITERATIONS = 64
#: Successors tried of one node.
MAX_CHILDREN = 4


@dataclass(slots=True)
class _Node:
    """score: sum of the rewards of the searches that came through."""

    context: tuple[int, ...]
    depth: int
    chance: float = 1.0
    visits: int = 0
    score: float = 0.0
    #: None until the node is opened.
    children: "dict[int, _Node] | None" = None


@dataclass(slots=True)
class _Search:
    table: NgramTable
    known: dict[tuple[int, ...], list[tuple[int, float]]] = field(default_factory=dict)

    def chances(self, context: tuple[int, ...]) -> list[tuple[int, float]]:
        """`chances_after`, looked up once in a search."""
        found = self.known.get(context)
        if found is None:
            found = self.known[context] = chances_after(self.table, context)[:MAX_CHILDREN]
        return found

    def after(self, context: tuple[int, ...], token_id: int) -> tuple[int, ...]:
        """The context one token later."""
        return (*context, token_id)[-self.table.max_context :]

    def open(self, node: _Node) -> None:
        """Give a node its children."""
        node.children = {}
        if node.depth < MAX_DEPTH:
            for token_id, chance in self.chances(node.context):
                node.children[token_id] = _Node(self.after(node.context, token_id), node.depth + 1, chance)

    def rollout(self, node: _Node) -> float:
        """Sum of the chances of the likeliest way on, down to the full depth."""
        total, context = 0.0, node.context
        for _ in range(node.depth, MAX_DEPTH):
            chances = self.chances(context)
            if not chances:
                break
            token_id, chance = chances[0]
            total += chance
            context = self.after(context, token_id)
        return total

    def run_once(self, root: _Node) -> None:
        """Select down to a leaf, open it, roll out, and add the reward to every node of the way."""
        way = [root]
        while way[-1].children:
            way.append(_best_child(way[-1]))
        if way[-1].children is None:
            self.open(way[-1])
        reward = 1.0 + sum(node.chance for node in way[1:]) + self.rollout(way[-1])
        for node in way:
            node.visits += 1
            node.score += reward


def _best_child(node: _Node) -> _Node:
    """By PUCT; a child never visited comes first, of equals the likelier by the table."""
    assert node.children
    explore = math.log((node.visits + EXPLORATION_SCALE + 1) / EXPLORATION_SCALE) + EXPLORATION_BASE
    explore *= math.sqrt(node.visits)
    best, best_value = None, -1.0
    for child in node.children.values():
        if child.visits == 0:
            return child
        value = child.score / child.visits + explore * child.chance / (1 + child.visits)
        if value > best_value:
            best, best_value = child, value
    assert best is not None
    return best


def searched_tree(table: NgramTable, token_ids: SequenceOf[int], max_drafts: int) -> DraftTree:
    """The most visited nodes of the search, at most `max_drafts`; none if the table knows nothing.

    token_ids: the end of the sequence, at least as long as the table's contexts if there is so much.
    """
    root = _Node(tuple(token_ids[-table.max_context :]), 0)
    search = _Search(table)
    search.open(root)
    if not root.children:
        return DraftTree()
    for _ in range(MAX_ITERATIONS):
        search.run_once(root)
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    chances: list[float] = []
    # Of the nodes whose parent is taken, the most visited is taken next.
    open_nodes = [(0, 1.0, token_id, child) for token_id, child in root.children.items()]
    while open_nodes and len(tokens) < max_drafts:
        best = max(range(len(open_nodes)), key=lambda i: open_nodes[i][3].visits)
        parent, chance, token_id, node = open_nodes.pop(best)
        if node.visits == 0:
            break
        chance *= node.chance
        tokens.append(token_id)
        parents.append(parent)
        depths.append(node.depth)
        chances.append(chance)
        children = (node.children or {}).items()
        open_nodes += [(len(tokens), chance, child_id, child) for child_id, child in children]
    return DraftTree(tuple(tokens), tuple(parents), tuple(depths), tuple(chances))
