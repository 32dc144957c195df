"""Which drafts a step of the model confirms. Pure.

The token of each row was sampled as in a step of one token: from the row's logits, with the options of the
request applied to the path that leads there, and with the number that the generator gives for the
row's position. A path is followed while it agrees with what was sampled. What comes out is then what
one-by-one decoding samples, token for token, whatever the drafts were: they decide how far it gets in one step,
never which token is drawn.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from workers.engine.decoding.draft_tree import DraftTree


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one step of drafts brought.

    token_ids: new tokens, at least one; the last one has no KV yet.
    rows: as many; the KV of rows[i] belongs at the position of row 0 plus i, that of all others is dropped.
    """

    token_ids: tuple[int, ...]
    rows: tuple[int, ...]


def walk(
    tree: DraftTree, sampled: SequenceOf[int], *, stop_token_ids: frozenset[int], max_tokens: int
) -> Accepted:
    """Follow the sampled tokens down the tree until one has no draft, stops, or fills the limit.

    sampled: the token of each row, num_drafts + 1. max_tokens: what the sequence may still get, >= 1.
    A token that is no draft, such as NO_TOKEN, ends the walk as the last of the result.
    """
    assert len(sampled) == tree.num_drafts + 1
    assert max_tokens >= 1
    children = {
        (parent, token_id): row
        for row, (parent, token_id) in enumerate(zip(tree.parents, tree.token_ids, strict=True), start=1)
    }
    rows = [0]
    token_ids = [sampled[0]]
    while len(token_ids) < max_tokens and token_ids[-1] not in stop_token_ids:
        row = children.get((rows[-1], token_ids[-1]))
        if row is None:
            break
        rows.append(row)
        token_ids.append(sampled[row])
    return Accepted(tuple(token_ids), tuple(rows))
