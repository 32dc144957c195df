"""The model that the workers have loaded, as far as the gateway knows it."""

import asyncio
import hashlib
import logging
from dataclasses import dataclass, replace

from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.errors import NoModelYet, UnusableModel
from orchestrator.gateway.model_texts import ModelTexts
from workers.api import ModelInfo, WorkerId
from workers.block_hash import root_hash
from workers.model.vision.config import VisionConfig, read_vision_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model, with what turns its tokens into text and back."""

    #: Its limits are those of the smallest worker: a request must fit wherever it may go.
    info: ModelInfo
    texts: ModelTexts
    #: How pictures stand in prompts; None when the model takes none.
    vision: VisionConfig | None = None
    tokenizer_digest: str = ""

    def prefix_root(self, salt: str) -> bytes:
        """What workers chain the first block of a prompt to; of models with dynamic RoPE scaling, of short prompts alone."""
        return root_hash(self.info.model_digest, self.tokenizer_digest, salt)


class ServedModel:
    """Learns the model from workers as they come; the last one counts. Limits of workers that go are forgotten."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        #: Longest sequence, and most embeddings of pictures, of each worker; 0 where it has neither.
        self._limits: dict[WorkerId, tuple[int, int]] = {}
        self._lock = asyncio.Lock()

    @property
    def is_known(self) -> bool:
        """Prompts can be read."""
        return self._loaded is not None

    def get(self, why_not: str) -> LoadedModel:
        """The model. Raises NoModelYet with `why_not`."""
        if self._loaded is None:
            raise NoModelYet(why_not)
        return self._loaded

    async def learn(self, worker: WorkerView, info: ModelInfo) -> None:
        """A worker has loaded this model. Raises UnusableModel."""
        async with self._lock:
            loaded = self._loaded
            if loaded is None or not _is_same(loaded.info, info):
                # Some tenths of a second for a large vocabulary.
                texts = await asyncio.to_thread(ModelTexts, info)
                logger.info(
                    "model_learnt worker_id=%s architecture=%s digest=%s",
                    worker.worker_id,
                    info.architecture,
                    info.model_digest,
                )
                if loaded is not None:
                    self._limits.clear()
                vision = _vision(info)
                digest = hashlib.sha256(info.tokenizer_json).hexdigest()
            else:
                texts, vision, digest = loaded.texts, loaded.vision, loaded.tokenizer_digest
            self._limits[worker.worker_id] = info.max_sequence_tokens, info.max_image_embeddings
            self._loaded = LoadedModel(self._limited(info), texts, vision, digest)

    def keep(self, view: ClusterView) -> None:
        """Forget the limits of workers that this view does not have."""
        there = {worker.worker_id for worker in view.workers}
        gone = self._limits.keys() - there
        for worker_id in gone:
            del self._limits[worker_id]
        if gone and self._limits and self._loaded is not None:
            self._loaded = replace(self._loaded, info=self._limited(self._loaded.info))

    def _limited(self, info: ModelInfo) -> ModelInfo:
        """With the limits of the smallest worker."""
        num_tokens, num_embeddings = (
            min((limit for limit in limits if limit > 0), default=0)
            for limits in zip(*self._limits.values(), strict=True)
        )
        # With nothing but encode workers so far no request runs anyway.
        num_tokens = num_tokens or info.max_context_tokens
        return replace(info, max_sequence_tokens=num_tokens, max_image_embeddings=num_embeddings)


def _vision(info: ModelInfo) -> VisionConfig | None:
    if not info.vision_json:
        return None
    try:
        return read_vision_json(info.vision_json)
    except ValueError as error:
        raise UnusableModel(f"its vision configuration cannot be read: {error}") from error


def _is_same(one: ModelInfo, other: ModelInfo) -> bool:
    def unlimited(info: ModelInfo) -> ModelInfo:
        return replace(info, max_sequence_tokens=0, max_image_embeddings=0, block_size=0)

    return unlimited(one) == unlimited(other)
