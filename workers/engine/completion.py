"""What the tokens of a step do to their sequences. Pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from workers.api import (
    DecodingReport,
    DraftsGenerated,
    FailureCode,
    FinishReason,
    ImagesReduced,
    Phase,
    PromptScored,
    TokenLogprobs,
    TokensGenerated,
)
from workers.engine.batch import Batch
from workers.engine.branching import Branching
from workers.engine.image_needs import ImageNeeds
from workers.engine.messages import FinishTransfer, Output, TokensDecoded
from workers.engine.sequence import NO_ROW, NO_TOKEN, Sequence, SequenceState
from workers.engine.step_plan import Slice, StepPlan
from workers.engine.step_result import FilteredChunk, RowDetail, StepResult
from workers.engine.superposing import Superposing

NO_LOGITS = "the model computed no usable logits for its next token"
_PLAIN = RowDetail()


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that the engine is to drop, or to fail if there is a code."""

    sequence: Sequence
    reason: str
    code: FailureCode | None = None


class Completion:
    """Applies the results of steps: tokens to their sequences, and what is to be said of them to `outputs`."""

    def __init__(
        self,
        batch: Batch,
        outputs: list[Output],
        image_needs: ImageNeeds,
        punctuation: frozenset[int],
        *,
        attention_tokens: float = math.inf,
        send_late: Callable[[Sequence, float], None] | None = None,
    ) -> None:
        """attention_tokens: see Scheduler. send_late: begins the transfer of a prompt that has just been computed."""
        self._attention_tokens = attention_tokens
        self._send_late = send_late
        self._batch = batch
        self._outputs = outputs
        self._image_needs = image_needs
        self._branching = Branching(batch, punctuation)
        self._superposing = Superposing()
        self._ended: list[Ended] = []
        #: Of all prompts whose prefill has ended; see TokensGenerated.
        self.num_cached_tokens = 0
        self.num_reused_tokens = 0

    def apply(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Ended]:
        """The step has run. Those that end with it are returned; they hold what they held until they are dropped."""
        self._ended = []
        self._batch.pool.index.settle(plan.pending)
        self._batch.end_step()
        self._complete_decodes(plan, result, now_s)
        index = len(plan.decodes)
        for i, part in enumerate(plan.chunks):
            yields_token = part.yields_token
            part.sequence.num_computed_tokens = part.end
            if part.is_filtered:
                self._drop_filtered(part, result.filtered[i])
            if i in result.prompt_logprobs:
                self._score(part, result.prompt_logprobs[i])
            if yields_token:
                # Nobody reads the embeddings of tokens that are computed; when it has to begin anew it asks again.
                self._image_needs.release(part.sequence)
                detail = result.details.get(index, _PLAIN)
                self._advance(part.sequence, result.token_ids[index], detail, now_s)
                index += 1
        assert index == len(result.token_ids), f"{len(result.token_ids)} tokens for {index} slices"
        return self._ended

    def forget(self, sequence: Sequence) -> None:
        """It is dropped or was preempted: its branches go, and what was gathered for it."""
        self._branching.forget(sequence)
        self._superposing.forget(sequence)

    def _complete_decodes(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        """The hot path: what is done here is done for every sequence in every step."""
        keys, token_ids, positions = [], [], []
        details, size = result.details, self._batch.pool.block_size
        for i, (sequence, token_id) in enumerate(zip(plan.decodes, result.token_ids, strict=False)):
            known = sequence.token_ids
            position = len(known)
            sequence.num_computed_tokens = position
            if position % size == 0 and sequence.row != NO_ROW:
                self._batch.store_blocks(sequence, position, is_pending=False)
            if (
                (details and i in details)
                or token_id < 0
                or token_id in sequence.stop_token_ids
                or position + 1 >= sequence.max_tokens
            ):
                self._advance(sequence, token_id, details.get(i, _PLAIN), now_s)
                continue
            known.append(token_id)
            keys.append(sequence.key)
            token_ids.append(token_id)
            positions.append(position + sequence.num_dropped_tokens)
        if keys:
            self._outputs.append(TokensDecoded(tuple(keys), tuple(token_ids), tuple(positions)))

    def _advance(self, sequence: Sequence, token_id: int, detail: RowDetail, now_s: float) -> None:
        """A token was sampled, perhaps more: report it, and move the sequence on."""
        if sequence.state is SequenceState.FINISHED:
            # A branch, of a choice that was made earlier in this very step.
            return
        if sequence.parent is not None and any(one.sequence is sequence.parent for one in self._ended):
            # Of a sequence that another of its branches has ended in this very step.
            return
        if token_id == NO_TOKEN:
            code = FailureCode.INTERNAL if detail.problem is None else FailureCode.INVALID
            self._end(sequence.parent or sequence, detail.problem or NO_LOGITS, code)
        elif sequence.parent is not None:
            self._branching.add(sequence, token_id, detail.warped_logprob)
            self._take_winner(sequence.parent)
        elif detail.top:
            self._superpose(sequence, token_id, detail.top, now_s)
        elif len(detail.branches) > 1:
            if sequence.state is SequenceState.PREFILL:
                # It was preempted, or goes on from what another worker generated.
                self._batch.move(sequence, SequenceState.DECODE)
            if self._branching.begin(sequence, detail.branches):
                self._take_winner(sequence)
            else:
                self._generate(sequence, (token_id,), detail, now_s)
        else:
            tokens: tuple[int, ...] = (token_id,)
            if detail.accepted is not None:
                tokens = detail.accepted.token_ids
                _count(sequence, num_rows=detail.num_rows, num_tokens=len(tokens))
            self._generate(sequence, tokens, detail, now_s)

    def _generate(self, sequence: Sequence, tokens: tuple[int, ...], detail: RowDetail, now_s: float) -> None:
        """These come after the sequence's tokens, as far as it goes on."""
        position = len(sequence.token_ids)
        was_prefill = sequence.state is SequenceState.PREFILL
        is_first = was_prefill and position == sequence.num_prompt_tokens
        finish_reason, num_taken = None, 0
        while finish_reason is None and num_taken < len(tokens):
            finish_reason = sequence.append(tokens[num_taken])
            num_taken += 1
        if detail.is_complete and finish_reason is None:
            finish_reason = FinishReason.STOP
        # All but the last were computed as drafts.
        sequence.num_computed_tokens = len(sequence.token_ids) - 1
        self._batch.store_blocks(sequence, sequence.num_computed_tokens, is_pending=False)
        generated = TokensGenerated(
            sequence.key,
            tokens[:num_taken],
            position + sequence.num_dropped_tokens,
            finish_reason,
            logprobs=(detail.logprobs,) if detail.logprobs is not None else (),
        )
        if is_first:
            assert sequence.prefill_started_s is not None
            prefill_s = now_s - sequence.prefill_started_s
            self.num_cached_tokens += sequence.num_cached_tokens
            self.num_reused_tokens += sequence.num_reused_tokens
            generated = replace(
                generated,
                prefill_s=prefill_s,
                num_cached_tokens=sequence.num_cached_tokens,
                num_reused_tokens=sequence.num_reused_tokens,
                # What came may have been taken for others before it began.
                num_fetched_tokens=min(sequence.num_fetched_tokens, sequence.num_cached_tokens),
                prefix_fetch_s=sequence.prefix_fetch_s,
            )
        if is_first and sequence.reduction is not None:
            self._outputs.append(images_reduced(sequence, self._attention_tokens))
        self._publish(sequence, generated)
        if finish_reason is None and was_prefill:
            if sequence.is_handed_off:
                self._hand_off(sequence, tokens, now_s)
            else:
                self._batch.move(sequence, SequenceState.DECODE)

    def _take_winner(self, sequence: Sequence) -> None:
        """If the choice among its branches is made, its tokens are the sequence's."""
        position = len(sequence.token_ids) + sequence.num_dropped_tokens
        tokens = self._branching.take_winner(sequence)
        if tokens is None:
            return
        self._batch.store_blocks(sequence, sequence.num_computed_tokens, is_pending=False)
        finish_reason = None
        if tokens[-1] in sequence.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif len(sequence.token_ids) >= sequence.max_tokens:
            finish_reason = FinishReason.LENGTH
        self._publish(sequence, TokensGenerated(sequence.key, tokens, position, finish_reason))

    def _superpose(
        self, sequence: Sequence, token_id: int, top: tuple[tuple[int, float], ...], now_s: float
    ) -> None:
        """The row stands for all drafts; they come out together."""
        is_prefilled_here = sequence.state is SequenceState.PREFILL and Phase.PREFILL in sequence.phases
        if is_prefilled_here and sequence.reduction is not None:
            self._outputs.append(images_reduced(sequence, self._attention_tokens))
        if sequence.is_handed_off:
            # The decode worker computes the row again.
            self._hand_off(sequence, (token_id,), now_s)
            return
        was_prefill = sequence.state is SequenceState.PREFILL
        if not was_prefill:
            _count(sequence, num_rows=1, num_tokens=0)
        finished = self._superposing.step(sequence, top)
        if finished is not None:
            drafts, logprobs = finished.drafts()
            cost = sequence.cost
            num_tokens = sum(map(len, drafts))
            self._outputs.append(DecodingReport(sequence.key, cost.num_steps, cost.num_rows, num_tokens))
            self._outputs.append(DraftsGenerated(sequence.key, drafts, logprobs))
            self._end(sequence, "finished")
        elif was_prefill:
            self._batch.move(sequence, SequenceState.DECODE)

    def _publish(self, sequence: Sequence, generated: TokensGenerated) -> None:
        """Say it, and end the sequence if that was its last."""
        if generated.finish_reason is not None:
            if sequence.sampling.decoding is not None:
                self._outputs.append(_report(sequence))
            self._end(sequence, f"finished: {generated.finish_reason}")
        self._outputs.append(generated)

    def _end(self, sequence: Sequence, reason: str, code: FailureCode | None = None) -> None:
        self._ended.append(Ended(sequence, reason, code))

    def _drop_filtered(self, part: Slice, found: FilteredChunk) -> None:
        """Embeddings have left the prompt while it was computed: those that stayed have the first of its slots."""
        sequence = part.sequence
        sequence.layer_rows = found.layer_rows
        if found.places:
            sequence.drop_tokens(found.places)
        sequence.num_computed_tokens = part.end - len(found.places)
        self._batch.shrink(sequence, len(sequence.token_ids))

    def _hand_off(self, sequence: Sequence, tokens: tuple[int, ...], now_s: float) -> None:
        """Its transfer holds its blocks too; here it is done with them."""
        assert sequence.handoff is not None
        if sequence.reduction is not None:
            # How many tokens it has was not known before.
            assert self._send_late is not None
            self._send_late(sequence, now_s)
        self._batch.leave(sequence)
        sequence.move_to(SequenceState.HANDOFF)
        self._outputs.append(FinishTransfer(sequence.handoff.transfer_id, tokens))

    def _score(self, part: Slice, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Logprobs of the prompt's tokens that this chunk predicts."""
        positions = part.scored_positions
        assert len(positions) == len(logprobs)
        if logprobs:
            self._outputs.append(PromptScored(part.sequence.key, positions.start, logprobs))
            part.sequence.num_scored_tokens = positions.stop


def images_reduced(sequence: Sequence, attention_tokens: float) -> ImagesReduced:
    """What became of the pictures of a prompt that has been computed. attention_tokens: see Scheduler."""
    images, reduction = sequence.images, sequence.reduction
    assert images is not None
    assert reduction is not None

    def cost(num_rows: int) -> float:
        return num_rows * (1 + num_rows / 2 / attention_tokens)

    layer_rows = sequence.layer_rows or (sequence.num_own_tokens,)
    whole = cost(sequence.num_own_tokens + sequence.num_dropped_tokens)
    return ImagesReduced(
        sequence.key,
        num_planned=images.num_planned,
        num_encoded=images.num_planned - sequence.num_merged_tokens,
        num_kept=images.num_left,
        prefill_share=sum(map(cost, layer_rows)) / len(layer_rows) / whole,
        is_too_long=reduction.is_filtering and not sequence.layer_rows,
    )


def _count(sequence: Sequence, *, num_rows: int, num_tokens: int) -> None:
    sequence.cost.num_steps += 1
    sequence.cost.num_rows += num_rows
    sequence.cost.num_tokens += num_tokens


def _report(sequence: Sequence) -> DecodingReport:
    """Steps of one row and one token are what the counted ones do not explain; prefill yields the first token."""
    num_tokens = max(0, len(sequence.token_ids) - sequence.num_prompt_tokens - 1)
    cost = sequence.cost
    num_plain = max(0, num_tokens - cost.num_tokens)
    return DecodingReport(sequence.key, num_plain + cost.num_steps, num_plain + cost.num_rows, num_tokens)
