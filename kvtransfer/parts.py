"""One transfer that comes in parts, from several senders that hold different KV heads.

Ranks of a tensor-parallel prefill worker each send what they have into the same blocks. Blocks are asked for when all
have come, given back when the first one fails, and committed when the last one has.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvtransfer.errors import ReservationRefused
from kvtransfer.frames import Reserve
from kvtransfer.host import CachedKv, KvHost
from kvtransfer.layout import shared_heads
from kvtransfer.pool import KvPool


class _Place(StrEnum):
    """How far a part is."""

    ASKING = "asking"
    HOLDING = "holding"
    COMMITTED = "committed"
    GONE = "gone"


@dataclass(eq=False, slots=True)
class _Join:
    """What the parts of one transfer have in common."""

    request: Reserve
    places: dict[int, _Place] = field(default_factory=dict)
    #: Part -> the heads that it brings.
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)
    reservation: "asyncio.Task[Sequence[int]] | None" = None
    failure: str = ""


class PartJoin:
    """The transfers of one worker that come in parts.

    abort(transfer_id, part, reason): ends a part that did not fail by itself.
    """

    def __init__(self, host: KvHost, abort: Callable[[str, int, str], None]) -> None:
        self._host = host
        self._abort = abort
        self._joins: dict[str, _Join] = {}

    def __len__(self) -> int:
        return len(self._joins)

    def host_of(self, request: Reserve) -> KvHost:
        """The worker, as one part sees it; the worker itself for a transfer of one part."""
        return self._host if request.num_parts == 1 else _PartHost(self, self._host, request)

    async def reserve(self, request: Reserve) -> Sequence[int]:
        """Blocks for all parts, once all have asked. Raises ReservationRefused."""
        name = request.transfer_id
        heads = shared_heads(request.layout, self._host.pool.layout)
        assert heads is not None, "a layout without a head in common is refused before"
        join = self._joins.setdefault(name, _Join(request))
        problem = self._problem(join, request)
        if problem is not None:
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
            self._leave(join, request.part, reason)
            raise ReservationRefused(name, reason, retryable=True) from None
        except BaseException as error:
            self._leave(join, request.part, str(error) or "cancelled")
            raise
        if join.failure:
            self._leave(join, request.part, join.failure)
            raise ReservationRefused(name, join.failure, retryable=True)
        join.places[request.part] = _Place.HOLDING
        return block_ids

    def commit(self, request: Reserve, token_ids: Sequence[int]) -> None:
        """A part is whole. With the last one the transfer is."""
        join = self._joins[request.transfer_id]
        assert join.places[request.part] is _Place.HOLDING
        join.places[request.part] = _Place.COMMITTED
        if all(place is _Place.COMMITTED for place in join.places.values()):
            assert join.reservation is not None
            del self._joins[request.transfer_id]
            block_ids = join.reservation.result()
            self._host.commit(request.transfer_id, block_ids, token_ids, request.token_digest)
        else:
            self._give_back_if_over(join)

    def release(self, request: Reserve, reason: str) -> None:
        """A part has failed, and with it the transfer: the blocks go back when no part writes to them any more."""
        join = self._joins[request.transfer_id]
        assert join.places[request.part] is _Place.HOLDING
        self._leave(join, request.part, reason)

    def _leave(self, join: _Join, part: int, reason: str) -> None:
        join.places[part] = _Place.GONE
        if not join.failure:
            join.failure = f"part {part} of {join.request.num_parts} failed: {reason}"
            if join.reservation is None:
                # Wakes those that wait for parts which will be of no use.
                join.reservation = asyncio.create_task(self._refuse(join))
                join.is_complete.set()
                is_refused = True
            else:
                is_refused = _is_refused(join.reservation)
            for other, place in list(join.places.items()):
                # Who still asks hears of a refusal by itself, and whether it is for good.
                if place is _Place.HOLDING or (place is _Place.ASKING and not is_refused):
                    self._abort(join.request.transfer_id, other, join.failure)
        self._give_back_if_over(join)

    def _give_back_if_over(self, join: _Join) -> None:
        """Once nobody asks for the blocks or holds them, and they were not all committed."""
        if not join.failure or {_Place.ASKING, _Place.HOLDING} & set(join.places.values()):
            return
        name, reservation = join.request.transfer_id, join.reservation
        if self._joins.get(name) is not join:
            return
        del self._joins[name]
        assert reservation is not None
        if reservation.done():
            self._give_back(name, reservation, join.failure)
        else:
            # The host takes back what it may be giving just now, or has it back when it is given.
            reservation.cancel()
            reservation.add_done_callback(lambda done: self._give_back(name, done, join.failure))

    def _give_back(self, name: str, reservation: "asyncio.Task[Sequence[int]]", reason: str) -> None:
        if not reservation.cancelled() and reservation.exception() is None:
            self._host.release(name, reservation.result(), reason)

    def _problem(self, join: _Join, request: Reserve) -> str | None:
        first = join.request
        if join.is_complete.is_set():
            return join.failure or "its parts are complete already"
        same = (first.num_parts, first.num_tokens, first.max_tokens, first.token_digest)
        if same != (request.num_parts, request.num_tokens, request.max_tokens, request.token_digest):
            return "its parts do not agree on what they are parts of"
        if request.part in join.places:
            return f"part {request.part} has come already"
        return None

    async def _refuse(self, join: _Join) -> Sequence[int]:
        raise ReservationRefused(join.request.transfer_id, join.failure, retryable=True)

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
