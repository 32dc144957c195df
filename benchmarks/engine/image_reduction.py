"""What the reduction of pictures saves and what it costs in answers, by its thresholds, on the model of examples/tiny_vlm.

    python benchmarks/engine/image_reduction.py [--quick] [--json FILE] [--threads 2] [--questions N]

One picture and one question each, of seeds that training never drew, through the encoder and the text model that serve.
`same` is the share of questions with the same greedy answer as without reduction, token for token to its end; `right` that of
questions with the right answer; both with a 95 % interval (Wilson). Work is counted in multiplications, as
workers.engine.completion.images_reduced estimates it, not timed; bytes are those of the pools, fp32.
"""

import argparse
import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from examples.tiny_vlm.batches import ASK, BEGIN, END  # noqa: E402
from examples.tiny_vlm.questions import Question, ask  # noqa: E402
from examples.tiny_vlm.scene import draw_scene, paint, with_noise  # noqa: E402
from examples.tiny_vlm.scoring import wilson  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from phasewise_kernels import jit  # noqa: E402
from workers.api import ImageReduction  # noqa: E402
from workers.launch_environment import missing_variables  # noqa: E402
from workers.model.forward_batch import Embeds, ForwardBatch  # noqa: E402
from workers.model.llama import Llama  # noqa: E402
from workers.model.prepare import load_weights, prepare  # noqa: E402
from workers.model.reduction import FilteringBatch  # noqa: E402
from workers.model.vision.idefics3 import Idefics3Encoder  # noqa: E402
from workers.model.vision.idefics3_config import Idefics3Vision  # noqa: E402

SOURCE = ROOT / "examples" / "tiny_vlm" / "model"
BLOCK_SIZE, NUM_BLOCKS = 16, 64
MAX_ANSWER_TOKENS = 48
#: Of the pictures: of no training and no other measurement.
FIRST_SEED = 3 << 30
FLOAT_BYTES = 4

NONE = ImageReduction()
MERGES = [ImageReduction(merge_threshold=threshold) for threshold in (0.75, 0.7, 0.65, 0.6)]
#: The last is one of the paper's operating points, for 576 embeddings.
FILTERS = [
    ImageReduction(global_threshold=total, individual_threshold=individual)
    for total, individual in ((0.0003, 0.0003), (0.001, 0.001), (0.003, 0.003), (0.011, 0.01))
]
LATE = ImageReduction(global_threshold=0.003, individual_threshold=0.003, layers=(0.4375, 0.6))
MORE_KEYS = ImageReduction(global_threshold=0.003, individual_threshold=0.003, key_fraction=0.3)
BOTH = ImageReduction(merge_threshold=0.7, global_threshold=0.001, individual_threshold=0.001)
SETTINGS = [NONE, *MERGES, *FILTERS, LATE, MORE_KEYS, BOTH]
QUICK_SETTINGS = [NONE, MERGES[1], FILTERS[1], BOTH]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about one picture, and what the whole prompt is answered with, its end included."""

    question: Question
    pixels: torch.Tensor
    token_ids: list[int]
    right: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one question with one setting. encoder_work, prefill_work: of that without reduction."""

    topic: str
    num_encoded: int
    num_kept: int
    num_text: int
    encoder_work: float
    prefill_work: float
    is_same: bool
    is_right: bool


class Answering:
    """One prompt at a time, on the CPU."""

    def __init__(self, source: Path) -> None:
        prepared = prepare(str(source), lambda _what, _done: None)
        weights = load_weights(prepared)
        vision = prepared.config.vision
        if not isinstance(vision, Idefics3Vision):
            raise TypeError(f"{source} has no vision encoder of Idefics3")
        self.vision = vision
        self.config = prepared.config
        self._encoder = Idefics3Encoder(vision, weights)
        self._model = Llama(prepared.config, weights)
        self._tokenizer = Tokenizer.from_str(prepared.tokenizer_json.decode())
        self._ends = prepared.config.eos_token_ids
        self._kv_cache = torch.zeros(self._model.kv_cache_shape(NUM_BLOCKS, BLOCK_SIZE))

    def asked(self, image: NDArray[np.uint8], question: Question) -> Asked:
        """With the answer that the whole prompt gets."""
        plan = self.vision.plan(image.shape[1], image.shape[0])
        (pixels,) = self._encoder.prepare(image, plan, range(1))
        token_ids = self._tokenizer.encode(BEGIN + plan.text + question.text + ASK).ids
        right = self._tokenizer.encode(question.answer + END).ids
        whole = Asked(question, pixels, token_ids, right, [])
        prompt = self.prefill(whole, NONE)
        answer = [int(prompt.logits[0].argmax())]
        while answer[-1] not in self._ends and len(answer) < MAX_ANSWER_TOKENS:
            answer.append(int(self._after(prompt, answer)[-1].argmax()))
        return Asked(question, pixels, token_ids, right, answer)

    def prefill(self, asked: Asked, reduction: ImageReduction) -> "Prompt":
        """Compute the prompt; its KV is in the first slots of the cache."""
        ids = torch.tensor(asked.token_ids)
        picture = (ids == self.vision.image_token_id).nonzero()[:, 0]
        if reduction.is_on:
            embeddings, kept = self._encoder.encode_reduced(asked.pixels, reduction)
            offsets, is_key = torch.tensor(kept.offsets), torch.tensor(kept.is_key)
        else:
            (embeddings,) = self._encoder.encode([asked.pixels])
            offsets, is_key = torch.arange(len(picture)), torch.zeros(len(picture), dtype=torch.bool)
        is_there = torch.ones(len(ids), dtype=torch.bool)
        is_there[picture] = False
        is_there[picture[offsets]] = True
        positions = is_there.nonzero()[:, 0]
        batch = FilteringBatch(
            token_ids=ids[positions],
            positions=torch.arange(len(positions)),
            rope_positions=positions.expand(3, -1),
            rope_lens=None,
            embeds=Embeds(torch.searchsorted(positions, picture[offsets]), embeddings),
            is_key=is_key,
            block_table=np.arange(NUM_BLOCKS, dtype=np.int32),
            block_size=BLOCK_SIZE,
            reduction=reduction,
            wants_logits=True,
        )
        found = self._model.forward_filtering(batch, self._kv_cache)
        return Prompt(len(ids), len(picture), len(offsets), len(found.rows), found.logits, found.layer_rows)

    def outcome(self, asked: Asked, reduction: ImageReduction) -> Outcome:
        """How the question fares with this reduction."""
        prompt = self.prefill(asked, reduction)
        num_text = prompt.num_tokens - prompt.num_planned

        def work(num_rows: int) -> float:
            return num_rows * (1 + num_rows / 2 / self.config.attention_tokens)

        layers = self.vision.num_layers
        merged = prompt.num_encoded / prompt.num_planned
        return Outcome(
            str(asked.question.topic),
            prompt.num_encoded,
            prompt.num_left - num_text,
            num_text,
            # The first layer computes all patches.
            (1 + (layers - 1) * merged) / layers,
            sum(map(work, prompt.layer_rows)) / len(prompt.layer_rows) / work(prompt.num_tokens),
            self._says(prompt, asked.answer),
            self._says(prompt, asked.right),
        )

    def _says(self, prompt: "Prompt", answer: list[int]) -> bool:
        """Greedy decoding gives these tokens: each is the likeliest after those before it."""
        logits = prompt.logits
        if len(answer) > 1:
            logits = torch.cat((logits, self._after(prompt, answer[:-1])))
        return logits.argmax(dim=-1).tolist() == answer

    def _after(self, prompt: "Prompt", token_ids: list[int]) -> torch.Tensor:
        """Logits after each of these, which follow the prompt, [len(token_ids), vocab_size]."""
        num = len(token_ids)
        places = torch.arange(prompt.num_left, prompt.num_left + num)
        positions = torch.arange(prompt.num_tokens, prompt.num_tokens + num)
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=places,
            slots=places,
            block_tables=np.arange(NUM_BLOCKS, dtype=np.int32)[None],
            query_lens=np.array([num]),
            context_lens=np.array([prompt.num_left + num]),
            logit_rows=torch.arange(num),
            rope_positions=positions.expand(3, -1),
        )
        return self._model.forward(batch, self._kv_cache)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One that is in the cache. Tokens of the whole prompt, of its pictures, embeddings, and tokens that are left."""

    num_tokens: int
    num_planned: int
    num_encoded: int
    num_left: int
    logits: torch.Tensor
    layer_rows: tuple[int, ...]


def drawn(seed: int) -> tuple[NDArray[np.uint8], Question]:
    """A picture as its file would be, and a question about it."""
    scene = draw_scene(seed)
    return with_noise(np.asarray(paint(scene)), scene), ask([scene], random.Random(seed), 1)[0]


@dataclass(frozen=True, slots=True)
class Row:
    """Of one setting: means over the questions, and shares with the ends of their intervals.

    topics: how often the same, how often right, and of how many.
    """

    name: str
    reduction: ImageReduction
    num_questions: int
    embeddings: float
    kept: float
    text_tokens: float
    embedding_bytes: float
    kv_bytes: float
    encoder_work: float
    prefill_work: float
    same: tuple[float, float, float]
    right: tuple[float, float, float]
    topics: dict[str, tuple[int, int, int]]


def summary(answering: Answering, reduction: ImageReduction, outcomes: list[Outcome]) -> Row:
    """What became of all questions with one setting."""
    config, count = answering.config, len(outcomes)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * FLOAT_BYTES
    encoded = sum(one.num_encoded for one in outcomes) / count
    kept = sum(one.num_kept for one in outcomes) / count
    text = sum(one.num_text for one in outcomes) / count
    same, right = sum(one.is_same for one in outcomes), sum(one.is_right for one in outcomes)
    topics: dict[str, tuple[int, int, int]] = {}
    for one in outcomes:
        totals = topics.get(one.topic, (0, 0, 0))
        topics[one.topic] = totals[0] + one.is_same, totals[1] + one.is_right, totals[2] + 1
    return Row(
        name=name_of(reduction),
        reduction=reduction,
        num_questions=count,
        embeddings=encoded,
        kept=kept,
        text_tokens=text,
        embedding_bytes=encoded * config.hidden_size * FLOAT_BYTES,
        kv_bytes=(text + kept) * token_bytes,
        encoder_work=sum(one.encoder_work for one in outcomes) / count,
        prefill_work=sum(one.prefill_work for one in outcomes) / count,
        same=(same / count, *wilson(same, count)),
        right=(right / count, *wilson(right, count)),
        topics=dict(sorted(topics.items())),
    )


def name_of(reduction: ImageReduction) -> str:
    """For a row of the table."""
    if not reduction.is_on:
        return "none"
    parts = []
    if reduction.is_merging:
        parts.append(f"merge {reduction.merge_threshold:g}")
    if reduction.is_filtering:
        parts.append(f"filter {reduction.global_threshold:g}/{reduction.individual_threshold:g}")
    if reduction.key_fraction != NONE.key_fraction:
        parts.append(f"keys {reduction.key_fraction:g}")
    if reduction.layers != NONE.layers:
        parts.append(f"layers {', '.join(f'{layer:g}' for layer in reduction.layers)}")
    return ", ".join(parts)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few questions and settings, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, help="default: 60, or 8 with --quick")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    answering = Answering(SOURCE)
    settings = QUICK_SETTINGS if args.quick else SETTINGS
    num_questions = args.questions or (8 if args.quick else 60)
    outcomes: list[list[Outcome]] = [[] for _ in settings]
    for number in range(num_questions):
        asked = answering.asked(*drawn(FIRST_SEED + number))
        for found, reduction in zip(outcomes, settings, strict=True):
            found.append(answering.outcome(asked, reduction))
        print(f"\rquestion {number + 1} of {num_questions}", end="", flush=True)
    print(
        f"\n{'':<40}{'embeddings':>11}{'kept':>7}{'emb. KB':>9}{'KV KB':>8}{'encode':>8}{'prefill':>8}"
        f"{'same answer':>18}{'right':>18}"
    )
    rows = [summary(answering, one, found) for one, found in zip(settings, outcomes, strict=True)]
    for row in rows:
        same, right = (f"{100 * a:.0f} % ({100 * b:.0f}-{100 * c:.0f})" for a, b, c in (row.same, row.right))
        print(
            f"{row.name:<40}{row.embeddings:>11.1f}{row.kept:>7.1f}{row.embedding_bytes / 1000:>9.0f}"
            f"{row.kv_bytes / 1000:>8.0f}{row.encoder_work:>8.2f}{row.prefill_work:>8.2f}{same:>18}{right:>18}"
        )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    sys.exit(main())
