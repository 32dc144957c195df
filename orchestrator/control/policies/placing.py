"""Where requests run when load alone decides. Pure."""

from collections.abc import Sequence

from orchestrator.control.policies.policy import ClusterLoad, Placement, Prompt, Reject, WorkerLoad
from orchestrator.control.router import SEQUENCE_TOKENS
from workers.api import Phase

#: So many workers are looked at for one request; of more, those that come next in turn (power of d choices, Mitzenmacher 2001).
MAX_CANDIDATES = 16
#: Seconds after which a phase that nobody serves is asked for again.
RETRY_S = 1.0


def candidates(workers: Sequence[WorkerLoad], number: int) -> Sequence[WorkerLoad]:
    """Whom to look at for this request; all when there are few."""
    if len(workers) <= MAX_CANDIDATES:
        return workers
    begin = number * MAX_CANDIDATES % len(workers)
    found = workers[begin : begin + MAX_CANDIDATES]
    return found if len(found) == MAX_CANDIDATES else [*found, *workers[: MAX_CANDIDATES - len(found)]]


def missing(now_s: float, cluster: ClusterLoad, prompt: Prompt) -> Reject | None:
    """A phase that it needs and nobody serves."""
    for phase, workers in ((Phase.PREFILL, cluster.prefill), (Phase.DECODE, cluster.decode)):
        if not workers:
            return Reject(f"no worker serves {phase}", now_s + RETRY_S)
    if prompt.num_tiles and not cluster.encode:
        return Reject("no worker serves encode", now_s + RETRY_S)
    return None


def least_decoding(cluster: ClusterLoad, number: int) -> WorkerLoad:
    """Where fewest sequences decode or will."""
    return min(candidates(cluster.decode, number), key=lambda w: w.num_decoding + w.num_promised)


def encoders(cluster: ClusterLoad, prompt: Prompt, *, most: int) -> tuple[WorkerLoad, ...]:
    """Up to `most` that have least to encode, one for each tile at most; of equal ones the one that decodes least."""
    if not prompt.num_tiles:
        return ()
    found = sorted(
        candidates(cluster.encode, prompt.number),
        key=lambda w: (w.encode_tiles, len(w.phases), w.num_decoding),
    )
    return tuple(found[: max(1, min(most, prompt.num_tiles))])


class LeastLoaded:
    """As orchestrator.control.router: prefill where least is to be computed, decode there or where fewest sequences are.

    most_encoders: over how many workers the pictures of one request are spread. Source: least-loaded dispatch of DistServe (OSDI'24).
    """

    def __init__(self, *, most_encoders: int = 1) -> None:
        self._most_encoders = most_encoders

    def place(self, now_s: float, prompt: Prompt, cluster: ClusterLoad) -> Placement | Reject:
        """See Placing."""
        refusal = missing(now_s, cluster, prompt)
        if refusal is not None:
            return refusal
        cached_at, decode = prompt.cached_at, Phase.DECODE
        best, best_cost = None, (0, 0)
        for worker in candidates(cluster.prefill, prompt.number):
            num_sequences = worker.num_decoding + worker.num_promised
            tokens = worker.prefill_tokens + SEQUENCE_TOKENS * num_sequences - cached_at(worker)
            cost = (tokens, num_sequences)
            if best is None or cost < best_cost:
                best, best_cost = worker, cost
        assert best is not None
        decoder = best if decode in best.phases else least_decoding(cluster, prompt.number)
        return Placement(best, decoder, self._encoders(best, prompt, cluster))

    def _encoders(self, prefill: WorkerLoad, prompt: Prompt, cluster: ClusterLoad) -> tuple[WorkerLoad, ...]:
        if prompt.num_tiles and self._most_encoders == 1 and Phase.ENCODE in prefill.phases:
            return (prefill,)
        return encoders(cluster, prompt, most=self._most_encoders)
