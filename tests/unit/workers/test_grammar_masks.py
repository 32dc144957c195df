"""Masks of a step are what each row's grammar allows; rows without one are left alone."""

import threading

import pytest
import torch

from tests.support.grammar_world import EOS, shared_compiler
from workers.api import Grammar, GrammarKind
from workers.engine.grammar import GrammarState
from workers.engine.grammar_masks import GrammarMasks


def start(pattern: str) -> GrammarState:
    return shared_compiler("level")[1].compile(Grammar(GrammarKind.REGEX, pattern)).start(max_new_tokens=500)


def token(text: str) -> int:
    (token_id,) = shared_compiler("level")[0].encode(text).ids
    return token_id


@pytest.fixture
def masks():
    vocab_size = shared_compiler("level")[0].get_vocab_size() + 5
    made = GrammarMasks(vocab_size)
    yield made
    made.close()


def logits(num_rows: int) -> torch.Tensor:
    return torch.zeros(num_rows, shared_compiler("level")[0].get_vocab_size() + 5)


def test_each_row_gets_its_own_mask_and_rows_without_a_grammar_none(masks: GrammarMasks) -> None:
    complete = start("xy?")
    complete.accept([token("x")])
    rows = logits(4)
    masks.begin([start("[ab]"), None, complete, None])
    masks.rule_out(rows)
    assert torch.isfinite(rows[1]).all()
    assert torch.isfinite(rows[3]).all()
    # "ab" is a token too, and two letters are one too many.
    assert set(torch.isfinite(rows[0]).nonzero().flatten().tolist()) == {token("a"), token("b")}
    assert set(torch.isfinite(rows[2]).nonzero().flatten().tolist()) == {token("y"), EOS}


def test_a_step_without_grammars_starts_no_thread(masks: GrammarMasks) -> None:
    before = threading.active_count()
    rows = logits(2)
    masks.begin([None, None])
    masks.rule_out(rows)
    assert torch.isfinite(rows).all()
    assert threading.active_count() == before


def test_a_row_whose_state_failed_is_ruled_out_entirely(masks: GrammarMasks) -> None:
    state = start("[ab]")
    state._fail("too many states")
    rows = logits(2)
    masks.begin([state, start("[ab]")])
    masks.rule_out(rows)
    assert torch.isinf(rows[0]).all()
    assert torch.isfinite(rows[1]).any()


def test_dropped_masks_leave_room_for_the_next_step(masks: GrammarMasks) -> None:
    masks.begin([start("[ab]")])
    masks.drop()
    rows = logits(1)
    masks.begin([start("c")])
    masks.rule_out(rows)
    assert torch.isfinite(rows[0]).nonzero().flatten().tolist() == [token("c")]
