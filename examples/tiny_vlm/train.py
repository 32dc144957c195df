"""Trains the encoder and the connector through the frozen language model.

    python -m examples.tiny_vlm.train --minutes 14 --out build/tiny_vlm

Stops when the time is up, whatever the loss, and writes the averaged weights; `--resume` goes on from a checkpoint.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.tiny_vlm.batches import Batch, Tensors, Writer, held_out_batch, training_batches
from examples.tiny_vlm.language_model import FrozenLlama
from examples.tiny_vlm.questions import NUM_CLASSES
from examples.tiny_vlm.scene import draw_scene
from examples.tiny_vlm.scoring import Score, by_topic, score_batch
from examples.tiny_vlm.shape import NUM_EMBEDDINGS, TEXT_SOURCE, VISION, new_weights, read_weights, save_model
from examples.tiny_vlm.vlm import answer_logits, embed
from workers.model.prepare import load_weights, prepare

CHECKPOINT = "checkpoint.json"
REPORT_S = 10.0
WARM_UP_STEPS = 250
EMA = 0.998
#: Weight of the attributes' loss at the beginning; it falls to 0 by the end.
ATTRIBUTES = 0.05
#: Part of the run in which the encoder only learns to write facts, without the language model.
WRITING = 0.11
#: Part of the run at whose end facts no longer count.
FACTS = 0.45
#: Size to which each embedding is reduced before attributes are read off all of them.
REDUCED = 64
#: Pictures whose facts make the vocabulary of facts.
VOCABULARY_PICTURES = 6000


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is made with."""

    minutes: float
    #: Of the whole schedule, which ends with the last of several resumed runs.
    schedule_minutes: float
    batch: int
    learning_rate: float
    workers: int
    eval_s: float
    eval_examples: int
    seed: int
    max_steps: int
    fixed_batches: int


class Examples(IterableDataset[Batch]):
    """Batches drawn on the fly, other ones in each worker process."""

    def __init__(self, tokenizer_json: bytes, settings: Settings, first_step: int) -> None:
        self._tokenizer_json, self._settings, self._first_step = tokenizer_json, settings, first_step

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        # What a resumed run draws lies behind all that the one before can have drawn.
        seed = (self._first_step << 24) + number
        batches = training_batches(self._tokenizer_json, seed, count, self._settings.batch)
        if self._settings.fixed_batches:
            kept = [next(batches) for _ in range(self._settings.fixed_batches)]
            while True:
                yield from kept
        yield from batches


class Trainer:
    """The weights that learn, and everything that is kept between steps."""

    def __init__(
        self,
        model: FrozenLlama,
        writer: Writer,
        device: torch.device,
        settings: Settings,
        *,
        is_compiled: bool,
    ) -> None:
        self.model, self.device, self.settings = model, device, settings
        generator = torch.Generator().manual_seed(settings.seed)
        rms = float(model.embedding.square().mean().sqrt())
        weights = {name: weight.to(device) for name, weight in new_weights(generator, rms).items()}
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.heads = torch.nn.Sequential(
            torch.nn.Linear(VISION.text_hidden_size, REDUCED),
            torch.nn.Flatten(),
            torch.nn.Linear(NUM_EMBEDDINGS * REDUCED, sum(NUM_CLASSES)),
        ).to(device)
        self.averaged = {name: weight.detach().clone() for name, weight in weights.items()}
        matrices = [weight for weight in self.weights.values() if weight.dim() > 1]
        vectors = [weight for weight in self.weights.values() if weight.dim() == 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.02},
                {"params": [*vectors, *self.heads.parameters()], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.step, self.trained_s = 0, 0.0
        self.is_compiled = is_compiled
        self._class_index, self._class_mask = _class_table(device)
        vocabulary = _vocabulary_of_facts(writer).to(device)
        self._fact_embeddings = model.embedding[vocabulary]
        self._fact_index = torch.full((len(model.embedding),), -1, device=device)
        self._fact_index[vocabulary] = torch.arange(len(vocabulary), device=device)

    def train_step(self, batch: Tensors) -> dict[str, torch.Tensor]:
        """One step; returns losses as tensors, so that nothing waits for the device."""
        progress = min(1.0, self.trained_s / 60 / self.settings.schedule_minutes)
        rate = min(1.0, (self.step + 1) / WARM_UP_STEPS) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * rate
        moved = batch.to(self.device)
        fact_weight = max(0.0, 1 - progress / FACTS)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            embeds = embed(self.weights, moved, is_compiled=self.is_compiled)
            classes = self.heads(embeds)
            told = self._facts_loss(embeds, moved.facts)
            seen = self._attributes_loss(classes.float(), moved.attributes)
            loss = fact_weight * told + ATTRIBUTES * (1 - progress) * seen
            answers = torch.zeros((), device=self.device)
            if progress >= WRITING:
                logits = answer_logits(self.model, moved, embeds)
                answers = F.cross_entropy(logits.float(), moved.targets)
                loss = loss + answers
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [*self.weights.values(), *self.heads.parameters()], 1.0, foreach=True
        )
        self.optimiser.step()
        self.step += 1
        with torch.no_grad():
            keep = min(EMA, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.averaged.values()), [*self.weights.values()], 1 - keep)
        return {
            "answers": answers.detach(),
            "facts": told.detach(),
            "attributes": seen.detach(),
            "gradient": norm,
        }

    def _facts_loss(self, embeds: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """How far embeddings are from those of the words of `questions.facts`: as classes, and as vectors."""
        targets = torch.where(facts < 0, -1, self._fact_index[facts.clamp(min=0)])
        is_told = targets >= 0
        told, targets = embeds[is_told], targets[is_told]
        words = self._fact_embeddings[targets]
        distance = (told.float() - words).square().mean() / words.square().mean()
        return F.cross_entropy((told @ self._fact_embeddings.T).float(), targets) + 0.5 * distance

    def _attributes_loss(self, classes: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """Sum over the attributes of their mean cross entropy."""
        logits = classes[:, self._class_index].masked_fill(~self._class_mask, float("-inf"))
        losses = F.cross_entropy(logits.transpose(1, 2), attributes, ignore_index=-1, reduction="none")
        is_known = attributes >= 0
        return (losses.sum(0) / is_known.sum(0).clamp(min=1)).sum()

    def save(self, folder: Path) -> None:
        """The averaged weights as the model, and what `resume` goes on from."""
        save_model(folder, self.averaged)
        for name, tensors in self._state().items():
            # Halves, so that the files are as small as the model; the optimiser's need the range of fp32.
            dtype = torch.float16 if name == "weights" else torch.bfloat16
            halves = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
            save_file(halves, folder / f"checkpoint-{name}.safetensors")
        counts = {"step": self.step, "trained_s": self.trained_s}
        (folder / CHECKPOINT).write_text(json.dumps(counts) + "\n")

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        # The optimiser has no state before its first step; without a gradient that step is nearly nothing.
        for parameter in (*self.weights.values(), *self.heads.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.optimiser.step()
        for name, tensors in self._state().items():
            saved = load_file(folder / f"checkpoint-{name}.safetensors")
            for key, tensor in tensors.items():
                tensor.copy_(saved[key])
        averaged = read_weights(folder)
        for key, weight in self.averaged.items():
            weight.copy_(averaged[key])
        counts = json.loads((folder / CHECKPOINT).read_text())
        self.step, self.trained_s = counts["step"], counts["trained_s"]
        for state in self.optimiser.state.values():
            state["step"].fill_(self.step)

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that changes from step to step beside the averaged weights; not the momentum of the heads."""
        adam = self.optimiser.state
        learned = {name: adam[weight] for name, weight in self.weights.items() if weight in adam}
        return {
            "weights": dict(self.weights),
            "momentum": {name: state["exp_avg"] for name, state in learned.items()},
            "variance": {name: state["exp_avg_sq"] for name, state in learned.items()},
            "heads": dict(self.heads.named_parameters()),
        }


def _vocabulary_of_facts(writer: Writer) -> torch.Tensor:
    """Ids of the tokens that facts consist of, in order."""
    ids = {int(i) for seed in range(VOCABULARY_PICTURES) for i in writer.facts(draw_scene(seed))}
    return torch.tensor(sorted(ids - {-1}))


def _class_table(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of each attribute among all classes, [attributes, most classes], and which of them exist."""
    most, first = max(NUM_CLASSES), 0
    index = torch.zeros(len(NUM_CLASSES), most, dtype=torch.int64)
    mask = torch.zeros(len(NUM_CLASSES), most, dtype=torch.bool)
    for row, count in enumerate(NUM_CLASSES):
        index[row, :count] = torch.arange(first, first + count)
        mask[row, :count] = True
        first += count
    return index.to(device), mask.to(device)


def evaluate(trainer: Trainer, batches: list[Batch]) -> list[Score]:
    """Of the averaged weights."""
    scores: list[Score] = []
    for batch in batches:
        scores += score_batch(trainer.averaged, trainer.model, batch, trainer.device)
    return scores


def train(trainer: Trainer, examples: Examples, held_out: list[Batch], out: Path) -> list[dict[str, float]]:
    """Until the time is up. Returns what was reported."""
    settings = trainer.settings
    loader = DataLoader(
        examples,
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=3 if settings.workers else None,
        collate_fn=_as_is,
        pin_memory=trainer.device.type == "cuda",
    )
    report, waited_s = [], 0.0
    began, before_s, first_step = time.monotonic(), trainer.trained_s, trainer.step
    reported_s, evaluated_s, reported_step = began, began, trainer.step
    batches = iter(loader)
    while True:
        asked = time.monotonic()
        batch = next(batches)
        waited_s += time.monotonic() - asked
        losses = trainer.train_step(batch.tensors() if isinstance(batch, Batch) else batch)
        now = time.monotonic()
        trainer.trained_s = before_s + now - began
        is_over = now - began > settings.minutes * 60 or trainer.step - first_step == settings.max_steps
        if now - reported_s > REPORT_S or is_over:
            values = {name: float(value) for name, value in losses.items()}
            now = time.monotonic()
            row = {
                "step": trainer.step,
                "trained_s": now - began + before_s,
                **values,
                "steps_per_s": (trainer.step - reported_step) / (now - reported_s),
                "waited": waited_s / (now - reported_s),
            }
            print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)
            report.append(row)
            reported_s, reported_step, waited_s = now, trainer.step, 0.0
        if now - evaluated_s > settings.eval_s and not is_over:
            print("held out:", by_topic(evaluate(trainer, held_out)), flush=True)
            trainer.save(out)
            evaluated_s = time.monotonic()
        if is_over:
            trainer.save(out)
            return report


def _as_is(batch: Batch) -> Batch:
    return batch


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and the checkpoint")
    parser.add_argument("--model", default=TEXT_SOURCE, help="the language model, as in a manifest")
    parser.add_argument("--minutes", type=float, default=14, help="of training in this run")
    parser.add_argument("--schedule-minutes", type=float, help="of all runs together; default: of this one")
    parser.add_argument("--batch", type=int, default=128, help="examples of a step, a multiple of 64")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--workers", type=int, default=15, help="processes that draw pictures")
    parser.add_argument("--eval-s", type=float, default=60, help="seconds between looks at held-out examples")
    parser.add_argument("--eval-examples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="folder of the checkpoint to go on from")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many")
    parser.add_argument(
        "--fixed-batches", type=int, default=0, help="learn these by heart: a test of the code"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, write the model, and say how good it is."""
    args = _arguments()
    settings = Settings(
        args.minutes, args.schedule_minutes or args.minutes, args.batch, args.learning_rate, args.workers,
        args.eval_s, args.eval_examples, args.seed, args.max_steps, args.fixed_batches,
    )  # fmt: skip
    prepared = prepare(args.model, lambda message, done: None)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_compiled = device.type == "cuda" and not args.no_compile
    model = FrozenLlama(prepared.config, load_weights(prepared), device, dtype, is_compiled=is_compiled)
    writer = Writer(prepared.tokenizer_json)
    trainer = Trainer(model, writer, device, settings, is_compiled=is_compiled)
    print(f"{sum(weight.numel() for weight in trainer.weights.values()):,} weights learn", flush=True)
    if args.resume is not None:
        trainer.resume(args.resume)
    size = min(settings.batch, settings.eval_examples)
    held_out = [held_out_batch(writer, first, size) for first in range(0, settings.eval_examples, size)]
    if settings.fixed_batches:
        held_out = []
    report = train(trainer, Examples(prepared.tokenizer_json, settings, trainer.step), held_out, args.out)
    scores = evaluate(trainer, held_out)
    print("at the end:", by_topic(scores), flush=True)
    (args.out / "training.json").write_text(
        json.dumps({"settings": asdict(settings), "report": report}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
