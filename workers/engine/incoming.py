"""KV on its way to this worker: who waits for blocks, who has them, and what nobody has claimed yet. Pure.

A transfer is WAITING for blocks, then RECEIVING into them, then, when its request has not come yet,
UNCLAIMED; its request takes it over as soon as both are here. A transfer whose request is over is
remembered for a while, so that one that asks late is refused.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.layout import blocks_needed
from workers.api import LedgerKind, Phase, PhaseSet, SuperposedDecoding
from workers.engine.admission import phase_names
from workers.engine.block_pool import BlockPool
from workers.engine.ledger import Holder
from workers.engine.messages import (
    BlocksReserved,
    CommitTransfer,
    ReservationRefused,
    ReserveBlocks,
)
from workers.engine.sequence import Sequence
from workers.engine.span_reuse.digest import approximate_digest


@dataclass(frozen=True, slots=True)
class ArrivedKv:
    """KV that was committed. Its blocks are leased until a sequence adopts them."""

    transfer_id: str
    block_ids: tuple[int, ...]
    #: Tokens whose KV is in the blocks.
    num_tokens: int
    #: Those that follow on what the request here knows: one that prefill sampled, or what another worker decoded.
    token_ids: tuple[int, ...]
    #: Of the tokens whose KV it is, as the sender knows them.
    token_digest: bytes
    #: When the transfer got the blocks.
    since_s: float = 0.0
    peer: str = ""
    peer_incarnation: int = 0
    #: It came through a lossy codec.
    is_lossy: bool = False


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: ReserveBlocks
    since_s: float


@dataclass(frozen=True, slots=True)
class _Receiving:
    block_ids: tuple[int, ...]
    request: ReserveBlocks
    since_s: float


@dataclass(frozen=True, slots=True)
class _Unclaimed:
    kv: ArrivedKv
    expires_at_s: float


class IncomingKv:
    """The receiving transfers of one worker that serves `phases`.

    max_blocks: of one sequence. max_waiting: transfers that may wait for blocks; one more is refused. claim_s: how
    long committed KV waits for its request, and a transfer is remembered after its request is over, in seconds.
    """

    def __init__(
        self, pool: BlockPool, phases: PhaseSet, *, max_blocks: int, max_waiting: int, claim_s: float
    ) -> None:
        self._pool = pool
        self._max_blocks = max_blocks
        #: Of the worker.
        self.phases = phases
        self._max_waiting = max_waiting
        self._claim_s = claim_s
        self._waiting: deque[_Waiting] = deque()
        self._receiving: dict[str, _Receiving] = {}
        self._unclaimed: dict[str, _Unclaimed] = {}
        #: Transfer -> until when it is remembered.
        self._given_up: dict[str, float] = {}

    @property
    def num_held(self) -> int:
        """Transfers that hold blocks. Each may become a running sequence."""
        return len(self._receiving) + len(self._unclaimed)

    def transfer_ids(self) -> Iterator[str]:
        """Those that wait, receive or are unclaimed."""
        yield from (one.request.transfer_id for one in self._waiting)
        yield from self._receiving
        yield from self._unclaimed

    @property
    def waits_since_s(self) -> float:
        """When the first of those that wait for blocks asked for them; infinite when none waits."""
        return self._waiting[0].since_s if self._waiting else math.inf

    def knows(self, transfer_id: str) -> bool:
        """True while it waits, receives or is unclaimed."""
        return (
            transfer_id in self._receiving
            or transfer_id in self._unclaimed
            or any(one.request.transfer_id == transfer_id for one in self._waiting)
        )

    def is_given_up(self, transfer_id: str) -> bool:
        """Its request is over, or came too late."""
        return transfer_id in self._given_up

    def next_expiry_s(self) -> float:
        """The earliest time at which `expire` has something to do; infinite when there is none."""
        times = [one.request.deadline_s for one in self._waiting]
        times += [unclaimed.expires_at_s for unclaimed in self._unclaimed.values()]
        times += self._given_up.values()
        return min(times, default=math.inf)

    def reserve(self, request: ReserveBlocks, now_s: float, *, is_in_use: bool) -> ReservationRefused | None:
        """Let a transfer wait for blocks; the refusal when it may not.

        is_in_use: its id belongs to a sequence that waits for no KV, or to KV that leaves.
        """
        num_blocks = blocks_needed(request.max_tokens, self._pool.block_size)
        refusal: tuple[str, bool] | None = None
        if Phase.DECODE not in self.phases:
            refusal = f"this worker serves {phase_names(self.phases)}, not decode", False
        elif self.is_given_up(request.transfer_id):
            refusal = "the request was aborted here", False
        elif num_blocks > self._pool.num_blocks:
            refusal = f"needs {num_blocks} KV blocks; the pool has {self._pool.num_blocks}", False
        elif num_blocks > self._max_blocks:
            refusal = f"needs {num_blocks} KV blocks; a sequence has at most {self._max_blocks}", False
        elif is_in_use or self.knows(request.transfer_id):
            refusal = "this transfer id is in use here already", False
        elif len(self._waiting) >= self._max_waiting:
            refusal = f"{len(self._waiting)} transfers wait for blocks already", True
        elif request.deadline_s <= now_s:
            refusal = "its deadline has passed", False
        if refusal is not None:
            return ReservationRefused(request.transfer_id, *refusal)
        self._waiting.append(_Waiting(request, now_s))
        return None

    def cancel(self, transfer_id: str) -> bool:
        """Forget one that waits; False when there is none."""
        waiting = [one for one in self._waiting if one.request.transfer_id == transfer_id]
        for one in waiting:
            self._waiting.remove(one)
        return bool(waiting)

    @property
    def is_waited_for(self) -> bool:
        """Somebody waits for blocks."""
        return bool(self._waiting)

    def grant(self, num_places: int, *, num_kept: int, now_s: float) -> list[BlocksReserved]:
        """Give blocks to those that wait, in order, to `num_places` at most, while there are more than `num_kept`.

        The first is never overtaken, or one that needs many blocks would wait for ever.
        """
        granted: list[BlocksReserved] = []
        while self._waiting and len(granted) < num_places:
            request = self._waiting[0].request
            num_blocks = blocks_needed(request.max_tokens, self._pool.block_size)
            if num_blocks > self._pool.num_available - num_kept:
                break
            self._waiting.popleft()
            block_ids = tuple(self._pool.lease(num_blocks))
            self._receiving[request.transfer_id] = _Receiving(block_ids, request, now_s)
            granted.append(BlocksReserved(request.transfer_id, block_ids))
        return granted

    def commit(self, commit: CommitTransfer) -> ArrivedKv | None:
        """What has arrived: for `leave_unclaimed`, a sequence or the pool. None when it is not known."""
        receiving = self._receiving.pop(commit.transfer_id, None)
        if receiving is None:
            return None
        assert receiving.block_ids == tuple(commit.block_ids), commit
        request = receiving.request
        return ArrivedKv(
            commit.transfer_id,
            receiving.block_ids,
            request.num_tokens,
            commit.token_ids,
            commit.token_digest,
            receiving.since_s,
            request.peer,
            request.peer_incarnation,
            commit.is_lossy,
        )

    def leave_unclaimed(self, kv: ArrivedKv, now_s: float) -> None:
        """Keep it until its request comes."""
        self._unclaimed[kv.transfer_id] = _Unclaimed(kv, now_s + self._claim_s)

    def claim(self, transfer_id: str) -> ArrivedKv | None:
        """The KV of a request that has come; None when it is still on its way."""
        unclaimed = self._unclaimed.pop(transfer_id, None)
        return unclaimed.kv if unclaimed is not None else None

    def release(self, transfer_id: str) -> bool:
        """The transfer has ended without a commit: its blocks are free. False when it is not known."""
        receiving = self._receiving.pop(transfer_id, None)
        if receiving is None:
            return False
        self._pool.release(receiving.block_ids)
        return True

    def give_up(self, transfer_id: str, now_s: float) -> list[ReservationRefused]:
        """The transfer's request is over. The answer, when it was still waiting for blocks.

        Blocks that it fills come back by `release` or `commit`.
        """
        self._given_up[transfer_id] = now_s + self._claim_s
        if self.cancel(transfer_id):
            return [ReservationRefused(transfer_id, "the request was aborted here", False)]
        return []

    def expire(self, now_s: float) -> list[ReservationRefused]:
        """End what is past its time; the answers to those that waited too long."""
        late = [one for one in self._waiting if one.request.deadline_s <= now_s]
        for one in late:
            self._waiting.remove(one)
        self._given_up = {i: until_s for i, until_s in self._given_up.items() if until_s > now_s}
        for transfer_id in [i for i, one in self._unclaimed.items() if one.expires_at_s <= now_s]:
            self._pool.release(self._unclaimed.pop(transfer_id).kv.block_ids)
            self._given_up[transfer_id] = now_s + self._claim_s
        return [
            ReservationRefused(one.request.transfer_id, "no blocks came free in time", True) for one in late
        ]

    def leased_block_ids(self) -> list[int]:
        """All blocks that are held here."""
        held = [one.block_ids for one in self._receiving.values()]
        held += [one.kv.block_ids for one in self._unclaimed.values()]
        return [block_id for block_ids in held for block_id in block_ids]

    def holders(self) -> Iterator[Holder]:
        """Each transfer with its blocks, and those that wait for some."""
        for transfer_id, one in self._receiving.items():
            request = one.request
            yield Holder(
                transfer_id,
                LedgerKind.RECEIVING,
                one.block_ids,
                one.since_s,
                request.peer_incarnation,
                request.peer,
            )
        for transfer_id, unclaimed in self._unclaimed.items():
            kv = unclaimed.kv
            yield Holder(
                transfer_id,
                LedgerKind.UNCLAIMED,
                kv.block_ids,
                kv.since_s,
                kv.peer_incarnation,
                kv.peer,
            )
        for waiting in self._waiting:
            request = waiting.request
            yield Holder(
                request.transfer_id,
                LedgerKind.WAITING,
                (),
                waiting.since_s,
                request.peer_incarnation,
                request.peer,
            )

    def check_invariants(self) -> None:
        """A transfer is in one place."""
        waiting = [one.request.transfer_id for one in self._waiting]
        places = [*waiting, *self._receiving, *self._unclaimed]
        assert len(places) == len(set(places)), places
        assert not self._given_up.keys() & {*waiting, *self._unclaimed}, self._given_up


def misfit(sequence: Sequence, arrived: ArrivedKv, block_size: int) -> str | None:
    """Why this KV is not what the request needs; None when it is."""
    # What prefill sampled, or what was generated since the request here was told of it, is not in its prompt.
    num_known = arrived.num_tokens + 1 - len(arrived.token_ids)
    num_dropped = sequence.num_prompt_tokens - num_known
    most = sequence.images.num_left if sequence.images is not None and sequence.reduction is not None else 0
    if not 0 <= num_dropped <= most:
        came = f"KV of {arrived.num_tokens} tokens and {len(arrived.token_ids)} new ones came"
        return f"{came} for a prompt of {sequence.num_prompt_tokens}"
    digest = sequence.prompt_digest()
    if arrived.token_digest not in (digest, approximate_digest(digest)):
        return "the KV that came is of other tokens than the request's"
    max_tokens = sequence.max_tokens - num_dropped
    if len(arrived.block_ids) < blocks_needed(max_tokens, block_size):
        return f"{len(arrived.block_ids)} blocks were reserved; {max_tokens} tokens need more"
    if isinstance(sequence.sampling.decoding, SuperposedDecoding):
        num_new = len(arrived.token_ids)
        return None if num_new == 1 else f"{num_new} tokens came with its KV; a superposed decoding takes 1"
    if len(arrived.token_ids) >= sequence.sampling.max_new_tokens:
        return f"all {len(arrived.token_ids)} tokens that were asked for came with its KV"
    return None


def is_approximate(sequence: Sequence, arrived: ArrivedKv) -> bool:
    """Some of this KV, which fits the request, was taken from other contexts or came through a lossy codec."""
    return arrived.is_lossy or arrived.token_digest != sequence.prompt_digest()
