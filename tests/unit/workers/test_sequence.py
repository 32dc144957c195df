"""A sequence: what it was submitted as, how it grows, how it ends."""

import itertools

import pytest

from tests.support.engine_fakes import BOTH, DECODE, PREFILL, STOP_TOKEN, submit
from workers.api import FinishReason, Submit
from workers.engine.sequence import TRANSITIONS, Sequence, SequenceState


def waiting(request: Submit, now_s: float = 0.0) -> Sequence:
    return Sequence.from_submit(request, now_s, root=b"root", number=1)


def test_a_request_with_prefill_waits_for_a_step_and_one_without_waits_for_kv() -> None:
    assert waiting(submit(phases=BOTH), 1.0).state is SequenceState.WAITING
    assert waiting(submit(phases=PREFILL), 1.0).state is SequenceState.WAITING
    assert waiting(submit(phases=DECODE), 1.0).state is SequenceState.AWAITING_KV


def test_the_deadline_counts_from_now() -> None:
    sequence = waiting(submit(timeout_s=4.0), 10.0)
    assert (sequence.arrived_s, sequence.deadline_s) == (10.0, 14.0)


def test_a_worker_that_hands_off_needs_room_for_the_prompt_alone() -> None:
    room = [
        waiting(submit(phases=p, num_prompt=5, max_new=3), 0.0).max_tokens_here
        for p in (BOTH, PREFILL, DECODE)
    ]
    assert room == [8, 5, 8]


def test_it_ends_with_a_stop_token_which_is_kept() -> None:
    sequence = waiting(submit(num_prompt=2, max_new=5), 0.0)
    assert sequence.append(50) is None
    assert sequence.append(STOP_TOKEN) is FinishReason.STOP
    assert sequence.token_ids == [100, 101, 50, STOP_TOKEN]


def test_it_ends_at_its_length() -> None:
    sequence = waiting(submit(num_prompt=2, max_new=2), 0.0)
    assert [sequence.append(50), sequence.append(51)] == [None, FinishReason.LENGTH]


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    assert waiting(submit(max_new=1), 0.0).append(STOP_TOKEN) is FinishReason.STOP


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    sequence = waiting(submit(max_new=3), 0.0)
    sequence.token_ids[0] = STOP_TOKEN
    assert sequence.append(50) is None


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SequenceState, repeat=2)))
def test_only_the_tables_moves_are_possible(source: SequenceState, target: SequenceState) -> None:
    sequence = waiting(submit(), 0.0)
    sequence.state = source
    if target in TRANSITIONS[source]:
        sequence.move_to(target)
        assert sequence.state is target
    else:
        with pytest.raises(AssertionError):
            sequence.move_to(target)


def test_every_state_but_the_last_can_be_dropped() -> None:
    assert all(
        SequenceState.FINISHED in TRANSITIONS[s] for s in SequenceState if s is not SequenceState.FINISHED
    )
    assert not TRANSITIONS[SequenceState.FINISHED]
