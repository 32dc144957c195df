"""What is asked of the logits of a step: a row for each token that is sampled, and what others want to know of them."""

from dataclasses import replace

import torch

from workers.api import CautiousDecoding, SuperposedDecoding, TokenLogprobs
from workers.engine.decoding.superposed import mix_settings
from workers.engine.sampler import SampleRow, score_prompt
from workers.engine.sampling.rows import is_plain
from workers.engine.sequence import Sequence
from workers.engine.step_batch import StepBatch


def sample_rows(step: StepBatch) -> list[SampleRow]:
    """One for each row of logits that a token is sampled from."""
    rows: list[SampleRow] = []
    for i, sequence in enumerate(step.sampled):
        is_cautious = isinstance(sequence.sampling.decoding, CautiousDecoding)
        row = SampleRow(
            sequence.sampling,
            len(sequence.token_ids) + sequence.num_dropped_tokens,
            sequence.token_ids,
            sequence.num_own_tokens,
            sequence.num_delivered,
            sequence.stream,
            is_branching=is_cautious and _may_branch(sequence),
            wants_warped_logprob=sequence.parent is not None,
        )
        rows.append(row)
        tree = step.plan.drafts.get(i)
        for j in range(tree.num_drafts if tree is not None else 0):
            assert tree is not None
            path = tree.path(j + 1)
            rows.append(
                replace(row, position=row.position + len(path), token_ids=[*sequence.token_ids, *path])
            )
    return rows


def _may_branch(sequence: Sequence) -> bool:
    """The first token of all is drawn as ever, on whichever worker; also what is drawn where no decode follows."""
    is_first = len(sequence.token_ids) == sequence.num_own_tokens
    return sequence.parent is None and not is_first and not sequence.is_handed_off


def likeliest_tokens(step: StepBatch, logits: torch.Tensor) -> dict[int, tuple[tuple[int, float], ...]]:
    """The likeliest next tokens of superposed sequences, with their logprobs."""
    tops = {}
    for i in step.special:
        decoding = step.sampled[i].sampling.decoding
        if isinstance(decoding, SuperposedDecoding):
            num = min(mix_settings(decoding.num_drafts).num_candidates, logits.shape[-1])
            logprobs = torch.log_softmax(logits[step.first_rows[i]].double(), dim=-1)
            values, token_ids = torch.topk(logprobs, num)
            tops[i] = tuple(zip(token_ids.tolist(), values.tolist(), strict=True))
    return tops


def is_drawn_alone(row: SampleRow) -> bool:
    """Its token is all that is asked for, and follows from its logits and the options of the draw."""
    return is_plain(row.sampling) and not row.is_branching and not row.wants_warped_logprob


def to_host(logits: torch.Tensor) -> torch.Tensor:
    """As the sampler takes them: those of a CPU as they are."""
    return logits.to("cpu", torch.float32)


def score_prompts(step: StepBatch, logits: torch.Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
    """Logprobs of prompt tokens, by chunk. logits: of the rows that come after those that are sampled."""
    scored: dict[int, tuple[TokenLogprobs, ...]] = {}
    if len(logits):
        logits = to_host(logits)
    row = 0
    for i, part in enumerate(step.plan.chunks):
        positions = part.scored_positions
        if not positions:
            continue
        sequence: Sequence = part.sequence
        token_ids = sequence.token_ids[positions.start : positions.stop]
        num_top = sequence.sampling.num_prompt_logprobs or 0
        scored[i] = tuple(score_prompt(logits[row : row + len(positions)], token_ids, num_top))
        row += len(positions)
    return scored
