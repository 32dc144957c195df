"""A bound on the bytes that many hold at a time: whoever finds no room waits its turn."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """First come, first served. Made and used in one loop.

    max_bytes: of all together. Who wants more than that gets it alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        #: Bounded by the callers.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used_bytes(self) -> int:
        """What is held now."""
        return self._used_bytes

    @asynccontextmanager
    async def take(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold so many bytes, 0 or more; waits until there is room."""
        num_bytes = min(num_bytes, self._max_bytes)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():
                self._waiting = deque(one for one in self._waiting if one[1] is not turn)
            else:
                self._used_bytes -= num_bytes
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self._used_bytes + self._waiting[0][0] <= self._max_bytes:
            num_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self._used_bytes += num_bytes
                turn.set_result(None)
