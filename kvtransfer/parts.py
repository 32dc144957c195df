"""One transfer that comes in parts, from several senders that hold different KV heads.

Ranks of a tensor-parallel prefill worker each send what they have into the same blocks. Blocks are asked for when all
have come. All of them commit, once the last one is whole; or none, and the blocks are given back: the first one that
fails ends all at once, with its reason.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvtransfer.errors import PhasewiseTransferError, ReservationRefused
from kvtransfer.frames import Reserve
from kvtransfer.host import CachedKv, KvHost
from kvtransfer.layout import shared_heads
from kvtransfer.pool import KvPool

#: A part that comes after another has failed is told so for so long, in seconds.
FAILED_S = 60.0


class _Place(StrEnum):
    """How far a part is."""

    ASKING = "asking"
    HOLDING = "holding"
    #: All of it is here and verified.
    WHOLE = "whole"
    COMMITTED = "committed"
    GONE = "gone"


#: Places of parts that may write to the blocks, or will.
_USING = frozenset({_Place.ASKING, _Place.HOLDING, _Place.WHOLE})


@dataclass(eq=False, slots=True)
class _Failure:
    """Why none of the parts is committed."""

    reason: str
    retryable: bool
    #: Parts that have not come yet, or may come again, and until when they are waited for.
    to_come: set[int]
    until_s: float


@dataclass(eq=False, slots=True)
class _Join:
    """What the parts of one transfer have in common."""

    request: Reserve
    places: dict[int, _Place] = field(default_factory=dict)
    #: Part -> the heads that it brings.
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)
    reservation: "asyncio.Task[Sequence[int]] | None" = None
    failure: _Failure | None = None
    #: What the first part that was whole is to commit.
    token_ids: tuple[int, ...] | None = None
    #: Some of it came through a codec, or from a worker of other dtypes.
    is_lossy: bool = False


class PartJoin:
    """The transfers of one worker that come in parts. Made in the loop.

    abort(transfer_id, part, reason): ends a part that did not fail by itself. commit(transfer_id, part): lets one that
    is whole commit, which it does at once.
    """

    def __init__(
        self,
        host: KvHost,
        abort: Callable[[str, int, str], None],
        commit: Callable[[str, int], None],
    ) -> None:
        self._host = host
        self._abort = abort
        self._commit = commit
        self._joins: dict[str, _Join] = {}
        #: Transfers that have failed, of which parts may still come, oldest first. Bounded by FAILED_S.
        self._failed: dict[str, _Failure] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._joins)

    def host_of(self, request: Reserve) -> KvHost:
        """The worker, as one part sees it; the worker itself for a transfer of one part."""
        return self._host if request.num_parts == 1 else _PartHost(self, self._host, request)

    async def reserve(self, request: Reserve) -> Sequence[int]:
        """Blocks for all parts, once all have asked. Raises ReservationRefused."""
        name = request.transfer_id
        self._refuse_if_failed(request)
        heads = shared_heads(request.layout, self._host.pool.layout)
        assert heads is not None, "a layout without a head in common is refused before"
        join = self._joins.setdefault(name, _Join(request))
        if join.failure is not None:
            raise ReservationRefused(name, join.failure.reason, join.failure.retryable)
        problem = _problem(join, request)
        if problem is not None:
            # Nobody can tell which of them is right.
            self._fail(join, request.part, problem, retryable=False)
            raise ReservationRefused(name, problem, retryable=False)
        join.heads[request.part] = heads
        join.places[request.part] = _Place.ASKING
        if len(join.places) == request.num_parts:
            join.reservation = asyncio.create_task(self._reserve(join))
            join.is_complete.set()
        try:
            async with asyncio.timeout(request.timeout_s):
                await join.is_complete.wait()
            assert join.reservation is not None
            block_ids = await asyncio.shield(join.reservation)
        except TimeoutError:
            reason = f"{len(join.places)} of {request.num_parts} parts came in time"
            self._leave(join, request.part, reason, retryable=True)
            raise ReservationRefused(name, reason, retryable=True) from None
        except ReservationRefused as refusal:
            self._leave(join, request.part, refusal.reason, retryable=refusal.retryable)
            raise
        except BaseException as error:
            self._leave(join, request.part, str(error) or "cancelled", retryable=True)
            # Its sender may have lost the stream before it was answered: then it asks again.
            self._await_again(join, request.part)
            raise
        if join.failure is not None:
            self._leave(join, request.part, join.failure.reason, retryable=True)
            raise ReservationRefused(name, join.failure.reason, join.failure.retryable)
        join.places[request.part] = _Place.HOLDING
        return block_ids

    def is_lossy(self, transfer_id: str) -> bool:
        """Some part of it that is whole came through a codec. Known until the host has been told to commit."""
        join = self._joins.get(transfer_id)
        return join is not None and join.is_lossy

    def note_whole(self, request: Reserve, token_ids: tuple[int, ...], *, is_lossy: bool) -> None:
        """A part is verified, and is to commit these tokens. With the last one all of them commit.

        is_lossy: it came through a codec.
        """
        name, part = request.transfer_id, request.part
        join = self._joins[name]
        if join.places[part] is not _Place.HOLDING:
            return
        join.places[part] = _Place.WHOLE
        join.is_lossy |= is_lossy
        if join.token_ids is None:
            join.token_ids = token_ids
        if token_ids != join.token_ids:
            self._abort(name, part, f"it ends in other tokens than part {min(join.places)}")
            return
        is_whole = len(join.places) == request.num_parts and set(join.places.values()) == {_Place.WHOLE}
        if is_whole:
            for other in sorted(join.places):
                self._commit(name, other)

    def commit(self, request: Reserve, token_ids: Sequence[int]) -> None:
        """One of the parts, of which all are whole. With the last one the blocks are the sequence's."""
        join = self._joins[request.transfer_id]
        assert join.places[request.part] is _Place.WHOLE
        join.places[request.part] = _Place.COMMITTED
        if set(join.places.values()) == {_Place.COMMITTED}:
            assert join.reservation is not None
            block_ids = join.reservation.result()
            try:
                # The host may ask `is_lossy`.
                self._host.commit(request.transfer_id, block_ids, token_ids, request.token_digest)
            finally:
                del self._joins[request.transfer_id]

    def release(self, request: Reserve, reason: str) -> None:
        """A part has failed, and with it the transfer: the blocks go back when no part writes to them any more."""
        join = self._joins[request.transfer_id]
        assert join.places[request.part] in (_Place.HOLDING, _Place.WHOLE)
        self._leave(join, request.part, reason, retryable=True)

    def fail(self, request: Reserve, error: PhasewiseTransferError) -> None:
        """A part was refused before it asked for blocks: the others end too, at once or when they come."""
        name = request.transfer_id
        join = self._joins.get(name)
        if join is not None:
            self._fail(join, request.part, str(error), retryable=error.retryable)
        elif name in self._failed:
            self._has_come(name, request.part)
        else:
            self._remember(_Join(request), request.part, str(error), retryable=error.retryable)

    def _refuse_if_failed(self, request: Reserve) -> None:
        failure = self._failed.get(request.transfer_id)
        if failure is not None and self._loop.time() < failure.until_s:
            self._has_come(request.transfer_id, request.part)
            raise ReservationRefused(request.transfer_id, failure.reason, failure.retryable)

    def _has_come(self, name: str, part: int) -> None:
        failure = self._failed[name]
        failure.to_come.discard(part)
        if not failure.to_come:
            del self._failed[name]

    def _leave(self, join: _Join, part: int, reason: str, *, retryable: bool) -> None:
        join.places[part] = _Place.GONE
        self._fail(join, part, reason, retryable=retryable)
        self._give_back_if_over(join)

    def _fail(self, join: _Join, part: int, reason: str, *, retryable: bool) -> None:
        """The first failure ends all parts."""
        if join.failure is not None:
            return
        failure = join.failure = self._remember(join, part, reason, retryable=retryable)
        if join.reservation is None:
            # Wakes those that wait for parts which will be of no use.
            join.reservation = asyncio.create_task(self._refuse(join))
            join.is_complete.set()
            is_refused = True
        else:
            is_refused = _is_refused(join.reservation)
        for other, place in list(join.places.items()):
            # Who still asks hears of a refusal by itself, and whether it is for good.
            if place in (_Place.HOLDING, _Place.WHOLE) or (place is _Place.ASKING and not is_refused):
                self._abort(join.request.transfer_id, other, failure.reason)

    def _remember(self, join: _Join, part: int, reason: str, *, retryable: bool) -> _Failure:
        """For those that are still to come."""
        now_s, num_parts = self._loop.time(), join.request.num_parts
        self._failed = {name: one for name, one in self._failed.items() if now_s < one.until_s}
        to_come = set(range(num_parts)) - join.places.keys() - {part}
        text = f"part {part} of {num_parts} failed: {reason}"
        failure = _Failure(text, retryable, to_come, now_s + FAILED_S)
        if to_come:
            self._failed[join.request.transfer_id] = failure
        return failure

    def _await_again(self, join: _Join, part: int) -> None:
        """A part that went unanswered hears of the failure when it comes again, instead of waiting for the others."""
        failure = join.failure
        if failure is not None and self._loop.time() < failure.until_s:
            failure.to_come.add(part)
            self._failed[join.request.transfer_id] = failure

    def _give_back_if_over(self, join: _Join) -> None:
        """Once nobody asks for the blocks or holds them, and they were not all committed."""
        if join.failure is None or _USING & set(join.places.values()):
            return
        name, reservation, reason = join.request.transfer_id, join.reservation, join.failure.reason
        if self._joins.get(name) is not join:
            return
        del self._joins[name]
        assert reservation is not None
        if reservation.done():
            self._give_back(name, reservation, reason)
        else:
            # The host takes back what it may be giving just now, or has it back when it is given.
            reservation.cancel()
            reservation.add_done_callback(lambda done: self._give_back(name, done, reason))

    def _give_back(self, name: str, reservation: "asyncio.Task[Sequence[int]]", reason: str) -> None:
        if not reservation.cancelled() and reservation.exception() is None:
            self._host.release(name, reservation.result(), reason)

    async def _refuse(self, join: _Join) -> Sequence[int]:
        assert join.failure is not None
        raise ReservationRefused(join.request.transfer_id, join.failure.reason, join.failure.retryable)

    async def _reserve(self, join: _Join) -> Sequence[int]:
        request, needed = join.request, self._host.pool.layout.heads
        found = sorted(join.heads.values())
        # One begins where the one before it ends.
        if [begin for begin, _ in found] + [needed[1]] != [needed[0]] + [end for _, end in found]:
            reason = f"the parts bring KV heads {[list(one) for one in found]} of {list(needed)}"
            raise ReservationRefused(request.transfer_id, reason, retryable=False)
        return await self._host.reserve(
            request.transfer_id,
            num_tokens=request.num_tokens,
            max_tokens=request.max_tokens,
            timeout_s=request.timeout_s,
        )


def _problem(join: _Join, request: Reserve) -> str | None:
    """Why this is not one more of its parts; None when it is."""
    first = join.request
    same = (first.num_parts, first.num_tokens, first.max_tokens, first.token_digest)
    if same != (request.num_parts, request.num_tokens, request.max_tokens, request.token_digest):
        return "its parts do not agree on what they are parts of"
    if request.part in join.places:
        return f"part {request.part} has come already"
    return None


def _is_refused(reservation: "asyncio.Task[Sequence[int]]") -> bool:
    return reservation.done() and not reservation.cancelled() and reservation.exception() is not None


class _PartHost:
    """The worker, as one part sees it."""

    def __init__(self, join: PartJoin, host: KvHost, request: Reserve) -> None:
        self._join = join
        self._host = host
        self._request = request

    @property
    def pool(self) -> KvPool:
        """See KvHost."""
        return self._host.pool

    @property
    def incarnation(self) -> int:
        """See KvHost."""
        return self._host.incarnation

    async def reserve(
        self,
        transfer_id: str,  # noqa: ARG002 - as in the request, like all below
        *,
        num_tokens: int,  # noqa: ARG002
        max_tokens: int,  # noqa: ARG002
        timeout_s: float,  # noqa: ARG002
    ) -> Sequence[int]:
        """See KvHost."""
        return await self._join.reserve(self._request)

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """See KvHost."""
        return await self._host.find_cached(transfer_id, block_hashes, min_tokens=min_tokens)

    def commit(
        self,
        transfer_id: str,  # noqa: ARG002
        block_ids: Sequence[int],  # noqa: ARG002
        token_ids: Sequence[int],
        token_digest: bytes,  # noqa: ARG002
    ) -> None:
        """See KvHost."""
        self._join.commit(self._request, token_ids)

    def release(
        self,
        transfer_id: str,  # noqa: ARG002
        block_ids: Sequence[int],  # noqa: ARG002
        reason: str,
    ) -> None:
        """See KvHost."""
        self._join.release(self._request, reason)
