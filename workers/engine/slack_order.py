"""Prompts of an engine so that as few as possible miss their targets for the first token, fair between tenants. Pure."""

from collections.abc import Collection
from itertools import chain, groupby

from workers.engine.batch import Batch
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.step_budget import StepLimits
from workers.latency_model import LatencyModel
from workers.prompt_order import LEAST_SHARE, Due, LateTokens, Standing, TenantTokens, standings
from workers.step_cost import StepCost
from workers.step_shape import FactorSource

#: Steps that pass beside the computing of a prompt: the one that runs, and half of the one in which its last token is.
STEPS_AROUND = 1.5


class SlackOrder:
    """latency: how long prompts take, once it has learnt enough; None never has. limits: what steps take of prompts beside decodes.

    A tenant is what a request's cache_salt names.
    """

    def __init__(self, batch: Batch, latency: LatencyModel | None, limits: StepLimits) -> None:
        self._batch = batch
        self._latency = latency
        self._limits = limits
        self._tokens = TenantTokens()
        self._late_tokens = LateTokens()

    def sorted(
        self, prompts: Collection[Sequence], now_s: float, prefill_tokens_per_s: float
    ) -> list[Sequence]:
        """Some prompts of the batch, highest priority first; of one priority those that make it, by deadline, then those that others
        make it without, then those that cannot any more, but for the share that is theirs. prefill_tokens_per_s: taken before the
        latency model has learnt enough.
        """
        if not prompts:
            return []
        num_tokens = sum(one.num_uncomputed_tokens for one in prompts)
        token_s, pair_s, share, step_s = self._speed(prefill_tokens_per_s, num_tokens)
        # Who waits for a place is none of these prompts, and what others get meanwhile is owed to him.
        batch = self._batch
        self._tokens.are_waiting({one.cache_salt for one in chain(batch.waiting, batch.prefills)})
        debts = self._tokens.debts()
        found: list[tuple[int, float, int, Sequence, Due]] = []
        for one in prompts:
            if one.num_known_tokens is None:
                one.num_known_tokens = batch.num_known_tokens(one)
            by_s, left_s = one.first_token_by_s, _left_s(one, token_s, pair_s)
            may_be_late = one.state is SequenceState.WAITING and not one.has_first_token
            if may_be_late and one.standing is not Standing.LATE and now_s + left_s > by_s:
                # Others may have computed its beginning since. Asked once: of all that are late it would take longer than a step.
                one.num_known_tokens = batch.num_known_tokens(one)
                left_s = _left_s(one, token_s, pair_s)
            due = Due(by_s, left_s / share, debts[one.cache_salt] * token_s)
            # Who had its first token before it was preempted waits for the next one, whatever was its target.
            key = due.key if not one.has_first_token else one.arrived_s
            # Numbers of arrival differ, so that sequences are never compared.
            found.append((one.rank[0], key, one.rank[2], one, due))
        found.sort()
        ordered: list[Sequence] = []
        begin_s = now_s + STEPS_AROUND * step_s
        for _, group in groupby(found, key=lambda item: item[0]):
            some = [(one, due) for *_, one, due in group]
            ordered += self._by_standing(some, begin_s)
            begin_s += sum(due.left_s for _, due in some)
        # Where all places are taken, those that wait are none of these prompts.
        self._late_tokens.is_anyone_late = any(
            one.standing is Standing.LATE for one in chain(batch.waiting, batch.prefills)
        )
        return ordered

    def _by_standing(self, prompts: list[tuple[Sequence, Due]], begin_s: float) -> list[Sequence]:
        """Prompts of one priority, by key."""
        again = [(one, due) for one, due in prompts if one.has_first_token]
        others = [(one, due) for one, due in prompts if not one.has_first_token]
        begin_s += sum(due.left_s for _, due in again)
        for one, _ in again:
            one.standing = Standing.ON_TIME
        for (one, _), standing in zip(others, standings((due for _, due in others), begin_s), strict=True):
            one.standing = standing
        # Stable: by key among those who stand alike.
        ordered = sorted((one for one, _ in others), key=lambda one: one.standing)
        first_late = next((one for one in ordered if one.standing is Standing.LATE), None)
        if first_late is not None and self._late_tokens.is_enough_for(first_late.num_uncomputed_tokens):
            ordered.remove(first_late)
            ordered.insert(0, first_late)
        return [one for one, _ in again] + ordered

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """So much of its prompt was computed."""
        self._tokens.charge(sequence.cache_salt, num_tokens, sequence.tenant_weight)
        self._late_tokens.charge(sequence.standing, num_tokens)

    def reason(self, sequence: Sequence, num_passed: int, now_s: float, prefill_tokens_per_s: float) -> str:
        """Why it begins now, before `num_passed` that came earlier; empty when that is its turn."""
        if num_passed == 0 and sequence.num_passed_by == 0:
            return ""
        token_s, pair_s, share, _ = self._speed(prefill_tokens_per_s, sequence.num_uncomputed_tokens)
        slack_s = sequence.first_token_by_s - now_s - _left_s(sequence, token_s, pair_s) / share
        debt_s = self._tokens.debts().get(sequence.cache_salt, 0.0) / prefill_tokens_per_s
        found = [f"slack {slack_s:.3f} s"]
        if sequence.standing is Standing.LATE:
            found.append("too late for its target, so others went first")
        elif sequence.standing is Standing.PASSED_OVER:
            found.append("others made it without it")
        if debt_s > 0:
            found.append(f"its tenant had {debt_s:.3f} s more than another that waits")
        return f"before {num_passed} that came earlier, after {sequence.num_passed_by} that came later: {', '.join(found)}"

    def _speed(self, prefill_tokens_per_s: float, num_tokens: int) -> tuple[float, float, float, float]:
        """Seconds of a token, and of a pair of one and one that it attends to; the part of the time that prompts get; and how long a
        step is. num_tokens: of prompts that are there."""
        latency, decodes = self._latency, self._batch.decodes
        if latency is None or latency.source is FactorSource.ROOFLINE:
            return 1.0 / prefill_tokens_per_s, 0.0, 1.0, 0.0
        cost = StepCost.of(latency)
        context = sum(len(one.token_ids) for one in decodes)
        step_s = self._limits.step_s(cost, decodes, context, num_tokens)
        share = max(LEAST_SHARE, cost.prompt_share(len(decodes), context, step_s))
        return cost.token_s, cost.pair_s, share, step_s


def _left_s(sequence: Sequence, token_s: float, pair_s: float) -> float:
    num, num_done = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
    if sequence.state is SequenceState.WAITING and sequence.num_known_tokens:
        # One token is always computed.
        num_done = min(sequence.num_known_tokens, num - 1)
        num -= num_done
    return num * (token_s + pair_s * (num_done + num / 2))
