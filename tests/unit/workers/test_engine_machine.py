"""One engine under any legal order of messages, with every way to decode.

No block is lost, every request ends once, nobody waits for ever, and whatever a step reads from the KV cache is what
was computed for just those tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.digest import token_digest
from tests.support.engine_fakes import (
    BOTH,
    CLAIM_S,
    DECODE,
    PREFILL,
    STOP_TOKEN,
    assert_empty,
    assert_ledger,
    expanded,
    key,
    submit,
)
from tests.support.engine_pair import REPORT
from tests.support.kv_memory import Fact, FactPacker, KvMemory
from workers.api import (
    Abort,
    Batching,
    CautiousDecoding,
    DecodingMethod,
    DraftsGenerated,
    EngineConfig,
    Handoff,
    KvTransferred,
    Migrate,
    NgramDrafts,
    PhaseSet,
    PrefillOrder,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    SubscribeKvEvents,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.engine.engine import Engine, plain_root
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
from workers.engine.sequence import NO_TOKEN, SequenceState

CONFIGS = st.builds(
    EngineConfig,
    block_size=st.just(2),
    token_budget=st.sampled_from([2, 7, 7, 16]),
    max_running_sequences=st.sampled_from([3, 8]),
    max_waiting_requests=st.just(4),
    batching=st.sampled_from(Batching),
    prefill_order=st.sampled_from(PrefillOrder),
    tile_tokens=st.sampled_from([1, 1, 4]),
    growth_reserve=st.sampled_from([0.0, 0.25, 1.0]),
    is_prefix_cache_on=st.sampled_from([True, True, False]),
    host_cache_bytes=st.sampled_from([0, 3, 8, 40]).map(
        lambda num_blocks: num_blocks * FactPacker.block_bytes
    ),
)
NUM_BLOCKS = 12
NUM_LAYERS = 2
TRANSFER_IDS = st.sampled_from([f"t{i}" for i in range(6)])
#: Few, so that KV often fits the request that claims it.
NUM_PROMPT = st.sampled_from([1, 4, 4, 4, 4, 18])
MAX_NEW = st.sampled_from([1, 2, 3, 5, 5, 6])
#: What prompts are cut from. Two begin alike; the last gives n-grams to guess from.
TEXTS = (tuple(range(100, 124)), (*range(100, 107), *range(200, 217)), (50, 51) * 12)
TOKENS = (50, 51, 50, 51, 52, 53)
#: Among them some that end a sequence.
ENDING_TOKENS = (*TOKENS, STOP_TOKEN, NO_TOKEN)
PUNCTUATION = frozenset({52})
DECODINGS: st.SearchStrategy[DecodingMethod | None] = st.sampled_from(
    [
        None,
        None,
        NgramDrafts(4),
        CautiousDecoding(max_branches=3, max_branch_tokens=1),
        CautiousDecoding(max_branches=3, max_branch_tokens=3),
        SuperposedDecoding(2),
    ]
)
CHOICES = st.lists(st.integers(0, 2**16), min_size=1, max_size=12)
STEP_S = 0.01


@dataclass
class Sending:
    """What the sending transfer of this id knows."""

    block_ids: tuple[int, ...]
    num_tokens: int
    #: Those that its sequence had when it began.
    token_ids: tuple[int, ...]
    root: bytes
    #: Of one that goes on elsewhere: tokens that are known there.
    num_known: int | None = None
    #: Tokens named so far, in order.
    num_ready: int = 0
    is_finished: bool = False
    is_released: bool = False
    is_sent: bool = False


class AnyOrder(RuleBasedStateMachine):
    """The test is everything around the engine: requests, transfers, clock and model."""

    @initialize(
        phases=st.sampled_from([PREFILL, DECODE, BOTH, BOTH, BOTH]),
        config=CONFIGS,
        attention_tokens=st.sampled_from([4.0, 1e9]),
        has_priorities=st.booleans(),
    )
    def start(
        self, phases: PhaseSet, config: EngineConfig, attention_tokens: float, has_priorities: bool
    ) -> None:
        self.memory = KvMemory(NUM_BLOCKS, config.block_size)
        self.engine = Engine(
            config,
            phases,
            num_blocks=NUM_BLOCKS,
            max_context_tokens=40,
            claim_s=CLAIM_S,
            attention_tokens=attention_tokens,
            punctuation=PUNCTUATION,
            packer=self.memory.packer if config.host_cache_bytes else None,
        )
        self.phases = phases
        self.config = config
        self.has_priorities = has_priorities
        self.now_s = 0.0
        self.num_requests = 0
        #: Requests that have neither ended nor been aborted -> the position of their next token.
        self.open: dict[RequestKey, int] = {}
        self.num_ends: Counter[RequestKey] = Counter()
        self.aborted: set[RequestKey] = set()
        self.asked: set[str] = set()
        #: Tokens that each transfer asked blocks for.
        self.num_reserved: dict[str, int] = {}
        #: Withdrawn, perhaps after the engine had granted it.
        self.receiving: dict[str, tuple[int, ...]] = {}
        self.sending: dict[str, Sending] = {}
        #: Of those that were asked to go elsewhere: tokens that are known there, as was said last.
        self.known: dict[RequestKey, int] = {}

    # Requests.

    @rule(data=st.data(), num_requests=st.integers(1, 4))
    def burst(self, data: st.DataObject, num_requests: int) -> None:
        """Requests that fit this worker, with much time."""
        for _ in range(num_requests):
            self._submit(
                self.phases,
                data.draw(TRANSFER_IDS),
                data.draw(NUM_PROMPT),
                data.draw(MAX_NEW),
                60,
                data.draw(DECODINGS),
                data.draw(st.sampled_from(TEXTS)),
                data.draw(st.integers(0, 2)),
                "",
            )

    @rule(
        phases=st.sampled_from([PREFILL, DECODE, BOTH]),
        transfer_id=TRANSFER_IDS,
        num_prompt=NUM_PROMPT,
        max_new=MAX_NEW,
        timeout_s=st.integers(1, 25),
        decoding=DECODINGS,
        text=st.sampled_from(TEXTS),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from(["", "", "", "salt"]),
    )
    def submit(
        self,
        phases: PhaseSet,
        transfer_id: str,
        num_prompt: int,
        max_new: int,
        timeout_s: int,
        decoding: DecodingMethod | None,
        text: tuple[int, ...],
        priority: int,
        cache_salt: str,
    ) -> None:
        self._submit(
            phases, transfer_id, num_prompt, max_new, timeout_s, decoding, text, priority, cache_salt
        )

    def _submit(
        self,
        phases: PhaseSet,
        transfer_id: str,
        num_prompt: int,
        max_new: int,
        timeout_s: int,
        decoding: DecodingMethod | None,
        text: tuple[int, ...],
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestKey:
        self.num_requests += 1
        request = submit(
            f"r{self.num_requests}",
            phases,
            num_prompt=num_prompt,
            max_new=max_new,
            timeout_s=timeout_s,
            transfer_id=None if phases == BOTH else transfer_id,
        )
        # KV that arrives is always that of the first text.
        request = replace(
            request,
            token_ids=(text if phases == BOTH else TEXTS[0])[:num_prompt],
            sampling=replace(request.sampling, decoding=decoding),
            priority=priority if self.has_priorities else 0,
            cache_salt=cache_salt if phases == BOTH else "",
        )
        self.open[request.key] = num_prompt + (phases == DECODE)
        self.engine.handle(request, self.now_s)
        return request.key

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        aborted = data.draw(st.sampled_from(sorted(self.open, key=str)))
        self._abort(aborted)

    def _abort(self, aborted: RequestKey) -> None:
        # What came out before belongs to it still.
        self._read_outputs()
        if aborted in self.open:
            del self.open[aborted]
            self.aborted.add(aborted)
        self.engine.handle(Abort(aborted), self.now_s)

    @rule()
    def abort_unknown(self) -> None:
        self.engine.handle(Abort(key("nobody")), self.now_s)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), transfer_id=TRANSFER_IDS, num_behind=st.sampled_from([0, 0, 1, 2]))
    def migrate(self, data: st.DataObject, transfer_id: str, num_behind: int) -> None:
        migrating = data.draw(st.sampled_from(sorted(self.open, key=str)))
        self._read_outputs()
        if migrating not in self.open or transfer_id in self.sending:
            return
        num_known = max(1, self.open[migrating] - num_behind)
        self.known[migrating] = num_known
        handoff = Handoff(transfer_id, "peer:1", 7)
        self.engine.handle(Migrate(migrating, handoff, num_known), self.now_s)

    @rule(phases=st.sampled_from([PREFILL, DECODE, BOTH]))
    def set_phases(self, phases: PhaseSet) -> None:
        if self.engine.set_phases(phases, self.now_s) is None:
            self.phases = phases
        for sequence in self.engine._sequences.values():
            assert sequence.state is SequenceState.HANDOFF or sequence.phases <= self.phases

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
        if transfer_id not in self.receiving:
            self.num_reserved[transfer_id] = num_tokens
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
            # Of as many tokens as there is room for: what is beyond the prompt is written before it is read.
            self.memory.fill(block_ids, text_facts(len(block_ids) * self.config.block_size))
            digest = self._digest(transfer_id)
            message = CommitTransfer(transfer_id, block_ids, (50,) * num_tokens, digest)
            self.engine.handle(message, self.now_s)
        else:
            self.engine.handle(ReleaseTransfer(transfer_id, block_ids, "gone"), self.now_s)

    def _digest(self, transfer_id: str) -> bytes:
        return token_digest(TEXTS[0][: self.num_reserved[transfer_id]])

    # Sending transfers.

    @precondition(lambda self: any(not one.is_released for one in self.sending.values()))
    @rule(data=st.data())
    def sender_releases(self, data: st.DataObject) -> None:
        live = sorted(i for i, one in self.sending.items() if not one.is_released)
        transfer_id = data.draw(st.sampled_from(live))
        one = self.sending[transfer_id]
        self._check_sending(one)
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
            self.engine.handle(TransferSent(transfer_id, REPORT), self.now_s)
        else:
            self.engine.handle(TransferFailed(transfer_id, "why"), self.now_s)

    @rule(transfer_id=st.sampled_from(["t0", "t1", "nobody"]))
    def unknown_releases(self, transfer_id: str) -> None:
        self._read_outputs()
        if transfer_id not in self.receiving and transfer_id not in self.sending:
            self.engine.handle(ReleaseTransfer(transfer_id, (), "twice"), self.now_s)
            self.engine.handle(CommitTransfer(transfer_id, (), (), b""), self.now_s)

    @rule()
    def subscribe(self) -> None:
        self.engine.handle(SubscribeKvEvents(), self.now_s)

    # Steps and time.

    @rule(
        choices=CHOICES,
        num_steps=st.integers(1, 4),
        is_broken=st.sampled_from([False] * 7 + [True]),
        is_ending=st.booleans(),
    )
    def step(self, choices: list[int], num_steps: int, is_broken: bool, is_ending: bool) -> None:
        source = cycle(choices)
        for _ in range(num_steps):
            self.engine.expire(self.now_s)
            if not self._step(lambda n: next(source) % n, ENDING_TOKENS if is_ending else TOKENS, is_broken):
                return

    def _step(self, choose: Callable[[int], int], tokens: tuple[int, ...], is_broken: bool = False) -> bool:
        plan = self.engine.schedule(self.now_s)
        if plan is None:
            return False
        self._read_outputs()
        assert plan.num_tokens <= max(self.config.token_budget, len(plan.decodes) + self.config.block_size)
        assert sum(part.sequence.parent is None for part in plan.slices) <= self.config.max_running_sequences
        if is_broken:
            self.memory.break_step(plan)
            self.engine.fail_step(plan, "broke", self.now_s)
            return False
        result = self.memory.run(plan, choose, tokens)
        for ready in self.engine.kv_ready(plan, 0, NUM_LAYERS):
            self._kv_is_ready(ready)
        self.engine.complete(plan, result, self.now_s + STEP_S)
        return True

    def _kv_is_ready(self, ready: KvReady) -> None:
        one = self.sending[ready.transfer_id]
        # Each token once, in order.
        assert ready.token_lo == one.num_ready
        assert ready.token_lo < ready.token_hi <= one.num_tokens
        one.num_ready = ready.token_hi
        self._check_sending(one)

    def _check_sending(self, one: Sending) -> None:
        """What is ready to be sent holds the sequence's tokens, until the transfer has let go of it."""
        facts = [(one.root, *one.token_ids[: i + 1]) for i in range(one.num_ready)]
        assert self.memory.read(one.block_ids, one.num_ready) == facts

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
            case KvTransferred() | RequestFailed() | DraftsGenerated():
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
                self._starts(output)
            case KvReady():
                self._kv_is_ready(output)
            case FinishTransfer():
                one = self.sending[output.transfer_id]
                assert one.num_ready == one.num_tokens
                if one.num_known is None:
                    assert len(output.token_ids) == 1
                else:
                    assert output.token_ids == one.token_ids[one.num_known :]
                    assert len(one.token_ids) == one.num_tokens + 1
                one.is_finished = True
            case EndTransfer():
                assert output.reason

    def _starts(self, start: StartTransfer) -> None:
        # It may have ended since, of an abort for example.
        sequence = self.engine._by_transfer.get(start.transfer_id)
        is_migrated = sequence is not None and sequence.state is SequenceState.HANDOFF
        num_known = self.known.get(start.key) if is_migrated else None
        token_ids = tuple(sequence.token_ids) if sequence is not None else TEXTS[0]
        root = sequence.block_hashes[0] if sequence is not None else plain_root(submit())
        self.sending[start.transfer_id] = Sending(
            start.block_ids, start.num_tokens, token_ids, root, num_known
        )
        assert start.timeout_s > 0
        assert start.token_digest == token_digest(token_ids[: num_known or start.num_tokens])

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
        assert_ledger(self.engine, self.now_s)
        held = len(self.receiving) + sum(not one.is_released for one in self.sending.values())
        assert self.engine.num_leases >= held
        assert self.engine.num_running + self.engine.num_waiting <= len(self.open)
        for block_ids in self.receiving.values():
            # A transfer may write at any time.
            self.memory.fill(block_ids, [])
        if self.config.growth_reserve == 1.0 and not self.has_priorities:
            assert self.engine.num_preemptions == 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self._nobody_waits_for_ever()
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

    def _nobody_waits_for_ever(self) -> None:
        """Once no transfer holds a block that it does not need, whoever waits for no KV ends without a deadline."""
        source = cycle(range(7))
        for _ in range(300):
            self._read_outputs()
            for transfer_id, block_ids in list(self.receiving.items()):
                del self.receiving[transfer_id]
                self.engine.handle(ReleaseTransfer(transfer_id, block_ids, "gone"), self.now_s)
            for transfer_id, one in self.sending.items():
                sequence = self.engine._by_transfer.get(transfer_id)
                is_over = sequence is None or sequence.state is not SequenceState.PREFILL
                if is_over and not one.is_released:
                    one.is_released = True
                    self.engine.handle(ReleaseTransfer(transfer_id, one.block_ids, "sent"), self.now_s)
            self._read_outputs()
            if not self._step(lambda n: next(source) % n, TOKENS) and not self.receiving:
                break
            self.engine.check_invariants()
        else:
            raise AssertionError(f"steps without end: {self.engine._sequences}")
        states = {sequence.state for sequence in self.engine._sequences.values()}
        # KV that nobody has claimed yet holds its blocks for a while.
        if not self.engine._incoming.num_held:
            assert states <= {SequenceState.HANDOFF, SequenceState.AWAITING_KV}, self.engine._sequences


def text_facts(num_tokens: int) -> list[Fact]:
    """The KV of the first text."""
    root = plain_root(submit())
    return [(root, *TEXTS[0][: i + 1]) for i in range(num_tokens)]


@dataclass(frozen=True)
class Request:
    """arrival, abort: steps. is_arriving: its KV comes from another worker."""

    arrival: int
    num_prompt: int
    max_new: int
    decoding: DecodingMethod | None
    text: tuple[int, ...]
    priority: int
    abort: int
    is_arriving: bool


REQUESTS = st.builds(
    Request,
    arrival=st.integers(0, 12),
    num_prompt=st.integers(1, 14),
    max_new=st.integers(1, 10),
    decoding=DECODINGS,
    text=st.sampled_from(TEXTS),
    priority=st.integers(0, 2),
    abort=st.sampled_from([99, 99, 99, 3, 6, 9]),
    is_arriving=st.sampled_from([False, False, True]),
)


@settings(max_examples=150)
@given(
    config=CONFIGS,
    has_priorities=st.booleans(),
    requests=st.lists(REQUESTS, min_size=2, max_size=8),
    broken_steps=st.sets(st.integers(1, 14), max_size=1),
    transfer_steps=st.integers(1, 4),
    choices=st.lists(st.integers(0, 2**16), min_size=5, max_size=40),
    is_ending=st.booleans(),
)
def test_many_requests_at_once_with_few_blocks(
    config: EngineConfig,
    has_priorities: bool,
    requests: list[Request],
    broken_steps: set[int],
    transfer_steps: int,
    choices: list[int],
    is_ending: bool,
) -> None:
    """The same as AnyOrder, but always in want of blocks."""
    state = AnyOrder()
    state.start(BOTH, config, 1e9, has_priorities)
    keys: dict[int, RequestKey] = {}
    ready: dict[str, int] = {}
    source = cycle(choices)
    for step in range(16):
        for i, one in enumerate(requests):
            name = f"t{i}"
            if one.arrival == step:
                keys[i] = state._submit(
                    DECODE if one.is_arriving else BOTH,
                    name,
                    one.num_prompt,
                    one.max_new,
                    60,
                    one.decoding,
                    one.text,
                    one.priority,
                )
                if one.is_arriving:
                    state.reserve(name, one.num_prompt, one.max_new, 60)
            if name in state.receiving and ready.setdefault(name, step + transfer_steps) == step:
                block_ids = state.receiving.pop(name)
                state.memory.fill(block_ids, text_facts(one.num_prompt))
                commit = CommitTransfer(name, block_ids, (50,), state._digest(name))
                state.engine.handle(commit, state.now_s)
            if one.abort == step and keys.get(i) in state.open:
                state._abort(keys[i])
        state.the_engine_is_sound()
        state._step(
            lambda n: next(source) % n, ENDING_TOKENS if is_ending else TOKENS, is_broken=step in broken_steps
        )
        state.the_engine_is_sound()
        state.now_s += 0.1
    state.teardown()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=60)
