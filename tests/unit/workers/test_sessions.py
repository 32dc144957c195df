"""Who owns a request, and who hears of it."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.worker_client import submit
from workers import sessions
from workers.api import (
    Abort,
    Command,
    Event,
    FailureCode,
    FinishReason,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    TokensGenerated,
)
from workers.sessions import GatewaySession, SessionTable


class Engine:
    """Takes commands."""

    def __init__(self, table: SessionTable) -> None:
        self.commands: list[Command] = []
        table.serve_with(self.commands.append, vocab_size=100)


@pytest.fixture
def table() -> Iterator[SessionTable]:
    table = SessionTable()
    yield table
    table.check_invariants()


def key(name: str) -> RequestKey:
    return submit([1], request_id=name).key


def token(name: str, *, is_last: bool = False) -> TokensGenerated:
    return TokensGenerated(key(name), (1,), 1, FinishReason.LENGTH if is_last else None)


def taken(session: GatewaySession) -> list[Event]:
    async def take() -> list[Event]:
        async with asyncio.timeout(1):
            return await session.take()

    return asyncio.run(take())


def test_events_go_to_the_session_that_submitted(table: SessionTable) -> None:
    Engine(table)
    first, second = table.open(), table.open()
    table.handle(first, submit([1], request_id="a"))
    table.handle(second, submit([1], request_id="b"))
    table.deliver([token("a"), PrefillStarted(key("b"), 0.1), token("nobody"), token("a")])
    assert taken(first) == [token("a"), token("a")]
    assert taken(second) == [PrefillStarted(key("b"), 0.1)]


def test_end_of_a_session_aborts_what_runs_and_not_what_has_ended(table: SessionTable) -> None:
    engine = Engine(table)
    session = table.open()
    for name in "abc":
        table.handle(session, submit([1], request_id=name))
    table.deliver([token("a", is_last=True), RequestFailed(key("b"), FailureCode.DEADLINE, "late")])
    table.close(session)
    assert engine.commands[3:] == [Abort(key("c"))]
    table.deliver([token("c")])


def test_abort_of_another_sessions_request_is_ignored(table: SessionTable) -> None:
    engine = Engine(table)
    owner, other = table.open(), table.open()
    table.handle(owner, submit([1], request_id="a"))
    table.handle(other, Abort(key("a")))
    assert len(engine.commands) == 1
    table.handle(owner, Abort(key("a")))
    assert engine.commands[1:] == [Abort(key("a"))]
    table.deliver([token("a")])
    table.finish()
    assert taken(owner) == []


def test_double_is_refused_and_the_first_goes_on(table: SessionTable) -> None:
    engine = Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.handle(session, submit([1], request_id="a"))
    table.deliver([token("a")])
    refusal, event = taken(session)
    assert isinstance(refusal, RequestFailed)
    assert refusal.code is FailureCode.INVALID
    assert event == token("a")
    assert len(engine.commands) == 1


def test_what_comes_before_the_engine_is_refused(table: SessionTable) -> None:
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    assert taken(session) == [
        RequestFailed(key("a"), FailureCode.INTERNAL, "the worker is still loading its model")
    ]


def test_refusing_fails_what_runs_and_ends_after_that_was_told(table: SessionTable) -> None:
    engine = Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.refuse("it stops")
    table.finish()
    assert taken(session) == [RequestFailed(key("a"), FailureCode.INTERNAL, "it stops")]
    assert taken(session) == []
    assert engine.commands[1:] == [Abort(key("a"))]


def test_requests_of_a_session_are_bounded(table: SessionTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_REQUESTS_PER_SESSION", 2)
    engine = Engine(table)
    session = table.open()
    for name in "abc":
        table.handle(session, submit([1], request_id=name))
    (refusal,) = taken(session)
    assert isinstance(refusal, RequestFailed)
    assert (refusal.key, refusal.code) == (key("c"), FailureCode.OVERLOADED)
    assert len(engine.commands) == 2


def test_session_past_its_limit_is_over(table: SessionTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING_EVENTS", 3)
    Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.deliver([token("a")] * 3)
    assert not session.overflowed.is_set()
    table.deliver([token("a")])
    assert session.overflowed.is_set()
    table.deliver([token("a")])
    assert taken(session) == []
