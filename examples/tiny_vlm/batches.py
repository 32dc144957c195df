"""Prompts with pictures as rows of numbers, for training and for measuring.

An example is one prompt's beginning (system message, one to three pictures) and several questions that all stand
behind it, each as if it were alone: a question sees the beginning and itself, and its positions follow those of
the beginning. So each is a single-turn chat as it is served, and the pictures are computed once.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from examples.tiny_vlm.questions import NUM_CLASSES, Question, ask, attributes, facts
from examples.tiny_vlm.scene import TRAINING, Choice, Scene, draw_scene, paint, with_noise
from examples.tiny_vlm.shape import IMAGE_TEXT, IMAGE_TOKEN_ID, NUM_EMBEDDINGS, TILE

#: Tokens of an example.
LENGTH = 320
MAX_QUESTIONS = 10
#: Of 64 examples, how many have so many pictures.
PICTURES_OF_64 = {1: 48, 2: 11, 3: 5}
MAX_PICTURES = max(PICTURES_OF_64)
#: Evaluation uses seeds below.
FIRST_TRAINING_SEED = 1 << 40
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BEGIN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


def layouts(num_pictures: int) -> tuple[str, str, str]:
    """How pictures, as "{}", stand before a question; the first way is the most frequent."""
    if num_pictures == 1:
        return "{}", "{}\n", "Look at this picture: {}"
    numbered = "".join(f"Picture {number + 1}: {{}}\n" for number in range(num_pictures))
    return "{}" * num_pictures, "{}\n" * num_pictures, numbered


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one length. Padding sees and is seen by itself alone."""

    #: [num_examples, LENGTH] int64.
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    #: 0 is the beginning, k the k-th question with its answer, -1 padding; like tokens, int8.
    segments: NDArray[np.int8]
    #: The token that is to follow this one in an answer, -1 elsewhere; like tokens, int64.
    targets: NDArray[np.int64]
    #: Places of embeddings in the flattened tokens, in the order of pictures, [num_pictures * NUM_EMBEDDINGS].
    picture_rows: NDArray[np.int64]
    #: [num_pictures, 3, TILE, TILE] uint8.
    pixels: NDArray[np.uint8]
    #: See `questions.attributes`, [num_pictures, len(NUM_CLASSES)] int64.
    attributes: NDArray[np.int64]
    #: Tokens of `questions.facts`, -1 behind them, [num_pictures, NUM_EMBEDDINGS] int64.
    facts: NDArray[np.int64]
    questions: tuple[tuple[Question, ...], ...]

    def tensors(self, *, is_pinned: bool = False) -> "Tensors":
        """As the forward pass takes them."""
        targets = self.targets.ravel()
        answer_rows = np.flatnonzero(targets >= 0)
        arrays = (
            self.tokens, self.positions, self.segments, self.picture_rows, self.pixels, self.attributes, self.facts,
            answer_rows, targets[answer_rows],
        )  # fmt: skip
        tensors = [torch.from_numpy(array) for array in arrays]
        return Tensors(*[tensor.pin_memory() for tensor in tensors] if is_pinned else tensors)

    def pin_memory(self) -> "Tensors":
        """What the loader's thread makes of a batch."""
        return self.tensors(is_pinned=True)


@dataclass(frozen=True, slots=True)
class Tensors:
    """`Batch` as tensors."""

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    picture_rows: torch.Tensor
    pixels: torch.Tensor
    attributes: torch.Tensor
    facts: torch.Tensor
    #: Places in the flattened tokens whose next token is part of an answer, and that token.
    answer_rows: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Tensors":
        """A copy there; from pinned memory it does not wait."""
        moved = [getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)]
        return Tensors(*moved)


def tile_pixels(scene: Scene) -> NDArray[np.uint8]:
    """The picture as the processor makes a tile of it, or nearly, [3, TILE, TILE]."""
    image = paint(scene)
    if image.size == (2 * TILE, 2 * TILE) and scene.style_seed % 4:
        # Fifteen times as fast as the processor's filter, which the others go through.
        image = image.reduce(2)
    else:
        image = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
    return with_noise(np.asarray(image), scene).transpose(2, 0, 1)


class Writer:
    """Writes examples with one tokenizer."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids))
        return text

    def batch(self, examples: Sequence[tuple[Sequence[Scene], Sequence[Question], str]]) -> Batch:
        """examples: pictures, questions and how the pictures stand, one of `layouts`. Questions that do not fit are left out."""
        shape = len(examples), LENGTH
        tokens, positions, targets = (np.zeros(shape, np.int64) for _ in range(3))
        segments = np.full(shape, -1, np.int8)
        targets[:] = -1
        asked = []
        for i, (scenes, questions, layout) in enumerate(examples):
            begin = self.encode(BEGIN + layout.format(*[IMAGE_TEXT] * len(scenes)))
            filled = self._put(i, 0, 0, begin, None, (tokens, positions, segments, targets))
            kept = []
            for question in questions:
                prompt, answer = self.encode(question.text + ASK), self.encode(question.answer + END)
                if filled + len(prompt) + len(answer) > LENGTH:
                    continue
                kept.append(question)
                row = prompt + answer
                parts = (tokens, positions, segments, targets)
                filled = self._put(i, filled, len(kept), row, len(prompt), parts, len(begin))
            asked.append(tuple(kept))
        scenes = [scene for pictures, _, _ in examples for scene in pictures]
        rows = np.flatnonzero(tokens.ravel() == IMAGE_TOKEN_ID)
        assert len(rows) == len(scenes) * NUM_EMBEDDINGS
        return Batch(
            tokens, positions, segments, targets, rows,
            np.stack([tile_pixels(scene) for scene in scenes]),
            np.array([attributes(scene) for scene in scenes], np.int64).reshape(-1, len(NUM_CLASSES)),
            np.stack([self.facts(scene) for scene in scenes]),
            tuple(asked),
        )  # fmt: skip

    def facts(self, scene: Scene) -> NDArray[np.int64]:
        """See `Batch.facts`; what does not fit is left out."""
        token_ids = self._encode(" " + facts(scene))[:NUM_EMBEDDINGS]
        padded = np.full(NUM_EMBEDDINGS, -1, np.int64)
        padded[: len(token_ids)] = token_ids
        return padded

    @staticmethod
    def _put(
        i: int,
        start: int,
        segment: int,
        row: list[int],
        num_prompt: int | None,
        parts: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8], NDArray[np.int64]],
        position: int = 0,
    ) -> int:
        """Write tokens behind the others of example i; returns where they end."""
        tokens, positions, segments, targets = parts
        end = start + len(row)
        tokens[i, start:end] = row
        positions[i, start:end] = np.arange(position, position + len(row))
        segments[i, start:end] = segment
        if num_prompt is not None:
            targets[i, start + num_prompt - 1 : end - 1] = row[num_prompt:]
        return end


def example(
    seed: int, num_pictures: int, choice: Choice = TRAINING
) -> tuple[list[Scene], list[Question], str]:
    """Pictures, questions, and how the pictures stand.

    Takes the seeds seed..seed + num_pictures - 1, so seeds of examples are MAX_PICTURES apart.
    """
    scenes = [draw_scene(seed + i, choice) for i in range(num_pictures)]
    rng = random.Random(seed * 7 + 3)
    layout = rng.choices(layouts(num_pictures), (8, 2, 2))[0]
    return scenes, ask(scenes, rng, MAX_QUESTIONS), layout


def training_batches(tokenizer_json: bytes, seed: int, stride: int, num_examples: int) -> Iterator[Batch]:
    """Endless batches from seeds that no other `seed` below `stride` gives. num_examples: a multiple of 64."""
    writer = Writer(tokenizer_json)
    num_pictures = [number for number, share in PICTURES_OF_64.items() for _ in range(share)]
    num_pictures *= num_examples // 64
    next_seed = FIRST_TRAINING_SEED + seed
    while True:
        examples = []
        for number in num_pictures:
            examples.append(example(next_seed * MAX_PICTURES, number))
            next_seed += stride
        yield writer.batch(examples)


def held_out_batch(
    writer: Writer,
    first: int,
    num_examples: int,
    choice: Choice = TRAINING,
    *,
    num_pictures: int | None = None,
) -> Batch:
    """Examples from seeds that training never draws: 0 and up. num_pictures: None is one, two or three."""
    numbers = [num_pictures or (1, 1, 1, 1, 1, 2, 1, 1, 2, 3)[i % 10] for i in range(num_examples)]
    return writer.batch(
        [example((first + i) * MAX_PICTURES, number, choice) for i, number in enumerate(numbers)]
    )
