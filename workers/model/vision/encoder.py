"""What the encode phase needs of a vision model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.api import ImageReduction
from workers.embeddings.kept import KeptEmbeddings
from workers.model.vision.plan import ImagePlan


class VisionEncoder(Protocol):
    """Turns pictures into embeddings. Holds no state between calls."""

    def prepare(self, image: NDArray[np.uint8], plan: ImagePlan, tiles: range) -> list[torch.Tensor]:
        """Pixels of these tiles of one picture, as `encode` takes them; called in any thread.

        image: RGB, upright, [plan.height, plan.width, 3].
        """

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of each tile, [num_embeddings, hidden_size of the text model], fp32 on a CPU, else of the dtype of the
        weights.

        The tiles may belong to several pictures and requests; each result is the same whatever it is batched with,
        as far as the matrix library's arithmetic is.
        """

    def encode_reduced(
        self, pixels: torch.Tensor, reduction: ImageReduction
    ) -> tuple[torch.Tensor, KeptEmbeddings]:
        """Embeddings of one tile, those that are alike merged, [at most num_embeddings, hidden_size], and which they are.

        Raises ImageRejected when this model's pictures cannot be reduced.
        """
