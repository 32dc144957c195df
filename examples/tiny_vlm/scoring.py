"""Which questions are answered right, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from examples.tiny_vlm.batches import Batch
from examples.tiny_vlm.language_model import FrozenLlama
from examples.tiny_vlm.questions import Question
from examples.tiny_vlm.vlm import answer_logits, embed


@dataclass(frozen=True, slots=True)
class Score:
    """One question and whether every token of its answer was the most likely one."""

    question: Question
    is_right: bool
    #: Of the example in its batch.
    example: int


@torch.no_grad()
def score_batch(
    weights: Mapping[str, torch.Tensor], model: FrozenLlama, batch: Batch, device: torch.device
) -> list[Score]:
    """Whether decoding greedily would give each answer, its end included.

    It would exactly when each token is the most likely one after those before it, so nothing is decoded.
    """
    moved = batch.tensors().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = answer_logits(model, moved, embed(weights, moved))
    is_right = (logits.argmax(-1) == moved.targets).cpu()
    rows = moved.answer_rows.cpu()
    segments = torch.from_numpy(batch.segments)
    owners = list(zip((rows // segments.shape[1]).tolist(), segments.flatten()[rows].tolist(), strict=True))
    wrong = {owner for owner, right in zip(owners, is_right.tolist(), strict=True) if not right}
    return [
        Score(question, (example, number + 1) not in wrong, example)
        for example, questions in enumerate(batch.questions)
        for number, question in enumerate(questions)
    ]


def add_scores(scores: Sequence[Score]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each topic, topics in the order of their names."""
    totals: dict[str, tuple[int, int]] = {}
    for score in scores:
        right, count = totals.get(score.question.topic, (0, 0))
        totals[score.question.topic] = right + score.is_right, count + 1
    return dict(sorted(totals.items()))


def by_topic(scores: Sequence[Score]) -> str:
    """One line: topic, percentage."""
    return " ".join(
        f"{topic}={100 * right / count:.1f}" for topic, (right, count) in add_scores(scores).items()
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
