"""A device without a model that computes prompts and decodes at the same time, and checks what each step reads and writes.

Each phase has its stream. What a step does to memory happens at any time between its beginning and its end, which the test chooses.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from tests.support.device_engine import gather
from tests.support.engine_fakes import BOTH, CLAIM_S, STOP_TOKEN, key, submit
from tests.support.kv_memory import FactPacker
from workers.api import Abort, EngineConfig, Phase, RequestFailed
from workers.engine.engine import Engine
from workers.engine.host_tier import PackedBlock
from workers.engine.lookahead import ASSUMED_TOKEN, sources_of
from workers.engine.messages import Output
from workers.engine.running import Splitting
from workers.engine.sequence import Sequence as EngineSequence
from workers.engine.sharing import Load, SharingLog
from workers.engine.step_loop import StepLoop
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.step_choice import Exclusive, Mixed, Split, Step

#: Whose token, and which.
Fact = tuple[str, int]
#: Any number below this one.
Choose = Callable[[int], int]
SPLIT = Split(0.5, 0.5, 2048)


def token_at(name: str, position: int) -> int:
    """What a request's token at this position is; a STOP_TOKEN now and then."""
    number = (int(name[1:]) * 31 + position * 17) % 19
    return STOP_TOKEN if number == 5 else 100 + number


def expected_tokens(name: str, num_prompt: int, max_new: int) -> list[int]:
    """All that a request yields."""
    tokens: list[int] = []
    while len(tokens) < max_new and (not tokens or tokens[-1] != STOP_TOKEN):
        tokens.append(token_at(name, num_prompt + len(tokens)))
    return tokens


@dataclass(eq=False)
class Begun:
    """A step on a stream. writes: (block, place in it, what); reads: the same."""

    device: "TwoStreams"
    plan: StepPlan
    tokens: list[int]
    copies: list[tuple[int, int]]
    restores: list[tuple[int, PackedBlock]]
    writes: list[tuple[int, int, object]]
    reads: list[tuple[int, int, object]]
    has_run: bool = False

    @property
    def is_done(self) -> bool:
        return self.device.may_end(self)

    def result(self) -> StepResult:
        self.device.end(self)
        return StepResult(self.tokens)


class TwoStreams:
    """Implements OverlappingRunner and SplitRunner. is_ahead: steps begin before the tokens of the one before are known."""

    def __init__(self, num_blocks: int, block_size: int, choose: Choose) -> None:
        self.slots: list[list[object]] = [[None] * block_size for _ in range(num_blocks)]
        self.packer = FactPacker(self)
        self.num_ahead = 0
        #: Most steps that were in flight at the same time, and the phases of those that ended, in order.
        self.most_in_flight = 0
        self.ended: list[str] = []
        self._size = block_size
        self._choose = choose
        self._num_asked = 0
        self._streams: dict[str, deque[Begun]] = {"whole": deque(), "prefill": deque(), "decode": deque()}

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        return self.begin(plan, on_layers, None).result()

    def begin(self, plan: StepPlan, _on_layers: object, previous: Begun | None) -> Begun:
        assert not any(self._streams[name] for name in ("prefill", "decode")), "a step of both beside others"
        return self._begin("whole", plan, previous)

    def begin_beside(
        self, plan: StepPlan, _on_layers: object, previous: Begun | None, phase: Phase, step: object
    ) -> Begun:
        assert not self._streams["whole"], "a step beside one of both"
        assert not (plan.decodes if phase is Phase.PREFILL else plan.chunks)
        return self._begin(str(phase), plan, previous)

    def layout_name(self, step: object) -> str:
        return "split" if isinstance(step, Split) else "exclusive"

    def _begin(self, name: str, plan: StepPlan, previous: Begun | None) -> Begun:
        sources = sources_of(previous.plan, plan.decodes, -1) if previous is not None else None
        for i, sequence in enumerate(plan.decodes):
            if sources is not None and sources[i] >= 0:
                assert sequence.token_ids[-1] == ASSUMED_TOKEN
                self.num_ahead += 1
        sampled = [*plan.decodes, *(part.sequence for part in plan.chunks if part.yields_token)]
        tokens = [token_at(one.key.request_id, len(one.token_ids)) for one in sampled]
        writes, reads = [], []
        for part in plan.slices:
            for position in range(part.end):
                place = self._place(part.sequence, position)
                found = (*place, self._fact(part.sequence, position))
                reads.append(found)
                if position >= part.start:
                    writes.append(found)
        for i, tree in plan.drafts.items():
            sequence = plan.decodes[i]
            last = len(sequence.token_ids) - 1
            writes += [
                (*self._place(sequence, last + j), ("draft", j)) for j in range(1, tree.num_drafts + 1)
            ]
        copies, restores = list(plan.copies.items()), list(plan.restores.items())
        begun = Begun(self, plan, tokens, copies, restores, writes, reads)
        stream = self._streams[name]
        stream.append(begun)
        assert len(stream) <= 2
        self.most_in_flight = max(self.most_in_flight, sum(map(len, self._streams.values())))
        self._advance()
        return begun

    def may_end(self, begun: Begun) -> bool:
        self._advance()
        self._num_asked = 0 if begun.has_run else self._num_asked + 1
        if self._num_asked > 4:
            # Every step ends.
            self._num_asked = 0
            self._run(begun)
        return begun.has_run

    def phase_of(self, begun: Begun) -> str:
        """Or `whole`."""
        return next(name for name, stream in self._streams.items() if begun in stream)

    def end(self, begun: Begun) -> None:
        name = self.phase_of(begun)
        assert self._streams[name].popleft() is begun
        self._run(begun)
        self.ended.append(name)

    def _advance(self) -> None:
        """Some of the streams get further."""
        for stream in self._streams.values():
            waiting = [one for one in stream if not one.has_run]
            if waiting and self._choose(2):
                self._run(waiting[0])

    def _run(self, begun: Begun) -> None:
        if begun.has_run:
            return
        begun.has_run = True
        for target, source in begun.copies:
            self.slots[target] = list(self.slots[source])
        for block_id, packed in begun.restores:
            self.packer.unpack(packed, block_id)
        for block_id, place, fact in begun.writes:
            self.slots[block_id][place] = fact
        for block_id, place, fact in begun.reads:
            assert self.slots[block_id][place] == fact, (block_id, place, fact)

    def _place(self, sequence: EngineSequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self._size], position % self._size

    def _fact(self, sequence: EngineSequence, position: int) -> object:
        """All tokens up to it: what is known of generated ones follows from the position."""
        name = sequence.key.request_id
        num_prompt = sequence.num_prompt_tokens
        prompt = tuple(sequence.token_ids[: min(position + 1, num_prompt)])
        return (*prompt, *(token_at(name, i) for i in range(num_prompt, position + 1)))


class BreakingStreams(TwoStreams):
    """Some steps break when they begin, and others, which have run, when they have ended; by their numbers, from 1 on."""

    def __init__(
        self, num_blocks: int, block_size: int, choose: Choose, beginnings: set[int], ends: set[int]
    ) -> None:
        super().__init__(num_blocks, block_size, choose)
        self._beginnings, self._ends = beginnings, ends
        self._num_begun = self._num_ended = 0

    def _begin(self, name: str, plan: StepPlan, previous: Begun | None) -> Begun:
        self._num_begun += 1
        if self._num_begun in self._beginnings:
            raise RuntimeError("it does not begin")
        return super()._begin(name, plan, previous)

    def end(self, begun: Begun) -> None:
        super().end(begun)
        self._num_ended += 1
        if self._num_ended in self._ends:
            raise RuntimeError("it broke")


class ChosenSharing:
    """Implements Sharing by what a test chooses."""

    def __init__(self, choose: Choose, steps: Sequence[Step]) -> None:
        self._choose = choose
        self._steps = steps

    def step(self, _now_s: float, load: Load) -> Step:
        step = self._steps[self._choose(len(self._steps))]
        # Who says that one phase is alone says so of one that has work.
        if isinstance(step, Exclusive) and (
            load.head.num_left == 0 if step.phase is Phase.PREFILL else load.work.num_decoding == 0
        ):
            return Mixed(2048)
        return step


class SplitWorld:
    """An engine whose steps run on two streams, and what its requests got."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        *,
        choose: Choose = lambda num: num - 1,
        steps: Sequence[Step] = (SPLIT,),
        is_overlapping: bool = True,
        device: TwoStreams | None = None,
    ) -> None:
        self.device = device or TwoStreams(num_blocks, config.block_size, choose)
        self.engine = Engine(
            config,
            BOTH,
            num_blocks=num_blocks,
            max_context_tokens=64,
            claim_s=CLAIM_S,
            packer=self.device.packer if config.host_cache_bytes else None,
        )
        self.log = SharingLog()
        self.outputs: list[Output] = []
        self.tokens: dict[str, list[int]] = {}
        self.now_s = 0.0
        self.loop = StepLoop(
            self.engine,
            self.device,
            self.outputs.extend,
            pytest.fail if device is None else lambda _reason: None,
            self._clock,
            overlapping=self.device if is_overlapping else None,
            splitting=Splitting(ChosenSharing(choose, steps), self.device, self.log),
        )

    def _clock(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def submit(
        self, name: str, num_prompt: int, max_new: int, *, is_like_others: bool = False, **sampling: object
    ) -> None:
        """is_like_others: its prompt is the beginning of one that all of these have."""
        self.tokens[name] = []
        asked = submit(name, BOTH, num_prompt=num_prompt, max_new=max_new)
        first = 50_000 if is_like_others else 1000 * int(name[1:])
        tokens = tuple(first + i for i in range(num_prompt))
        options = replace(asked.sampling, **sampling)
        self.engine.handle(replace(asked, token_ids=tokens, sampling=options), self.now_s)

    def abort(self, name: str) -> None:
        self.engine.handle(Abort(key(name)), self.now_s)

    def step(self) -> bool:
        is_working = self.loop.step()
        assert not self._gather(), "a request failed"
        return is_working

    def _gather(self) -> set[str]:
        """What has come out; returns who failed."""
        self.engine.check_invariants()
        assert self.engine.ledger(self.now_s).leaked_block_ids == ()
        failed = {one.key.request_id for one in self.outputs if isinstance(one, RequestFailed)}
        gather([one for one in self.outputs if not isinstance(one, RequestFailed)], self.tokens)
        self.outputs.clear()
        return failed

    def finish(self) -> None:
        """All requests to their end."""
        for _ in range(5000):
            if not self.step():
                return
        raise AssertionError("requests are stuck")

    def finish_what_can(self) -> set[str]:
        """The same where steps may break; returns whose requests failed."""
        failed: set[str] = set()
        for _ in range(5000):
            if not self.loop.step():
                return failed | self._gather()
            failed |= self._gather()
        raise AssertionError("requests are stuck")

    def assert_idle(self) -> None:
        counts = self.engine.block_counts()
        assert counts.in_use == counts.leased == 0
        assert counts.free + counts.cached == counts.total
