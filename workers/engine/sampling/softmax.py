"""The sums under a distribution, in float64 and with the same bits in every batch."""

import numpy as np
from numpy.typing import NDArray


def softmax_weights(
    logits: NDArray[np.float32],
    highest: NDArray[np.float32],
    temperature: NDArray[np.float64] | float = 1.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """exp((logit - highest) / temperature), and the sum of each row: [rows, n] and [rows, 1].

    highest, temperature: [rows, 1]. numpy sums each row in one order whatever the other rows and threads
    are; torch may split a row between threads.
    """
    weights = logits.astype(np.float64)
    # A tiny temperature makes -inf of a difference, whose weight is 0; of NaN comes NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        # The highest logit becomes 0 first, or a small temperature would make all of them infinite.
        weights -= highest
        if not isinstance(temperature, float):
            weights /= temperature
        np.exp(weights, out=weights)
    return weights, weights.sum(axis=-1, keepdims=True)
