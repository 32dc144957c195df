"""The engine's state and every change to it: messages in, outputs out. Pure.

Owns the sequences and the block pool. Blocks that a transfer knows come back only by the transfer's
word (CommitTransfer or ReleaseTransfer): a late chunk can then never meet a block's next owner.
"""

import math
from collections import deque
from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from typing import assert_never

from kvtransfer.layout import blocks_needed
from workers.api import (
    Abort,
    BlockCounts,
    EngineConfig,
    FailureCode,
    KvTransferred,
    Phase,
    PhaseSet,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    Submit,
    TokensGenerated,
)
from workers.engine.admission import reason_to_refuse
from workers.engine.block_pool import BlockPool
from workers.engine.incoming import ArrivedKv, IncomingKv, misfit
from workers.engine.messages import (
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    Message,
    Output,
    ReleaseTransfer,
    ReserveBlocks,
    TransferFailed,
    TransferSent,
)
from workers.engine.outgoing import OutgoingKv, kv_ready
from workers.engine.scheduler import StepPlan, schedule
from workers.engine.sequence import NO_TOKEN, Sequence, SequenceState


class Engine:
    """All decisions of one worker, for any set of phases.

    max_context_tokens: the model's limit. claim_s: see IncomingKv, in seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        phases: PhaseSet,
        *,
        num_blocks: int,
        max_context_tokens: int,
        claim_s: float,
    ) -> None:
        # Less would never let a prompt's first block in.
        assert config.token_budget >= config.block_size, config
        self.pool = BlockPool(num_blocks, config.block_size)
        self._config = config
        self._phases = phases
        self._max_context_tokens = max_context_tokens
        self._sequences: dict[RequestKey, Sequence] = {}
        #: Those whose state is WAITING, in order of arrival.
        self._waiting: deque[Sequence] = deque()
        #: Those whose state is PREFILL or DECODE, in order of admission.
        self._running: dict[RequestKey, Sequence] = {}
        #: Those whose state is AWAITING_KV.
        self._num_awaiting_kv = 0
        self._by_transfer: dict[str, Sequence] = {}
        self._outgoing = OutgoingKv()
        self._incoming = IncomingKv(
            self.pool, phases, max_waiting=config.max_waiting_requests, claim_s=claim_s
        )
        #: `expire` has nothing to do before this. Too early after what it stood for has ended.
        self._next_expiry_s = math.inf
        self._claim_s = claim_s
        self._outputs: list[Output] = []

    # What others ask.

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun here: they wait for prefill, or for their KV."""
        return len(self._waiting) + self._num_awaiting_kv

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    @property
    def num_leases(self) -> int:
        """Transfers that hold blocks, sending and receiving, and KV that nobody has claimed yet."""
        return self._outgoing.num_held + self._incoming.num_held

    def block_counts(self) -> BlockCounts:
        """Free, cached, in use, leased."""
        return self.pool.counts()

    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called again at the latest; None while nothing can expire."""
        return self._next_expiry_s if self._next_expiry_s < math.inf else None

    def take_outputs(self) -> list[Output]:
        """What has come out since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # Messages.

    def handle(self, message: Message, now_s: float) -> None:
        """Apply one message."""
        match message:
            case Submit():
                self._submit(message, now_s)
            case Abort():
                self._drop(message.key, now_s, reason="aborted")
            case ReserveBlocks():
                self._reserve(message, now_s)
            case CancelReservation():
                self._incoming.cancel(message.transfer_id)
            case CommitTransfer():
                self._commit(message, now_s)
            case ReleaseTransfer():
                self._release(message, now_s)
            case TransferSent() | TransferFailed():
                self._transfer_ended(message, now_s)
            case _:
                assert_never(message)
        self._grant_reservations()

    def expire(self, now_s: float) -> None:
        """Fail what is past its deadline. Costs nothing before the first one."""
        if now_s < self._next_expiry_s:
            return
        for key in [key for key, sequence in self._sequences.items() if sequence.deadline_s <= now_s]:
            self._fail(key, FailureCode.DEADLINE, "the request's deadline passed", now_s)
        self._outputs.extend(self._incoming.expire(now_s))
        deadlines_s = [sequence.deadline_s for sequence in self._sequences.values()]
        self._next_expiry_s = min([*deadlines_s, self._incoming.next_expiry_s()])
        self._grant_reservations()

    # Steps.

    def schedule(self, now_s: float) -> StepPlan | None:
        """Plan a step and take the blocks of what it admits; None when there is nothing to compute."""
        # A prompt takes no blocks before KV on its way that asked earlier, or large KV would wait for ever.
        waiting = takewhile(lambda it: it.arrived_s <= self._incoming.waits_since_s, self._waiting)
        num_places = self._config.max_running_sequences - self._incoming.num_held
        plan = schedule(self._running.values(), waiting, self.pool, self._config, num_places=num_places)
        for sequence in plan.admitted:
            self._waiting.popleft()
            self._admit(sequence, now_s)
        return plan if plan.slices else None

    def kv_ready(self, plan: StepPlan, layer_lo: int, layer_hi: int) -> list[KvReady]:
        """What can be sent once these layers of the step are computed."""
        return kv_ready(plan, layer_lo, layer_hi, self._config.block_size)

    def complete(self, plan: StepPlan, token_ids: SequenceOf[int], now_s: float) -> None:
        """The step has run. token_ids: one sampled token for each slice that yields one, in order.

        A sequence whose token is NO_TOKEN fails.
        """
        sampled = iter(token_ids)
        for part in plan.slices:
            token_id = next(sampled) if part.yields_token else None
            part.sequence.num_computed_tokens = part.end
            if token_id is not None:
                self._advance(part.sequence, token_id, now_s)
        assert next(sampled, None) is None
        self._grant_reservations()

    def fail_step(self, plan: StepPlan, reason: str, now_s: float) -> None:
        """The step broke: each of its sequences fails, the others go on."""
        for part in plan.slices:
            self._fail(part.sequence.key, FailureCode.INTERNAL, reason, now_s)
        self._grant_reservations()

    def check_invariants(self) -> None:
        """Every block has one owner, every sequence one place."""
        self.pool.check_invariants()
        self._incoming.check_invariants()
        in_use = [block_id for sequence in self._running.values() for block_id in sequence.block_table]
        # While a sequence is prefilled its blocks are its own; its transfer only knows them.
        leased = [block_id for block_id in self._outgoing.block_ids() if block_id not in in_use]
        leased += self._incoming.leased_block_ids()
        self.pool.check_owners(in_use=in_use, leased=leased)
        assert len(self._running) + self._incoming.num_held <= self._config.max_running_sequences
        for sequence in self._sequences.values():
            is_running = sequence.state in (SequenceState.PREFILL, SequenceState.DECODE)
            assert (sequence.key in self._running) == is_running, sequence
            assert (sequence in self._waiting) == (sequence.state is SequenceState.WAITING), sequence
        states = [sequence.state for sequence in self._sequences.values()]
        assert self.num_waiting == sum(
            s in (SequenceState.WAITING, SequenceState.AWAITING_KV) for s in states
        )
        assert self._running.keys() <= self._sequences.keys()
        deadlines_s = [sequence.deadline_s for sequence in self._sequences.values()]
        assert self._next_expiry_s <= min([*deadlines_s, self._incoming.next_expiry_s()])

    # Requests.

    def _submit(self, submit: Submit, now_s: float) -> None:
        refusal = self._refusal(submit)
        if refusal is not None:
            self._outputs.append(RequestFailed(submit.key, *refusal))
            return
        sequence = Sequence.from_submit(submit, now_s)
        self._sequences[submit.key] = sequence
        self._expire_by(sequence.deadline_s)
        if submit.handoff is not None:
            self._by_transfer[submit.handoff.transfer_id] = sequence
        if sequence.state is SequenceState.WAITING:
            self._waiting.append(sequence)
            return
        self._num_awaiting_kv += 1
        assert submit.handoff is not None
        arrived = self._incoming.claim(submit.handoff.transfer_id)
        if arrived is not None:
            self._begin_decode(sequence, arrived, now_s)

    def _refusal(self, submit: Submit) -> tuple[FailureCode, str] | None:
        if submit.key in self._sequences:
            return FailureCode.INVALID, "this attempt is already running here"
        problem = self._transfer_problem(submit) or reason_to_refuse(
            submit,
            self._phases,
            block_size=self._config.block_size,
            num_blocks=self.pool.num_blocks,
            max_context_tokens=self._max_context_tokens,
        )
        if problem is not None:
            return problem
        if self.num_waiting >= self._config.max_waiting_requests:
            return FailureCode.OVERLOADED, f"{self.num_waiting} requests are waiting already"
        return None

    def _transfer_problem(self, submit: Submit) -> tuple[FailureCode, str] | None:
        if submit.handoff is None:
            return None
        transfer_id = submit.handoff.transfer_id
        is_in_use = transfer_id in self._by_transfer or self._outgoing.holds(transfer_id)
        # KV that comes in may be here before its request; all else would be a second use.
        if is_in_use or (Phase.PREFILL in submit.phases and self._incoming.knows(transfer_id)):
            return FailureCode.INVALID, f"transfer {transfer_id} is in use here"
        if Phase.DECODE in submit.phases and self._incoming.is_given_up(transfer_id):
            return FailureCode.TRANSFER, "its KV is not kept any more: the request came too late for it"
        return None

    def _admit(self, sequence: Sequence, now_s: float) -> None:
        sequence.block_table = self.pool.allocate(
            blocks_needed(sequence.max_tokens_here, self._config.block_size)
        )
        sequence.prefill_started_s = now_s
        sequence.move_to(SequenceState.PREFILL)
        self._running[sequence.key] = sequence
        self._outputs.append(PrefillStarted(sequence.key, now_s - sequence.arrived_s))
        if sequence.is_handed_off:
            self._outputs.append(self._outgoing.start(sequence, now_s))

    def _advance(self, sequence: Sequence, token_id: int, now_s: float) -> None:
        """A token was sampled: report it, and move the sequence on."""
        if sequence.state is SequenceState.FINISHED:
            return
        if token_id == NO_TOKEN:
            reason = "the model computed no usable logits for its next token"
            self._fail(sequence.key, FailureCode.INTERNAL, reason, now_s)
            return
        was_prefill = sequence.state is SequenceState.PREFILL
        position = len(sequence.token_ids)
        finish_reason = sequence.append(token_id)
        prefill_s = now_s - sequence.prefill_started_s if was_prefill else None
        self._outputs.append(TokensGenerated(sequence.key, (token_id,), position, finish_reason, prefill_s))
        if finish_reason is not None:
            self._drop(sequence.key, now_s, reason="finished with its first token")
        elif was_prefill and sequence.handoff is not None:
            del self._running[sequence.key]
            self._leave_blocks_to_transfer(sequence)
            sequence.move_to(SequenceState.HANDOFF)
            self._outputs.append(FinishTransfer(sequence.handoff.transfer_id, (token_id,)))
        elif was_prefill:
            sequence.move_to(SequenceState.DECODE)

    def _fail(self, key: RequestKey, code: FailureCode, reason: str, now_s: float) -> None:
        if self._drop(key, now_s, reason=reason):
            self._outputs.append(RequestFailed(key, code, reason))

    def _drop(self, key: RequestKey, now_s: float, *, reason: str) -> bool:
        """Forget a sequence and what it holds; False when it is not here (any more)."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        state = sequence.state
        sequence.move_to(SequenceState.FINISHED)
        self._running.pop(key, None)
        if state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.block_table:
            if sequence.is_handed_off:
                self._leave_blocks_to_transfer(sequence)
            else:
                self.pool.free(sequence.block_table)
        if sequence.handoff is not None:
            transfer_id = sequence.handoff.transfer_id
            del self._by_transfer[transfer_id]
            if self._outgoing.holds(transfer_id) or state is SequenceState.AWAITING_KV:
                self._outputs.append(EndTransfer(transfer_id, reason))
            if state is SequenceState.AWAITING_KV:
                self._num_awaiting_kv -= 1
                self._outputs.extend(self._incoming.give_up(transfer_id, now_s))
                self._expire_by(now_s + self._claim_s)
        return True

    def _leave_blocks_to_transfer(self, sequence: Sequence) -> None:
        """The transfer may still read them; ReleaseTransfer returns them."""
        self.pool.hand_over(sequence.block_table)
        sequence.block_table = []

    def _expire_by(self, time_s: float) -> None:
        self._next_expiry_s = min(self._next_expiry_s, time_s)

    # Transfers.

    def _reserve(self, request: ReserveBlocks, now_s: float) -> None:
        sequence = self._by_transfer.get(request.transfer_id)
        is_in_use = sequence is not None and sequence.state is not SequenceState.AWAITING_KV
        is_in_use |= self._outgoing.holds(request.transfer_id)
        refused = self._incoming.reserve(request, now_s, is_in_use=is_in_use)
        if refused is not None:
            self._outputs.append(refused)
        else:
            self._expire_by(request.deadline_s)

    def _grant_reservations(self) -> None:
        """Answer the oldest reservations while blocks and places in the batch last."""
        num_held = len(self._running) + self._incoming.num_held
        self._outputs.extend(self._incoming.grant(self._config.max_running_sequences - num_held))

    def _commit(self, commit: CommitTransfer, now_s: float) -> None:
        arrived = self._incoming.commit(commit)
        if arrived is None:
            return
        sequence = self._by_transfer.get(commit.transfer_id)
        if sequence is not None:
            self._begin_decode(sequence, arrived, now_s)
        elif self._incoming.is_given_up(commit.transfer_id):
            self.pool.release(arrived.block_ids)
        else:
            self._incoming.leave_unclaimed(arrived, now_s)
            self._expire_by(now_s + self._claim_s)

    def _begin_decode(self, sequence: Sequence, arrived: ArrivedKv, now_s: float) -> None:
        problem = misfit(sequence, arrived, self._config.block_size)
        if problem is not None:
            self.pool.release(arrived.block_ids)
            self._fail(sequence.key, FailureCode.INTERNAL, problem, now_s)
            return
        self.pool.adopt(arrived.block_ids)
        sequence.block_table = list(arrived.block_ids)
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        sequence.token_ids.extend(arrived.token_ids)
        sequence.move_to(SequenceState.DECODE)
        self._num_awaiting_kv -= 1
        self._running[sequence.key] = sequence

    def _release(self, release: ReleaseTransfer, now_s: float) -> None:
        """A transfer that is not known, or was released before, changes nothing."""
        if self._incoming.release(release.transfer_id):
            return
        block_ids = self._outgoing.release(release.transfer_id)
        if block_ids is None:
            return
        assert block_ids == tuple(release.block_ids), release
        sequence = self._by_transfer.get(release.transfer_id)
        if sequence is not None and sequence.state is SequenceState.PREFILL:
            # The transfer ended before prefill did, so the request cannot be decoded where it should.
            self._fail(sequence.key, FailureCode.TRANSFER, release.reason, now_s)
        self.pool.release(block_ids)

    def _transfer_ended(self, ended: TransferSent | TransferFailed, now_s: float) -> None:
        sequence = self._by_transfer.get(ended.transfer_id)
        if sequence is None:
            return
        if isinstance(ended, TransferFailed):
            self._fail(sequence.key, FailureCode.TRANSFER, ended.reason, now_s)
            return
        measured = ended.num_bytes, ended.num_chunks, ended.transfer_s, ended.exposed_s
        self._outputs.append(KvTransferred(sequence.key, *measured))
        self._drop(sequence.key, now_s, reason="handed off")
