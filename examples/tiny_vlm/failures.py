"""A sheet of pictures with the answers that were wrong."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from examples.tiny_vlm.batches import Batch, Writer
from examples.tiny_vlm.language_model import FrozenLlama
from examples.tiny_vlm.scoring import Score
from examples.tiny_vlm.shape import TILE
from examples.tiny_vlm.vlm import answer_logits, embed

COLUMNS, MOST = 4, 16
WIDTH, HEIGHT, MARGIN = 330, 230, 8


@torch.no_grad()
def given_answer(
    weights: Mapping[str, torch.Tensor], model: FrozenLlama, batch: Batch, score: Score, writer: Writer
) -> str:
    """The most likely tokens, each after the right ones before it, up to the first wrong one; greedy from there on not."""
    moved = batch.tensors().to(model.embedding.device)
    with torch.autocast(moved.tokens.device.type, torch.bfloat16, enabled=moved.tokens.is_cuda):
        logits = answer_logits(model, moved, embed(weights, moved))
    number = batch.questions[score.example].index(score.question) + 1
    rows = moved.answer_rows.cpu()
    segments = torch.from_numpy(batch.segments).flatten()[rows]
    mine = (rows // batch.tokens.shape[1] == score.example) & (segments == number)
    given, right = logits.argmax(-1).cpu()[mine].tolist(), moved.targets.cpu()[mine].tolist()
    end = next(
        (i for i, (one, other) in enumerate(zip(given, right, strict=True)) if one != other), len(given)
    )
    return writer.decode(given[: end + 1])


def save_sheet(
    wrong: Sequence[tuple[Batch, Score]],
    weights: Mapping[str, torch.Tensor],
    model: FrozenLlama,
    writer: Writer,
    path: Path,
) -> None:
    """Every so many of the wrong ones, at most MOST, each with its question and what was answered up to the error."""
    chosen = wrong[:: max(1, len(wrong) // MOST)][:MOST]
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, max(rows, 1) * HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (batch, score) in enumerate(chosen):
        left, top = i % COLUMNS * WIDTH + MARGIN, i // COLUMNS * HEIGHT + MARGIN
        # One picture an example: its number is the example's.
        tile = Image.fromarray(batch.pixels[score.example].transpose(1, 2, 0))
        sheet.paste(tile, (left, top))
        lines = (
            score.question.text,
            f"right: {score.question.answer}",
            f"given: {given_answer(weights, model, batch, score, writer)} ...",
        )
        for number, line in enumerate(lines):
            for part, text in enumerate(textwrap.wrap(line, 46)[:2]):
                draw.text((left, top + TILE + 6 + number * 30 + part * 14), text, "black", font)
    sheet.save(path, optimize=True)
