"""The classical way to accept drafts, as a second opinion on the engine's."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def accept_by_rejection(
    target: FloatArray, proposals: SequenceOf[int], drafts: SequenceOf[FloatArray], numbers: SequenceOf[float]
) -> int:
    """The classical rule for one row: a token distributed as `target`, which is a proposal where it can be.

    target: probabilities [vocab_size]. proposals[i] was drawn from drafts[i], a distribution that may depend on
    the proposals before it (without replacement it leaves them out; a certain draft has all its mass on one token).
    numbers: uniform in [0, 1), one for each proposal and one more.
    A refused proposal leaves what its draft did not cover of the target to the next one.
    The distribution of its output is exact, but which token comes out depends on the drafts, and they depend
    on what else ran. With `walk` they do not matter, so the engine uses that one.
    Source: speculative sampling (arXiv 2211.17192, 2302.01318), one proposal after the other as in SpecInfer
    (arXiv 2305.09781), section 4.3.
    """
    assert len(drafts) == len(proposals)
    assert len(numbers) == len(proposals) + 1
    left = np.asarray(target, dtype=np.float64)
    for proposal, draft, number in zip(proposals, drafts, numbers, strict=False):
        if number * draft[proposal] < left[proposal]:
            return proposal
        left = np.maximum(left - draft, 0.0)
        left = left / left.sum()
    cumulative = left.cumsum()
    picked = np.searchsorted(cumulative, numbers[-1] * cumulative[-1], side="right")
    return min(int(picked), int(np.flatnonzero(left)[-1]))
