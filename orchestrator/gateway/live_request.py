"""A request that is being answered: its machine, and what its client has yet to get."""

import asyncio
from dataclasses import dataclass

from orchestrator.control.request_machine import Deliver, Fail, RequestMachine, RequestState
from orchestrator.control.router import LoadLedger, Route
from workers.api import FinishReason


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens for the client, and why they were the last, if they were."""

    token_ids: tuple[int, ...]
    first_index: int
    finish_reason: FinishReason | None


class LiveRequest:
    """Filled by the dispatcher, emptied by the task that answers the client. Both live in one loop."""

    def __init__(self, machine: RequestMachine) -> None:
        self.machine = machine
        self.deadline: asyncio.TimerHandle | None = None
        #: A client that does not read leaves them here: at most the request's max_new_tokens.
        self._token_ids: list[int] = []
        self._num_taken = 0
        self._finish_reason: FinishReason | None = None
        self._failure: Fail | None = None
        self._has_news = asyncio.Event()
        self._route: Route | None = None
        self._prefill_tokens = 0

    def deliver(self, deliver: Deliver) -> None:
        """Tokens came."""
        self._token_ids += deliver.token_ids
        self._finish_reason = deliver.finish_reason
        self._has_news.set()

    def fail(self, failure: Fail) -> None:
        """It ended without all its tokens."""
        self._failure = failure
        self._has_news.set()

    async def next(self) -> Progress | Fail:
        """Wait for what is new: all of it at once. A failure comes after the tokens before it."""
        while True:
            if self._token_ids or self._finish_reason is not None:
                progress = Progress(tuple(self._token_ids), self._num_taken, self._finish_reason)
                self._num_taken += len(self._token_ids)
                self._token_ids.clear()
                return progress
            if self._failure is not None:
                return self._failure
            self._has_news.clear()
            await self._has_news.wait()

    def charge(self, ledger: LoadLedger) -> None:
        """Count what has just been submitted."""
        assert self._route is None
        assert self.machine.route is not None
        self._route = self.machine.route
        self._prefill_tokens = self.machine.num_prefill_tokens
        ledger.add(self._route.prefill.worker_id, prefill_tokens=self._prefill_tokens)
        ledger.add(self._route.decode.worker_id, decode_sequences=1)

    def settle(self, ledger: LoadLedger) -> None:
        """Uncharge what the machine's state says is no longer in flight."""
        if self._route is None or self.machine.state is RequestState.PREFILL:
            return
        if self._prefill_tokens:
            ledger.add(self._route.prefill.worker_id, prefill_tokens=-self._prefill_tokens)
            self._prefill_tokens = 0
        if self.machine.state is not RequestState.DECODE:
            ledger.add(self._route.decode.worker_id, decode_sequences=-1)
            self._route = None
