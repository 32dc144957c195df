"""One engine under any legal order of messages: no block is lost, and every request ends once."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engine_fakes import (
    BOTH,
    DECODE,
    PREFILL,
    STOP_TOKEN,
    assert_empty,
    expanded,
    key,
    make_engine,
    submit,
)
from workers.api import (
    Abort,
    EngineConfig,
    KvTransferred,
    PhaseSet,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    TokensGenerated,
)
from workers.engine.messages import (
    BlocksReserved,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    Output,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
    TransferFailed,
    TransferSent,
)
from workers.engine.sequence import NO_TOKEN
from workers.engine.step_result import StepResult

CONFIG = EngineConfig(block_size=2, token_budget=7, max_running_sequences=3, max_waiting_requests=4)
NUM_BLOCKS = 12
NUM_LAYERS = 2
TRANSFER_IDS = st.sampled_from([f"t{i}" for i in range(6)])
#: Few, so that KV often fits the request that claims it.
NUM_PROMPT = st.sampled_from([1, 4, 4, 4, 4, 18])
TOKENS = st.sampled_from([50, 51, 52, 53, STOP_TOKEN, NO_TOKEN])


@dataclass
class Sending:
    """What the sending transfer of this id knows."""

    block_ids: tuple[int, ...]
    num_tokens: int
    #: Blocks named so far, in order.
    num_ready: int = 0
    is_finished: bool = False
    is_released: bool = False
    is_sent: bool = False


class AnyOrder(RuleBasedStateMachine):
    """The test is everything around the engine: requests, transfers, clock and model."""

    @initialize(phases=st.sampled_from([PREFILL, DECODE, BOTH, BOTH, BOTH]))
    def start(self, phases: PhaseSet) -> None:
        self.engine = make_engine(phases, config=CONFIG, num_blocks=NUM_BLOCKS, max_context_tokens=40)
        self.phases = phases
        self.now_s = 0.0
        self.num_requests = 0
        #: Requests that have neither ended nor been aborted -> the position of their next token.
        self.open: dict[RequestKey, int] = {}
        self.num_ends: Counter[RequestKey] = Counter()
        self.aborted: set[RequestKey] = set()
        self.asked: set[str] = set()
        #: Withdrawn, perhaps after the engine had granted it.
        self.receiving: dict[str, tuple[int, ...]] = {}
        self.sending: dict[str, Sending] = {}

    # Requests.

    @rule(
        phases=st.sampled_from([PREFILL, DECODE, BOTH]),
        transfer_id=TRANSFER_IDS,
        num_prompt=NUM_PROMPT,
        max_new=st.integers(1, 5),
        timeout_s=st.integers(1, 25),
    )
    def submit(
        self, phases: PhaseSet, transfer_id: str, num_prompt: int, max_new: int, timeout_s: int
    ) -> None:
        self.num_requests += 1
        request = submit(
            f"r{self.num_requests}",
            phases,
            num_prompt=num_prompt,
            max_new=max_new,
            timeout_s=timeout_s,
            transfer_id=None if phases == BOTH else transfer_id,
        )
        self.open[request.key] = num_prompt + (phases == DECODE)
        self.engine.handle(request, self.now_s)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        aborted = data.draw(st.sampled_from(sorted(self.open, key=str)))
        # What came out before belongs to it still.
        self._read_outputs()
        if aborted in self.open:
            del self.open[aborted]
            self.aborted.add(aborted)
        self.engine.handle(Abort(aborted), self.now_s)

    @rule()
    def abort_unknown(self) -> None:
        self.engine.handle(Abort(key("nobody")), self.now_s)

    # Receiving transfers.

    @rule(
        transfer_id=TRANSFER_IDS,
        num_tokens=NUM_PROMPT,
        num_more=st.sampled_from([1, 5, 5]),
        timeout_s=st.integers(0, 20),
    )
    def reserve(self, transfer_id: str, num_tokens: int, num_more: int, timeout_s: int) -> None:
        if transfer_id in self.asked:
            return
        self.asked.add(transfer_id)
        self.engine.handle(
            ReserveBlocks(transfer_id, num_tokens, num_tokens + num_more, self.now_s + timeout_s), self.now_s
        )

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        transfer_id = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(transfer_id)
        self.engine.handle(CancelReservation(transfer_id), self.now_s)

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), num_tokens=st.sampled_from([0, 1, 1, 1, 1, 2]), is_whole=st.booleans())
    def receiver_ends(self, data: st.DataObject, num_tokens: int, is_whole: bool) -> None:
        transfer_id = data.draw(st.sampled_from(sorted(self.receiving)))
        block_ids = self.receiving.pop(transfer_id)
        if is_whole:
            message = CommitTransfer(transfer_id, block_ids, (50,) * num_tokens)
            self.engine.handle(message, self.now_s)
        else:
            self.engine.handle(ReleaseTransfer(transfer_id, block_ids, "gone"), self.now_s)

    # Sending transfers.

    @precondition(lambda self: any(not one.is_released for one in self.sending.values()))
    @rule(data=st.data())
    def sender_releases(self, data: st.DataObject) -> None:
        live = sorted(i for i, one in self.sending.items() if not one.is_released)
        transfer_id = data.draw(st.sampled_from(live))
        one = self.sending[transfer_id]
        one.is_released = True
        one.is_sent = one.is_finished and data.draw(st.booleans())
        self.engine.handle(ReleaseTransfer(transfer_id, one.block_ids, "why"), self.now_s)

    @precondition(lambda self: any(one.is_released for one in self.sending.values()))
    @rule(data=st.data())
    def sender_reports(self, data: st.DataObject) -> None:
        released = sorted(i for i, one in self.sending.items() if one.is_released)
        transfer_id = data.draw(st.sampled_from(released))
        self._report(transfer_id)

    def _report(self, transfer_id: str) -> None:
        one = self.sending.pop(transfer_id)
        if one.is_sent:
            self.engine.handle(TransferSent(transfer_id, 1, 1, 0.1, 0.0), self.now_s)
        else:
            self.engine.handle(TransferFailed(transfer_id, "why"), self.now_s)

    @rule(transfer_id=st.sampled_from(["t0", "t1", "nobody"]))
    def unknown_releases(self, transfer_id: str) -> None:
        self._read_outputs()
        if transfer_id not in self.receiving and transfer_id not in self.sending:
            self.engine.handle(ReleaseTransfer(transfer_id, (), "twice"), self.now_s)
            self.engine.handle(CommitTransfer(transfer_id, (), ()), self.now_s)

    # Steps and time.

    @rule(data=st.data(), num_steps=st.integers(1, 3), is_broken=st.sampled_from([False] * 7 + [True]))
    def step(self, data: st.DataObject, num_steps: int, is_broken: bool) -> None:
        for _ in range(num_steps):
            self.engine.expire(self.now_s)
            plan = self.engine.schedule(self.now_s)
            if plan is None:
                return
            self._read_outputs()
            assert plan.num_tokens <= CONFIG.token_budget
            assert len(plan.slices) <= CONFIG.max_running_sequences
            for ready in self.engine.kv_ready(plan, 0, NUM_LAYERS):
                self._kv_is_ready(ready)
            if is_broken:
                self.engine.fail_step(plan, "broke", self.now_s)
                return
            tokens = [data.draw(TOKENS) for part in plan.slices if part.yields_token]
            self.engine.complete(plan, StepResult(tokens), self.now_s)

    def _kv_is_ready(self, ready: KvReady) -> None:
        one = self.sending[ready.transfer_id]
        # Each block once, in order.
        assert ready.block_lo == one.num_ready
        assert ready.block_lo < ready.block_hi <= len(one.block_ids)
        one.num_ready = ready.block_hi

    @rule(duration_s=st.sampled_from([0.5, 2.0, 6.0]))
    def wait(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.engine.expire(self.now_s)
        deadline_s = self.engine.next_deadline_s()
        assert deadline_s is None or deadline_s > self.now_s

    # What comes out.

    def _read_outputs(self) -> None:
        for output in expanded(self.engine.take_outputs()):
            self._take(output)

    def _take(self, output: Output) -> None:
        match output:
            case PrefillStarted():
                assert output.key in self.open
            case TokensGenerated():
                assert output.first_position == self.open[output.key]
                self.open[output.key] += len(output.token_ids)
                if output.finish_reason is not None:
                    self._ends(output.key)
            case KvTransferred() | RequestFailed():
                self._ends(output.key)
            case BlocksReserved():
                assert output.transfer_id not in self.receiving
                # Also what was withdrawn just before: whoever asked has to give it back.
                self.asked.discard(output.transfer_id)
                self.receiving[output.transfer_id] = output.block_ids
            case ReservationRefused():
                assert output.reason
                self.asked.discard(output.transfer_id)
            case StartTransfer():
                assert output.transfer_id not in self.sending or self.sending[output.transfer_id].is_released
                self.sending[output.transfer_id] = Sending(output.block_ids, output.num_tokens)
                assert output.timeout_s > 0
            case FinishTransfer():
                one = self.sending[output.transfer_id]
                assert one.num_ready == len(one.block_ids)
                assert len(output.token_ids) == 1
                one.is_finished = True
            case EndTransfer():
                assert output.reason

    def _ends(self, ended: RequestKey) -> None:
        del self.open[ended]
        self.num_ends[ended] += 1
        assert self.num_ends[ended] == 1
        assert ended not in self.aborted

    @invariant()
    def the_engine_is_sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self._read_outputs()
        self.engine.check_invariants()
        held = len(self.receiving) + sum(not one.is_released for one in self.sending.values())
        assert self.engine.num_leases >= held
        assert self.engine.num_running + self.engine.num_waiting <= len(self.open)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Requests and transfers come to their end; nobody asks for more.
        for _ in range(3):
            self.now_s += 100.0
            self.engine.expire(self.now_s)
            self._read_outputs()
            for transfer_id, block_ids in list(self.receiving.items()):
                del self.receiving[transfer_id]
                self.engine.handle(ReleaseTransfer(transfer_id, block_ids, "gone"), self.now_s)
            for transfer_id, one in list(self.sending.items()):
                if not one.is_released:
                    self.engine.handle(ReleaseTransfer(transfer_id, one.block_ids, "gone"), self.now_s)
                self._report(transfer_id)
        self._read_outputs()
        assert_empty(self.engine)
        assert not self.open, "requests without an end"
        assert self.engine.next_deadline_s() is None


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=60)
