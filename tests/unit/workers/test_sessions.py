"""Who owns a request, and who hears of it."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.worker_client import submit
from workers import sessions
from workers.api import (
    Abort,
    Command,
    DraftsGenerated,
    Event,
    FailureCode,
    FinishReason,
    KvBlocksRemoved,
    KvBlocksStored,
    KvEventsLost,
    PrefillStarted,
    PromptScored,
    RequestFailed,
    RequestKey,
    SubscribeKvEvents,
    TokenLogprobs,
    TokensGenerated,
)
from workers.sessions import GatewaySession, News, SessionTable


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


def news(session: GatewaySession) -> News | None:
    async def take() -> News | None:
        async with asyncio.timeout(1):
            return await session.take()

    return asyncio.run(take())


def taken(session: GatewaySession) -> list[Event]:
    found = news(session)
    return [] if found is None else found.events


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


STORED = KvBlocksStored(b"", (b"a", b"b"))
REMOVED = KvBlocksRemoved((b"b",))


def test_kv_events_go_in_order_to_every_session_that_asked_and_to_no_other(table: SessionTable) -> None:
    engine = Engine(table)
    first, second, silent = table.open(), table.open(), table.open()
    table.handle(first, SubscribeKvEvents())
    table.handle(second, SubscribeKvEvents())
    assert engine.commands == [SubscribeKvEvents(), SubscribeKvEvents()]
    table.handle(silent, submit([1], request_id="a"))
    table.deliver_kv([STORED])
    table.deliver_kv([REMOVED, STORED])
    table.deliver([token("a")])
    assert news(first) == news(second) == News([], [STORED, REMOVED, STORED])
    assert news(silent) == News([token("a")], [])


def test_a_session_that_asked_before_the_engine_was_there_is_answered(table: SessionTable) -> None:
    session = table.open()
    table.handle(session, SubscribeKvEvents())
    engine = Engine(table)
    assert engine.commands == [SubscribeKvEvents()]
    table.deliver_kv([STORED])
    assert news(session) == News([], [STORED])


def test_kv_events_for_a_session_that_ended_are_dropped(table: SessionTable) -> None:
    Engine(table)
    session = table.open()
    table.handle(session, SubscribeKvEvents())
    table.close(session)
    table.deliver_kv([STORED])
    assert news(session) is None


def test_logprobs_that_are_not_read_count_by_their_tokens(
    table: SessionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING_EVENTS", 3)
    Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    scored = PromptScored(key("a"), 1, (TokenLogprobs(5, -0.1, 1),) * 3)
    table.deliver([scored])
    assert not session.overflowed.is_set()
    assert len(taken(session)) == 1
    table.deliver([scored])
    table.deliver([token("a")])
    assert session.overflowed.is_set()


def test_kv_events_that_are_not_read_are_lost_and_nothing_else_is(
    table: SessionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING_KV_EVENTS", 2)
    engine = Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.handle(session, SubscribeKvEvents())
    table.deliver([token("a")])
    table.deliver_kv([STORED, REMOVED])
    table.deliver_kv([STORED])
    table.deliver_kv([REMOVED])
    assert news(session) == News([token("a")], [KvEventsLost()])
    # Nothing until it asks again: what comes then is all that is there.
    table.deliver_kv([STORED])
    table.handle(session, SubscribeKvEvents())
    assert engine.commands[-1] == SubscribeKvEvents()
    table.deliver_kv([REMOVED])
    assert news(session) == News([], [REMOVED])
    assert not session.overflowed.is_set()


def test_what_was_there_before_goes_to_who_has_just_asked(table: SessionTable) -> None:
    Engine(table)
    known = KvBlocksStored(b"", (b"a", b"b"), is_known=True)
    first, second = table.open(), table.open()
    table.handle(first, SubscribeKvEvents())
    table.deliver_kv([known])
    table.handle(second, SubscribeKvEvents())
    table.deliver_kv([REMOVED, known])
    table.deliver_kv([known])
    assert news(first) == News([], [known, REMOVED])
    assert news(second) == News([], [REMOVED, known])


def test_a_large_cache_is_told_in_several_messages(
    table: SessionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_KV_EVENTS_PER_BATCH", 2)
    Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.handle(session, SubscribeKvEvents())
    table.deliver_kv([STORED, REMOVED, STORED])
    table.deliver([token("a")])
    assert news(session) == News([token("a")], [STORED, REMOVED])
    assert news(session) == News([], [STORED])


def test_drafts_end_their_request(table: SessionTable) -> None:
    engine = Engine(table)
    session = table.open()
    table.handle(session, submit([1], request_id="a"))
    table.deliver([DraftsGenerated(key("a"), ((1,),), (-0.5,))])
    table.close(session)
    assert len(engine.commands) == 1
