"""Measures the model on pictures that training never drew.

    python -m examples.tiny_vlm.evaluate --folder examples/tiny_vlm/model --json build/tiny_vlm.json

A question counts as right when greedy decoding gives its answer token for token, end included. On a GPU the
training's forward pass is used for many; `--served N` also asks N questions of the code that serves, on the CPU.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.tiny_vlm.batches import Batch, Writer, held_out_batch
from examples.tiny_vlm.failures import save_sheet
from examples.tiny_vlm.language_model import FrozenLlama
from examples.tiny_vlm.scene import TRAINING, Choice, Kind
from examples.tiny_vlm.scoring import Score, add_scores, score_batch, wilson
from examples.tiny_vlm.served import measure_served
from examples.tiny_vlm.shape import TEXT_SOURCE, read_weights
from workers.model.prepare import load_weights, prepare

#: Examples that are computed at once.
BATCH = 128


@dataclass(frozen=True, slots=True)
class Part:
    """A set of examples that is reported by itself."""

    name: str
    choice: Choice
    #: None: mixed, as in training.
    num_pictures: int | None
    #: Of the examples asked for.
    share: float


PARTS = (
    Part("seeds never drawn", TRAINING, 1, 1.0),
    Part(
        "colour and shape never seen together",
        Choice(pairs_held_out=True, kinds=(Kind.ONE, Kind.FEW, Kind.COUNT)),
        1,
        0.25,
    ),
    Part("words never seen", Choice(words_held_out=True, kinds=(Kind.WORD,)), 1, 0.05),
    *(Part(f"{number} pictures", TRAINING, number, 0.1) for number in (2, 3)),
)


def batches(writer: Writer, part: Part, num_examples: int) -> Iterator[Batch]:
    """All examples of a part, the last batch full too."""
    for first in range(0, round(num_examples * part.share), BATCH):
        yield held_out_batch(writer, first, BATCH, part.choice, num_pictures=part.num_pictures)


def measure(
    writer: Writer, num_examples: int, score: Callable[[Batch], list[Score]]
) -> tuple[dict[str, dict[str, tuple[int, int]]], list[tuple[Batch, Score]]]:
    """Right answers and questions by part and topic, and some wrong ones."""
    results, wrong = {}, []
    for part in PARTS:
        scores = []
        for batch in batches(writer, part, num_examples):
            scored = score(batch)
            scores += scored
            if part.choice == TRAINING and part.num_pictures == 1:
                wrong += [(batch, one) for one in scored if not one.is_right]
        results[part.name] = add_scores(scores)
    return results, wrong


def markdown(results: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Tables, one for each part."""
    lines = []
    for part, topics in results.items():
        lines += [
            f"**{part}**",
            "",
            "| question | right | of | share | 95 % interval |",
            "|---|---|---|---|---|",
        ]
        for topic, (right, count) in topics.items():
            low, high = wilson(right, count)
            share = f"{100 * right / count:.1f} %"
            lines.append(f"| {topic} | {right} | {count} | {share} | {100 * low:.1f} to {100 * high:.1f} % |")
        lines.append("")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the trained model")
    parser.add_argument("--model", default=TEXT_SOURCE, help="the language model, as in a manifest")
    parser.add_argument("--examples", type=int, default=4096, help="pictures of the first part; 0 for none")
    parser.add_argument("--served", type=int, default=0, help="questions for the code that serves")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--failures", type=Path, help="PNG of pictures with a wrong answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    args = _arguments()
    prepared = prepare(args.model, lambda message, done: None)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    writer = Writer(prepared.tokenizer_json)
    results = {}
    if args.examples:
        model = FrozenLlama(prepared.config, load_weights(prepared), device, dtype)
        weights = {name: weight.to(device) for name, weight in read_weights(args.folder).items()}

        def score(batch: Batch) -> list[Score]:
            return score_batch(weights, model, batch, device)

        results, wrong = measure(writer, args.examples, score)
        if args.failures is not None:
            save_sheet(wrong, weights, model, writer, args.failures)
    if args.served:
        results["by the code that serves"] = measure_served(args.folder, args.served)
    print(markdown(results))
    if args.markdown is not None:
        args.markdown.write_text(markdown(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
