"""Prompts of an engine by least slack to their first token's target, fair between tenants. Pure."""

from collections.abc import Collection
from itertools import chain

from workers.engine.batch import Batch
from workers.engine.sequence import Sequence, SequenceState
from workers.latency_model import ENOUGH_STEPS, LatencyModel
from workers.prompt_order import TenantTokens, is_too_late, slack_key
from workers.step_cost import StepCost


class SlackOrder:
    """latency: how long prompts take, once it has learnt enough; None never has.

    A tenant is what a request's cache_salt names.
    """

    def __init__(self, batch: Batch, latency: LatencyModel | None) -> None:
        self._batch = batch
        self._latency = latency
        self._tokens = TenantTokens()

    def sorted(
        self, prompts: Collection[Sequence], now_s: float, prefill_tokens_per_s: float
    ) -> list[Sequence]:
        """Some prompts of the batch, highest priority first, then by slack. prefill_tokens_per_s: taken before the latency model has
        learnt enough.

        Those that have not begun and cannot make it any more are marked.
        """
        if not prompts:
            return []
        token_s, pair_s = self._speed(prefill_tokens_per_s)
        # Who waits for a place is none of these prompts, and what others get meanwhile is owed to him.
        batch = self._batch
        self._tokens.are_waiting({one.cache_salt for one in chain(batch.waiting, batch.prefills)})
        debts = self._tokens.debts()
        ranked: list[tuple[int, float, int, Sequence]] = []
        for one in prompts:
            by_s = one.first_token_by_s
            if one.num_known_tokens is None:
                one.num_known_tokens = self._batch.num_known_tokens(one)
            left_s = _left_s(one, token_s, pair_s)
            may_be_late = one.state is SequenceState.WAITING and not one.is_late and not one.has_first_token
            if may_be_late and is_too_late(now_s, by_s, left_s):
                # Others may have computed its beginning since.
                one.num_known_tokens = self._batch.num_known_tokens(one)
                left_s = _left_s(one, token_s, pair_s)
                one.is_late = is_too_late(now_s, by_s, left_s)
            key = slack_key(by_s, left_s, debts[one.cache_salt] * token_s, is_late=one.is_late)
            # Numbers of arrival differ, so that sequences are never compared.
            ranked.append((one.rank[0], key, one.rank[2], one))
        ranked.sort()
        return [one for _, _, _, one in ranked]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """So much of its prompt was computed."""
        self._tokens.charge(sequence.cache_salt, num_tokens, sequence.tenant_weight)

    def reason(self, sequence: Sequence, num_passed: int, now_s: float, prefill_tokens_per_s: float) -> str:
        """Why it begins now, before `num_passed` that came earlier; empty when that is its turn."""
        if num_passed == 0 and sequence.num_passed_by == 0:
            return ""
        slack_s = sequence.first_token_by_s - now_s - _left_s(sequence, *self._speed(prefill_tokens_per_s))
        debt_s = self._tokens.debts().get(sequence.cache_salt, 0.0) / prefill_tokens_per_s
        found = [f"slack {slack_s:.3f} s"]
        if sequence.is_late:
            found.append("too late for its target, so others went first")
        if debt_s > 0:
            found.append(f"its tenant had {debt_s:.3f} s more than another that waits")
        return f"before {num_passed} that came earlier, after {sequence.num_passed_by} that came later: {', '.join(found)}"

    def _speed(self, prefill_tokens_per_s: float) -> tuple[float, float]:
        """Seconds of a token, and of a pair of one and one that it attends to."""
        latency = self._latency
        if latency is None or latency.num_observed < ENOUGH_STEPS:
            return 1.0 / prefill_tokens_per_s, 0.0
        cost = StepCost.of(latency)
        return cost.token_s, cost.pair_s


def _left_s(sequence: Sequence, token_s: float, pair_s: float) -> float:
    num, num_done = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
    if sequence.state is SequenceState.WAITING and sequence.num_known_tokens:
        # One token is always computed.
        num_done = min(sequence.num_known_tokens, num - 1)
        num -= num_done
    return num * (token_s + pair_s * (num_done + num / 2))
