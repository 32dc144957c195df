"""Requests with a grammar wait here until it is compiled, so that the engine never does. Used in the loop only."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from workers.api import Abort, EngineCommand, Event, FailureCode, RequestFailed, RequestKey, Submit
from workers.engine.grammar import CompiledGrammar, GrammarCompiler
from workers.errors import InvalidGrammar


class GrammarGate:
    """Between the sessions and the engine.

    post: hands a command to the engine. deliver: tells the gateways of requests that never get there.
    What waits is bounded by the requests that the sessions let in.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        post: Callable[[EngineCommand], None],
        deliver: Callable[[list[Event]], None],
    ) -> None:
        self._compiler = compiler
        self._post = post
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[RequestKey, tuple[Submit, float]] = {}

    def pass_on(self, command: EngineCommand) -> None:
        """Now, or when its grammar is compiled. An Abort overtakes the request that it is about."""
        if isinstance(command, Abort) and self._waiting.pop(command.key, None) is not None:
            return
        if not isinstance(command, Submit) or command.sampling.grammar is None:
            self._post(command)
            return
        if command.key in self._waiting:
            reason = "this attempt is already running here"
            self._deliver([RequestFailed(command.key, FailureCode.INVALID, reason)])
            return
        self._waiting[command.key] = command, time.monotonic()
        self._compiler.compile_soon(command.sampling.grammar).add_done_callback(
            lambda future: self._loop.call_soon_threadsafe(self._compiled, command.key, future)
        )

    def _compiled(self, key: RequestKey, future: "Future[CompiledGrammar]") -> None:
        submit, since_s = self._waiting.pop(key, (None, 0.0))
        if submit is None or future.cancelled():
            return
        left_s = submit.timeout_s - (time.monotonic() - since_s)
        error = future.exception()
        if isinstance(error, InvalidGrammar):
            self._deliver([RequestFailed(key, FailureCode.INVALID, str(error))])
        elif error is not None:
            reason = f"its grammar could not be compiled: {error!r}"
            self._deliver([RequestFailed(key, FailureCode.INTERNAL, reason)])
        elif left_s <= 0:
            reason = "the request's deadline passed while its grammar was compiled"
            self._deliver([RequestFailed(key, FailureCode.DEADLINE, reason)])
        else:
            self._post(replace(submit, timeout_s=left_s))
