"""Who may write to its client next."""

import asyncio
from collections import deque

#: Writes in one pass of the event loop.
TURNS_PER_PASS = 4


class Turns:
    """Turns to write, a few in each pass of the event loop; who waits longest is first. Made and used in the loop.

    What a worker says is read at most once in a pass. With a write for each token of all that run, a pass would soon take longer than
    a worker's step: what workers say would pile up unread, and every answer come later and later. Who waits for a turn has more tokens
    in its next message instead.
    """

    def __init__(self, turns_per_pass: int = TURNS_PER_PASS) -> None:
        self._turns_per_pass = turns_per_pass
        self._num_left = turns_per_pass
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._is_pass_awaited = False

    async def take(self) -> None:
        """Returns when it is one's turn."""
        self._await_pass()
        if self._num_left:
            self._num_left -= 1
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        await turn

    def _await_pass(self) -> None:
        if not self._is_pass_awaited:
            self._is_pass_awaited = True
            self._loop.call_soon(self._begin_pass)

    def _begin_pass(self) -> None:
        self._is_pass_awaited = False
        self._num_left = self._turns_per_pass
        while self._num_left and self._waiting:
            turn = self._waiting.popleft()
            # Whoever gave up needs none.
            if not turn.done():
                turn.set_result(None)
                self._num_left -= 1
        if self._num_left < self._turns_per_pass:
            # There are as many again in the next.
            self._await_pass()
