"""A prefill and a decode engine together, over transfers that may be late, refused or broken."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.support.engine_pair import EnginePair, expected_token
from workers.api import RequestKey

SEEDS = st.integers(0, 2**32 - 1)
NUM_PROMPT = st.integers(1, 20)
MAX_NEW = st.integers(1, 6)


def assert_done(pair: EnginePair, key: RequestKey) -> None:
    request = pair.requests[key]
    num_prompt = len(request.submit.token_ids)
    assert request.end == "done"
    positions = range(num_prompt, request.num_tokens)
    assert request.tokens == {i: expected_token(num_prompt, i) for i in positions}


@given(SEEDS, st.lists(st.tuples(NUM_PROMPT, MAX_NEW), min_size=1, max_size=5))
def test_without_faults_every_request_gets_all_its_tokens(seed: int, shapes: list[tuple[int, int]]) -> None:
    pair = EnginePair(seed)
    keys = [pair.submit(num_prompt, max_new, 100.0) for num_prompt, max_new in shapes]
    pair.settle()
    for key in keys:
        assert_done(pair, key)
    pair.assert_over()


@given(SEEDS, st.integers(0, 60))
def test_a_request_cancelled_at_any_moment_leaves_nothing_behind(seed: int, num_before: int) -> None:
    pair = EnginePair(seed)
    cancelled, other = pair.submit(12, 5, 100.0), pair.submit(9, 4, 100.0)
    for _ in range(num_before):
        pair.anything()
    pair.cancel(cancelled)
    pair.settle()
    assert_done(pair, other)
    pair.assert_over()


class PairWithFaults(RuleBasedStateMachine):
    """Anything may happen between two engines. The invariants of both hold after every event."""

    @initialize(seed=SEEDS)
    def start(self, seed: int) -> None:
        self.pair = EnginePair(seed)

    @rule(num_prompt=NUM_PROMPT, max_new=MAX_NEW, timeout_s=st.sampled_from([2.0, 10.0, 60.0]))
    def submit(self, num_prompt: int, max_new: int, timeout_s: float) -> None:
        self.pair.submit(num_prompt, max_new, timeout_s)

    @rule(num_events=st.integers(1, 20))
    def go_well_for_a_while(self, num_events: int) -> None:
        for _ in range(num_events):
            self.pair.anything()

    @rule(side=st.sampled_from(["prefill", "decode"]))
    def step(self, side: str) -> None:
        self.pair.step(side)

    @rule(index=st.integers(0, 20))
    def deliver(self, index: int) -> None:
        queues = [name for name, queue in self.pair.mail.items() if queue]
        if queues:
            self.pair.deliver(queues[index % len(queues)])

    @precondition(lambda self: self.pair.requests)
    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        keys = list(self.pair.requests)
        self.pair.cancel(keys[index % len(keys)])

    @precondition(lambda self: self.pair.senders)
    @rule(index=st.integers(0, 20))
    def break_stream(self, index: int) -> None:
        transfer_ids = list(self.pair.senders)
        self.pair.break_stream(transfer_ids[index % len(transfer_ids)])

    @rule(duration_s=st.sampled_from([0.5, 3.0, 9.0]))
    def wait(self, duration_s: float) -> None:
        self.pair.wait(duration_s)

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        # Faults stop: what can still end well does, the rest ends by its deadline.
        self.pair.settle()
        for _ in range(4):
            self.pair.wait(100.0)
            self.pair.settle()
        self.pair.assert_over()


TestPairWithFaults = PairWithFaults.TestCase
TestPairWithFaults.settings = settings(stateful_step_count=40)
