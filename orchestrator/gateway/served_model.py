"""The model that the workers have loaded, as far as the gateway knows it."""

import asyncio
import logging
from dataclasses import dataclass, replace

from orchestrator.control.view import WorkerView
from orchestrator.errors import NoModelYet
from orchestrator.gateway.model_texts import ModelTexts
from workers.api import ModelInfo, WorkerId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model, with what turns its tokens into text and back."""

    #: `max_sequence_tokens` is that of the smallest worker: a request must fit wherever it may go.
    info: ModelInfo
    texts: ModelTexts


class ServedModel:
    """Learns the model from workers as they come; the last one counts."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._max_sequence_tokens: dict[WorkerId, int] = {}
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
                    self._max_sequence_tokens.clear()
            else:
                texts = loaded.texts
            self._max_sequence_tokens[worker.worker_id] = info.max_sequence_tokens
            smallest = min(self._max_sequence_tokens.values())
            self._loaded = LoadedModel(replace(info, max_sequence_tokens=smallest), texts)


def _is_same(one: ModelInfo, other: ModelInfo) -> bool:
    return replace(one, max_sequence_tokens=0) == replace(other, max_sequence_tokens=0)
