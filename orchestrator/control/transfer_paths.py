"""How long KV takes from one worker to another, as workers have measured it. Pure.

Each worker tells with its state how fast it sent to whom. A pair that has not met is taken to be as fast as others within a host, or between
hosts; where nothing of the kind was measured a way is taken to cost nothing, as long as nobody knows better.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.control.prefill_speed import most_learnt
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import KvDirection, Phase, WorkerId
from workers.step_cost import StepCost

#: Tokens that an answer is taken to have: each of them comes later by what the sequences at its worker add to a step. An estimate that
#: has not been tuned.
ANSWER_TOKENS = 100
#: Rates of smaller transfers, on average, say how long a message takes and not how wide the way is.
LEAST_BYTES = 2**20
_NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class TransferPaths:
    """As of one view. Rates in bytes per second.

    token_bytes: of the KV of a token. sequence_s: what one sequence adds to a step. pairs: by the addresses of source and target.
    same_host, other_host: of pairs that have not met, the mean of those that have; None where none was measured. best: the fastest way from a worker that prefills to any
    other one that decodes; without those of which it is not known.
    """

    token_bytes: float
    sequence_s: float
    pairs: Mapping[str, Mapping[str, float]]
    same_host: float | None
    other_host: float | None
    best: Mapping[WorkerId, float]

    @classmethod
    def of(cls, view: ClusterView) -> "TransferPaths | None":
        """None while no worker has learnt how long its steps take, which tells how large KV is. Costs some microseconds a pair."""
        costs = most_learnt(view)
        if costs is None:
            return None
        pairs: dict[str, dict[str, float]] = {}
        num, total = [0, 0], [0.0, 0.0]
        for worker in view.workers:
            sent = {
                peer.address: peer.bytes_per_s
                for peer in (worker.status.peers if worker.status is not None else ())
                if 0.0 < peer.bytes_per_s < math.inf
                and peer.direction is KvDirection.SENDING
                and peer.num_bytes >= LEAST_BYTES * max(1, peer.num_transfers)
            }
            if not sent:
                continue
            pairs[worker.address] = sent
            here = f"{_host(worker.address)}:"
            within = [rate for address, rate in sent.items() if address.startswith(here)]
            num[1] += len(within)
            total[1] += sum(within)
            num[0] += len(sent) - len(within)
            total[0] += max(0.0, sum(sent.values()) - sum(within))
        other, same = (total[i] / num[i] if num[i] else None for i in (0, 1))
        work = [worker.status.work for worker in view.workers if worker.status is not None]
        context = sum(one.decode_context for one in work) / max(1, sum(one.num_decoding for one in work))
        cost = StepCost.learnt(costs)
        sequence_s = cost.decode_s + cost.context_s * context
        return cls(
            costs.model.kv_token_bytes, sequence_s, pairs, same, other, _best(view, pairs, same, other)
        )

    def move_s(self, source: WorkerView, target: WorkerView, num_tokens: int) -> float:
        """Seconds for the KV of so many tokens; 0 within a worker, and where nothing is known of the way."""
        if source.worker_id == target.worker_id:
            return 0.0
        rate = self.pairs.get(source.address, _NOTHING).get(target.address)
        if rate is None:
            rate = self.same_host if _host(source.address) == _host(target.address) else self.other_host
        return num_tokens * self.token_bytes / rate if rate else 0.0

    def best_exposed_s(self, source: WorkerView, num_tokens: int, hidden_s: float) -> float:
        """What the second token waits for at least, when the KV goes on while the prompt is computed for hidden_s."""
        rate = self.best.get(source.worker_id)
        return max(0.0, num_tokens * self.token_bytes / rate - hidden_s) if rate else 0.0


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _best(
    view: ClusterView, pairs: Mapping[str, Mapping[str, float]], same: float | None, other: float | None
) -> dict[WorkerId, float]:
    """See TransferPaths. A worker that decodes what it prefills moves nothing."""
    decoding = [w for w in view.workers if Phase.DECODE in w.phases and w.state is LifecycleState.READY]
    hosts = {_host(worker.address) for worker in decoding}
    known = {worker.address for worker in decoding}
    best: dict[WorkerId, float] = {}
    for worker in view.workers:
        if Phase.PREFILL not in worker.phases or Phase.DECODE in worker.phases:
            continue
        host = _host(worker.address)
        ways = [same] if host in hosts else []
        ways += [other] if hosts - {host} else []
        if ways and None not in ways:
            sent = pairs.get(worker.address, _NOTHING)
            met = (rate for address, rate in sent.items() if address in known)
            best[worker.worker_id] = max(*met, *(way for way in ways if way is not None), 0.0)
    return best
