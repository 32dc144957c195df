"""The model as it is served: its folder through the loading code, pictures through the processor, greedy decoding."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.tiny_vlm.batches import ASK, BEGIN
from examples.tiny_vlm.questions import Question, ask, normalised
from examples.tiny_vlm.scene import draw_scene, paint, with_noise
from workers.model.forward_batch import Embeds, ForwardBatch
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare
from workers.model.vision.idefics3 import Idefics3Encoder
from workers.model.vision.idefics3_config import Idefics3Vision

BLOCK_SIZE, NUM_BLOCKS = 16, 64
MAX_ANSWER_TOKENS = 48
#: Pictures that neither training nor any other measurement drew.
FIRST_SEED = 1 << 30


class ServedModel:
    """One prompt at a time, on the CPU."""

    def __init__(self, source: str) -> None:
        """source: of the model, as in a manifest. Raises as `prepare`."""
        prepared = prepare(source, lambda message, done: None)
        weights = load_weights(prepared)
        if not isinstance(prepared.config.vision, Idefics3Vision):
            raise TypeError(f"{source} has no vision encoder of Idefics3")
        self.vision = prepared.config.vision
        self._encoder = Idefics3Encoder(self.vision, weights)
        self._model = Llama(prepared.config, weights)
        self._tokenizer = Tokenizer.from_str(prepared.tokenizer_json.decode())
        self._ends = prepared.config.eos_token_ids
        self._kv_cache = torch.zeros(self._model.kv_cache_shape(NUM_BLOCKS, BLOCK_SIZE))

    def answer(self, images: Sequence[NDArray[np.uint8]], question: str) -> str:
        """images: RGB, [height, width, 3], which stand before the question."""
        plans = [self.vision.plan(image.shape[1], image.shape[0]) for image in images]
        embeds = []
        for image, plan in zip(images, plans, strict=True):
            embeds += self._encoder.encode(self._encoder.prepare(image, plan, range(len(plan.tiles))))
        text = BEGIN + "".join(plan.text for plan in plans) + question + ASK
        new = torch.tensor(self._tokenizer.encode(text).ids)
        rows = torch.nonzero(new == self.vision.image_token_id).flatten()
        given, answer, first = Embeds(rows, torch.cat(embeds)), list[int](), 0
        while len(answer) < MAX_ANSWER_TOKENS:
            token = self._step(new, first, given if first == 0 else None)
            if token in self._ends:
                break
            answer.append(token)
            first += len(new)
            new = torch.tensor([token])
        decoded: str = self._tokenizer.decode(answer)
        return decoded

    def _step(self, tokens: torch.Tensor, first: int, embeds: Embeds | None) -> int:
        """The most likely token behind these, which stand at `first` and on."""
        positions = torch.arange(first, first + len(tokens))
        batch = ForwardBatch(
            token_ids=tokens,
            positions=positions,
            slots=positions,
            block_tables=np.arange(NUM_BLOCKS, dtype=np.int32)[None],
            query_lens=np.array([len(tokens)]),
            context_lens=np.array([first + len(tokens)]),
            logit_rows=torch.tensor([len(tokens) - 1]),
            embeds=embeds,
        )
        return int(self._model.forward(batch, self._kv_cache)[0].argmax())


def measure_served(folder: Path, count: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions by topic, of `count` questions about as many pictures as they are drawn."""
    model, totals = ServedModel(str(folder)), dict[str, tuple[int, int]]()
    for number in range(count):
        image, question = _drawn(FIRST_SEED + number)
        is_right = normalised(model.answer([image], question.text)) == normalised(question.answer)
        right, asked = totals.get(question.topic, (0, 0))
        totals[question.topic] = right + is_right, asked + 1
    return dict(sorted(totals.items()))


def _drawn(seed: int) -> tuple[NDArray[np.uint8], Question]:
    """A picture as its file would be, and a question about it."""
    scene = draw_scene(seed)
    # Another generator than the scene's, whose first choice would decide the question's.
    question = ask([scene], random.Random(seed * 7 + 3), 1)[0]
    return with_noise(np.asarray(paint(scene)), scene), question
