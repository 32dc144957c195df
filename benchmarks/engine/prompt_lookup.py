"""The plain way to guess: what followed the last time that the sequence's end stood there. Pure.

Source: prompt lookup decoding; the baseline that the trees are measured against.
"""

from collections.abc import Sequence as SequenceOf

from workers.engine.decoding.draft_tree import DraftTree

#: Longest end of the sequence that is looked for.
MAX_MATCH = 4
#: Chance given to each token if the one before it was right: it has nothing to estimate it from.
CHANCE = 0.6


def lookup_chain(token_ids: SequenceOf[int], max_drafts: int) -> DraftTree:
    """The tokens after the latest earlier place of the longest known end, at most `max_drafts`."""
    num_tokens = len(token_ids)
    best_match, best_start = 0, 0
    for start in range(num_tokens - 1, 0, -1):
        match = 0
        while match < min(MAX_MATCH, start) and token_ids[start - 1 - match] == token_ids[-1 - match]:
            match += 1
        if match > best_match:
            best_match, best_start = match, start
            if match == MAX_MATCH:
                break
    if best_match == 0:
        return DraftTree()
    found = tuple(token_ids[best_start : best_start + max_drafts])
    depths = tuple(range(1, len(found) + 1))
    return DraftTree(found, tuple(range(len(found))), depths, tuple(CHANCE**depth for depth in depths))
