"""Which gateway a request came from, and what waits to be told to it. Used in the loop only.

A session is one gateway's stream. Requests belong to the session that submitted them: their events go
there, and when it ends they are aborted. Events of the prefix cache go to every session that asked for them.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workers.api import (
    Abort,
    Command,
    Encode,
    Event,
    FailureCode,
    KvBlocksStored,
    KvEvent,
    KvEventsLost,
    Migrate,
    PromptScored,
    RequestFailed,
    RequestKey,
    Submit,
    SubscribeKvEvents,
    TokensGenerated,
    is_last,
)
from workers.submit_check import encode_problem, migrate_problem, submit_problem

#: Events of requests that may wait for a gateway that reads too slowly; one more ends its session. An event with logprobs
#: counts one for each of its tokens.
MAX_PENDING_EVENTS = 65536
#: Events of the cache that may; one more voids what it knows of the cache, and nothing else.
MAX_PENDING_KV_EVENTS = 2**20
#: In one message; more would keep a gateway's loop from all else.
MAX_KV_EVENTS_PER_BATCH = 1024
#: Requests of one session at a time, in whatever state; one more is refused as overloaded.
MAX_REQUESTS_PER_SESSION = 4096


@dataclass(frozen=True, slots=True)
class News:
    """What waited for a gateway; both kinds in their order."""

    events: list[Event]
    kv_events: list[KvEvent]


class GatewaySession:
    """One gateway's stream, as far as the worker cares."""

    def __init__(self) -> None:
        #: Requests that it submitted and that have not ended.
        self.keys: set[RequestKey] = set()
        #: More waited than may; the session must end, also if a write of it still hangs.
        self.overflowed = asyncio.Event()
        #: It has been told that events of the cache are lost, or will be, and has not asked for more.
        self.is_kv_lost = False
        #: It has asked for events of the cache, and has not been told yet what is there.
        self.wants_known = False
        self._events: list[Event] = []
        self._kv_events: list[KvEvent] = []
        self._num_pending = 0
        self._is_last_batch = False
        self._wake = asyncio.Event()

    def put(self, events: Iterable[Event], kv_events: Iterable[KvEvent] = ()) -> None:
        """More to tell. Past its limit all that waits is dropped, and the session, or what it knows of the cache, is over."""
        if self._is_last_batch:
            return
        for event in events:
            self._events.append(event)
            scored = event.logprobs if isinstance(event, PromptScored | TokensGenerated) else ()
            self._num_pending += max(1, len(scored))
        self._kv_events.extend(kv_events)
        if len(self._kv_events) > MAX_PENDING_KV_EVENTS:
            self._kv_events = [KvEventsLost()]
            self.is_kv_lost = True
        if self._num_pending > MAX_PENDING_EVENTS:
            self._events.clear()
            self._kv_events.clear()
            self.overflowed.set()
            self._is_last_batch = True
        self._wake.set()

    def finish(self) -> None:
        """Nothing more will be put."""
        self._is_last_batch = True
        self._wake.set()

    async def take(self) -> News | None:
        """All that waits, as soon as there is something; None when nothing will come any more."""
        while not (self._events or self._kv_events):
            if self._is_last_batch:
                return None
            self._wake.clear()
            await self._wake.wait()
        news = News(self._events, self._kv_events[:MAX_KV_EVENTS_PER_BATCH])
        self._events, self._num_pending = [], 0
        del self._kv_events[:MAX_KV_EVENTS_PER_BATCH]
        return news


class SessionTable:
    """All sessions of a worker. It refuses requests until `serve_with`, and again from `refuse` on."""

    def __init__(self) -> None:
        self._sessions: set[GatewaySession] = set()
        self._owners: dict[RequestKey, GatewaySession] = {}
        #: Sessions that want KV events.
        self._subscribed: set[GatewaySession] = set()
        self._refusal: str | None = "the worker is still loading its model"
        self._post: Callable[[Command], None] = _post_nowhere
        self._vocab_size = 0

    def serve_with(self, post: Callable[[Command], None], vocab_size: int) -> None:
        """From now on requests go to the engine, by `post`."""
        self._post = post
        self._vocab_size = vocab_size
        self._refusal = None
        if self._subscribed:
            post(SubscribeKvEvents())

    def refuse(self, reason: str) -> None:
        """Fail every request that is in flight, and each that comes from now on."""
        self._refusal = reason
        for key in list(self._owners):
            self._post(Abort(key))
            self.deliver([RequestFailed(key, FailureCode.INTERNAL, reason)])

    def finish(self) -> None:
        """End every session once it has been told what waits for it."""
        for session in self._sessions:
            session.finish()

    def open(self) -> GatewaySession:
        """A new stream."""
        session = GatewaySession()
        self._sessions.add(session)
        return session

    def close(self, session: GatewaySession) -> None:
        """The stream is over: abort what came by it."""
        self._sessions.discard(session)
        self._subscribed.discard(session)
        for key in session.keys:
            del self._owners[key]
            self._post(Abort(key))
        session.keys.clear()
        session.finish()

    def handle(self, session: GatewaySession, command: Command) -> None:
        """A command that came by this session."""
        match command:
            case Submit():
                self._submit(session, command, submit_problem(command, self._vocab_size))
            case Encode():
                self._submit(session, command, encode_problem(command))
            case Abort(key):
                if key in session.keys:
                    session.keys.remove(key)
                    del self._owners[key]
                    self._post(command)
            case Migrate(key):
                self._migrate(session, command, key)
            case SubscribeKvEvents():
                self._subscribed.add(session)
                session.is_kv_lost, session.wants_known = False, True
                if self._refusal is None:
                    self._post(command)

    def deliver(self, events: Iterable[Event]) -> None:
        """Events of requests, to whom they belong; those of requests that nobody owns any more are dropped."""
        by_session: dict[GatewaySession, list[Event]] = {}
        for event in events:
            session = self._owners.get(event.key)
            if session is None:
                continue
            by_session.setdefault(session, []).append(event)
            if is_last(event):
                session.keys.remove(event.key)
                del self._owners[event.key]
        for session, theirs in by_session.items():
            session.put(theirs)

    def deliver_kv(self, kv_events: Sequence[KvEvent]) -> None:
        """Events of the prefix cache, to every session that asked for them; what was there before, to those that have just asked.

        One that asked when others had already hears of changes before it is told all that is cached; those it
        may take or leave, since what it is told then is all there is.
        """
        changes = [event for event in kv_events if not (isinstance(event, KvBlocksStored) and event.is_known)]
        has_known = len(changes) < len(kv_events)
        for session in self._subscribed:
            if session.is_kv_lost:
                continue
            if has_known and session.wants_known:
                session.wants_known = False
                session.put((), kv_events)
            elif changes:
                session.put((), changes)

    def check_invariants(self) -> None:
        """Each request has one owner, which knows it."""
        assert self._subscribed <= self._sessions
        assert {key: session for session in self._sessions for key in session.keys} == self._owners

    def _migrate(self, session: GatewaySession, migrate: Migrate, key: RequestKey) -> None:
        if key not in session.keys:
            return
        problem = migrate_problem(migrate)
        if problem is None:
            self._post(migrate)
        else:
            self._post(Abort(key))
            self.deliver([RequestFailed(key, FailureCode.INVALID, problem)])

    def _submit(self, session: GatewaySession, submit: Submit | Encode, problem: str | None) -> None:
        refusal: tuple[FailureCode, str] | None = None
        if self._refusal is not None:
            refusal = FailureCode.INTERNAL, self._refusal
        elif problem is not None:
            refusal = FailureCode.INVALID, problem
        elif submit.key in self._owners:
            # The engine would say the same, but its answer would end the one that runs.
            refusal = FailureCode.INVALID, "attempt: this attempt is running here already"
        elif len(session.keys) >= MAX_REQUESTS_PER_SESSION:
            refusal = FailureCode.OVERLOADED, f"{len(session.keys)} requests of this session are here already"
        if refusal is not None:
            session.put([RequestFailed(submit.key, *refusal)])
            return
        session.keys.add(submit.key)
        self._owners[submit.key] = session
        self._post(submit)


def _post_nowhere(_command: Command) -> None:
    raise AssertionError("there is no engine yet")
