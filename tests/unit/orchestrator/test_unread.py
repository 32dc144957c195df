"""Tokens that a gateway is told of when somebody looks: all of them, in order, and none before it has come."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from orchestrator.sim.leap import Leap, token_of
from orchestrator.sim.unread import UnreadTokens
from tests.support.engine_fakes import BOTH, submit
from workers.api import RequestId, RequestKey, WorkerId
from workers.engine.messages import TokensDecoded
from workers.engine.sequence import Sequence
from workers.engine.step_plan import StepPlan

PROCESS = (WorkerId("w"), 1)
NUM_REQUESTS = 3


@dataclass
class Sent:
    """Of one request, from its first token on: what was sent, and when each comes."""

    sequence: Sequence
    begin: int
    arrivals_s: list[float] = field(default_factory=list)
    #: Lengths of what was read, one after the other.
    chunks: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return self.begin + len(self.arrivals_s)


class UnreadMachine(RuleBasedStateMachine):
    """One process: steps one by one and in leaps, and a gateway that looks at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = UnreadTokens()
        self.now_s = 0.0
        self.last_s = 0.0
        self.leap: Leap | None = None
        self.sent: dict[RequestId, Sent] = {}
        for number in range(NUM_REQUESTS):
            request_id = RequestId(f"r{number}")
            sequence = Sequence.from_submit(
                submit(request_id, phases=BOTH, num_prompt=number + 2), 0.0, root=b"root", number=number
            )
            self.sent[request_id] = Sent(sequence, number + 2)

    def _members(self) -> list[Sent]:
        return list(self.sent.values())

    @rule(seconds=st.sampled_from((0.0, 0.5, 1.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    def _arrival_s(self, way_s: float) -> float:
        self.last_s = max(self.last_s, self.now_s + way_s)
        return self.last_s

    @precondition(lambda self: self.leap is None)
    @rule(way_s=st.sampled_from((0.0, 0.3, 2.0)))
    def step(self, way_s: float) -> None:
        arrive_s, members = self._arrival_s(way_s), self._members()
        keys = tuple(one.sequence.key for one in members)
        tokens = tuple(token_of(one.sequence.key.request_id, one.position) for one in members)
        positions = tuple(one.position for one in members)
        self.unread.add(PROCESS, TokensDecoded(keys, tokens, positions), arrive_s)
        for one, token in zip(members, tokens, strict=True):
            one.sequence.token_ids.append(token)
            one.arrivals_s.append(arrive_s)

    @precondition(lambda self: self.leap is None)
    @rule()
    def begin_leap(self) -> None:
        decodes = [one.sequence for one in self._members()]
        plan = StepPlan(decodes, (), np.zeros((1, 1), np.int32))
        self.leap = Leap(plan, 100, 4, float("inf"))
        self.unread.begin_leap(PROCESS, self.leap)

    @precondition(lambda self: self.leap is not None)
    @rule(way_s=st.sampled_from((0.0, 0.3, 2.0)))
    def leap_step(self, way_s: float) -> None:
        assert self.leap is not None
        self.leap.end_step()
        self.leap.arrivals_s.append(self._arrival_s(way_s))
        for one in self._members():
            one.arrivals_s.append(self.last_s)

    @precondition(lambda self: self.leap is not None)
    @rule(number=st.integers(0, NUM_REQUESTS - 1))
    def engine_catches_up(self, number: int) -> None:
        assert self.leap is not None
        self.leap.plan.decodes[number].token_ids += self.leap.missing(number)

    @precondition(lambda self: self.leap is not None)
    @rule()
    def end_leap(self) -> None:
        assert self.leap is not None
        for index, sequence in enumerate(self.leap.plan.decodes):
            sequence.token_ids += self.leap.missing(index)
        self.unread.end_leap(PROCESS)
        self.leap = None

    @rule(number=st.integers(0, NUM_REQUESTS - 1))
    def look(self, number: int) -> None:
        request_id = RequestId(f"r{number}")
        sent = self.sent[request_id]
        num_read = sum(sent.chunks)
        assert self.unread.coming_s(request_id, self.now_s) == {
            at_s for at_s in sent.arrivals_s[num_read:] if at_s > self.now_s
        }
        for told in self.unread.read(request_id, self.now_s):
            num = len(told.event.token_ids)
            assert told.process == PROCESS
            assert told.event.key == RequestKey(request_id, sent.sequence.key.attempt)
            assert told.event.first_position == sent.begin + num_read
            assert list(told.event.token_ids) == [
                token_of(request_id, told.event.first_position + i) for i in range(num)
            ]
            assert told.times_s == sent.arrivals_s[num_read : num_read + num]
            num_read += num
            sent.chunks.append(num)
        assert num_read == sum(at_s <= self.now_s for at_s in sent.arrivals_s)
        # Of the second of all tokens it is known when it came.
        assert sent.chunks[:1] in ([], [1])

    def teardown(self) -> None:
        self.now_s += 100.0
        for number in range(NUM_REQUESTS):
            self.look(number)
        if self.leap is None:
            assert self.unread.request_ids() == []


TestUnreadTokens = UnreadMachine.TestCase
