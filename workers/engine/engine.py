"""The engine's state and every change to it: messages in, outputs out. Pure.

Blocks that a transfer knows come back only by the transfer's word (CommitTransfer or ReleaseTransfer): a
late chunk can then never meet a block's next owner.
"""

import math
from collections.abc import Callable
from typing import assert_never

from kvtransfer.layout import blocks_needed
from workers.api import (
    Abort,
    BlockCounts,
    EngineConfig,
    FailureCode,
    KvLedger,
    KvReuseCounts,
    Migrate,
    Phase,
    PhaseSet,
    PhaseWork,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    Submit,
    SubscribeKvEvents,
    SuperposedDecoding,
)
from workers.block_hash import root_hash
from workers.engine.admission import phase_names, reason_to_refuse
from workers.engine.batch import Batch
from workers.engine.block_pool import BlockPool
from workers.engine.completion import Completion
from workers.engine.drafting import Drafting
from workers.engine.fetching import PrefixFetching
from workers.engine.host_tier import HostTier, HostTierCounts, Packer
from workers.engine.image_needs import ImageNeeds
from workers.engine.incoming import ArrivedKv, IncomingKv, is_approximate, misfit
from workers.engine.ledger import build_ledger
from workers.engine.lookahead import Lookahead
from workers.engine.messages import (
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FindCached,
    FinishTransfer,
    ImageReady,
    ImagesGranted,
    ImagesLost,
    KvReady,
    Message,
    Output,
    PrefixFetched,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    TransferFailed,
    TransferSent,
)
from workers.engine.migration import Migrations, can_migrate
from workers.engine.outgoing import OutgoingKv, kv_ready
from workers.engine.pacing import LayerPacing
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import NO_ROW, Sequence, SequenceState
from workers.engine.sharing import Load
from workers.engine.span_reuse.span_index import SpanIndex
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.latency_model import LatencyModel
from workers.step_choice import Head

#: States in which a sequence neither waits for a step nor takes part in them.
_ELSEWHERE = (SequenceState.HANDOFF, SequenceState.AWAITING_KV, SequenceState.FETCHING)


def plain_root(submit: Submit) -> bytes:
    """For a model whose KV depends on the tokens alone, when there is no other."""
    return root_hash("", "", submit.cache_salt)


class Engine:
    """All decisions of one worker, for any set of phases.

    max_context_tokens: the model's limit. claim_s: see IncomingKv, in seconds. attention_tokens: see
    Scheduler. root_of: the hash that a request's first block is chained to; see block_hash. punctuation: tokens
    that end a branch of cautious decoding. packer: reads the KV cache, for evicted blocks that are kept in host
    memory; None keeps none. pacing: after how many layers KV that is handed off leaves; None: when all are computed.
    latency: predicts steps, and is told of them by others; see Scheduler.
    """

    def __init__(
        self,
        config: EngineConfig,
        phases: PhaseSet,
        *,
        num_blocks: int,
        max_context_tokens: int,
        claim_s: float,
        attention_tokens: float = math.inf,
        root_of: Callable[[Submit], bytes] = plain_root,
        punctuation: frozenset[int] = frozenset(),
        packer: Packer | None = None,
        pacing: LayerPacing | None = None,
        latency: LatencyModel | None = None,
    ) -> None:
        # Less would never let a prompt's first block in.
        assert config.token_budget >= config.block_size, config
        tier = HostTier(packer, config.host_cache_bytes) if packer is not None else None
        spans = None
        if config.span_reuse is not None and config.is_prefix_cache_on:
            spans = SpanIndex(config.block_size)
        self.pool = BlockPool(num_blocks, config.block_size, tier, spans)
        #: Sequences that were preempted so far.
        self.num_preemptions = 0
        self._config = config
        self._phases = phases
        #: From the last change of phases to the first step in a phase that was new then, in seconds; None until that.
        self.first_step_s: float | None = None
        #: Phases that were new then and have not been served yet.
        self._gained: PhaseSet = frozenset()
        self._phases_since_s = 0.0
        self._max_context_tokens = max_context_tokens
        self._root_of = root_of
        max_blocks = min(num_blocks, blocks_needed(max_context_tokens, config.block_size))
        self._batch = Batch(config, self.pool, max_blocks)
        self._scheduler = Scheduler(config, self._batch, attention_tokens=attention_tokens, latency=latency)
        self._sequences: dict[RequestKey, Sequence] = {}
        self._num_arrived = 0
        #: Those whose state is AWAITING_KV, and FETCHING.
        self._num_awaiting_kv = 0
        self._num_fetching = 0
        #: Those that are to be decoded here, wherever they are before that.
        self._num_to_decode = 0
        #: Those that keep steps from running beside each other.
        self._num_unsplit = 0
        self._by_transfer: dict[str, Sequence] = {}
        self._outgoing = OutgoingKv()
        self._fetching = PrefixFetching(self.pool)
        self._pacing = pacing
        self._incoming = IncomingKv(
            self.pool,
            phases,
            max_blocks=max_blocks,
            max_waiting=config.max_waiting_requests,
            claim_s=claim_s,
        )
        #: `expire` has nothing to do before this. Too early after what it stood for has ended.
        self._next_expiry_s = math.inf
        self._claim_s = claim_s
        self._outputs: list[Output] = []
        self._drafting = Drafting()
        self._image_needs = ImageNeeds(self._batch, self._outputs)
        self._completion = Completion(
            self._batch,
            self._outputs,
            self._image_needs,
            punctuation,
            attention_tokens=attention_tokens,
            send_late=self._send_late,
        )
        self._migrations = Migrations()
        #: Of the model, as the runner tells of them.
        self._num_layers = pacing.num_layers if pacing is not None else 0
        self._lookahead = Lookahead(self._batch)

    # What others ask.

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun here, or begin again: they wait for prefill, or for their KV."""
        return len(self._batch.waiting) + self._num_awaiting_kv + self._num_fetching

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps; branches are counted with the one that they belong to."""
        return self._batch.num_running

    @property
    def num_leases(self) -> int:
        """Transfers that hold blocks, sending and receiving, and KV that nobody has claimed yet."""
        return self._outgoing.num_held + self._incoming.num_held + self._fetching.num_held

    def work(self) -> PhaseWork:
        """Requests that still need prefill or decode here. KV that is being sent needs neither."""
        batch = self._batch
        num_unasked = sum(name not in self._by_transfer for name in self._incoming.transfer_ids())
        return PhaseWork(
            num_prefills=len(batch.waiting) + len(batch.prefills) + self._num_fetching,
            num_decodes=self._num_to_decode + num_unasked,
            prefill_tokens=sum(one.num_uncomputed_tokens for one in (*batch.waiting, *batch.prefills)),
            num_decoding=len(batch.decodes),
            decode_context=sum(one.num_computed_tokens for one in batch.decodes),
        )

    def room_tokens(self) -> int:
        """That a sequence may have which is begun now; takes time with the number of those that run.

        What is kept for these is not in it. 0 while all places are taken, and while KV on its way waits for blocks, which prompts do not pass.
        """
        batch = self._batch
        num_places = self._config.max_running_sequences - batch.num_places - self._incoming.num_held
        if num_places < 1 or self._incoming.is_waited_for:
            return 0
        return max(0, self.pool.num_available - batch.num_reserved_blocks()) * self.pool.block_size

    def set_phases(self, phases: PhaseSet, now_s: float) -> str | None:
        """Serve these from now on; why not, when a request here needs one that would go."""
        num_left = self.work().of(self._phases - phases)
        if num_left > 0:
            return f"{num_left} requests here still need {phase_names(self._phases - phases)}"
        self._gained, self._phases_since_s, self.first_step_s = phases - self._phases, now_s, None
        self._phases = self._incoming.phases = phases
        return None

    def block_counts(self) -> BlockCounts:
        """Free, cached, in use, leased."""
        return self.pool.counts()

    def ledger(self, now_s: float) -> KvLedger:
        """Who holds which blocks. Between two steps; takes time with the size of the pool."""
        transfers = (*self._outgoing.holders(), *self._incoming.holders(), *self._fetching.holders())
        holders = (*self._batch.holders(), *transfers)
        return build_ledger(holders, self.pool, now_s)

    @property
    def num_wrong_prefixes(self) -> int:
        """Fetched prefixes that were of other tokens than were asked for."""
        return self._fetching.num_digest_mismatches

    def host_tier_counts(self) -> HostTierCounts:
        """Evicted blocks that are kept in host memory."""
        return self.pool.host_tier_counts()

    def reuse_counts(self) -> KvReuseCounts:
        """KV that was not computed again; what was fetched is told by `KvFetching`."""
        tier = self.pool.host_tier_counts()
        return KvReuseCounts(
            num_cached_tokens=self._completion.num_cached_tokens,
            num_reused_tokens=self._completion.num_reused_tokens,
            num_host_blocks=tier.num_entries,
            num_host_bytes=tier.num_bytes,
            num_host_saved=tier.num_saved,
            num_host_hits=tier.num_hits,
            num_host_dropped=tier.num_dropped,
            num_host_corrupt=tier.num_corrupt,
        )

    def count_cached(self, block_hashes: tuple[bytes, ...]) -> tuple[int, int]:
        """Blocks of this chain, from the first on, that another worker would get; how many of them are in host memory."""
        return self.pool.count_exact(block_hashes)

    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called again at the latest; None while nothing can expire."""
        return self._next_expiry_s if self._next_expiry_s < math.inf else None

    def take_outputs(self) -> list[Output]:
        """What has come out since the last call, in order."""
        outputs = self._outputs.copy()
        self._outputs.clear()
        outputs += self.pool.take_events()
        return outputs

    # Messages.

    def handle(self, message: Message, now_s: float) -> None:
        """Apply one message."""
        match message:
            case Submit():
                self._submit(message, now_s)
            case Abort():
                self._drop(message.key, now_s, reason="aborted")
            case Migrate():
                self._migrate(message, now_s)
            case SubscribeKvEvents():
                self.pool.watch()
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
            case FindCached():
                self._find_cached(message, now_s)
            case PrefixFetched():
                self._prefix_fetched(message, now_s)
            case ImagesGranted() | ImageReady():
                self._image_news(message)
            case ImagesLost():
                self._fail(message.key, message.code, message.reason, now_s)
            case _:
                assert_never(message)
        self._grant_reservations(now_s)

    def expire(self, now_s: float) -> None:
        """Fail what is past its deadline. Costs nothing before the first one."""
        if now_s < self._next_expiry_s:
            return
        for key in [key for key, sequence in self._sequences.items() if sequence.deadline_s <= now_s]:
            self._fail(key, FailureCode.DEADLINE, "the request's deadline passed", now_s)
        self._outputs.extend(self._incoming.expire(now_s))
        deadlines_s = [sequence.deadline_s for sequence in self._sequences.values()]
        self._next_expiry_s = min([*deadlines_s, self._incoming.next_expiry_s()])
        self._grant_reservations(now_s)

    # Steps.

    def schedule(self, now_s: float, phase: Phase | None = None) -> StepPlan | None:
        """Plan a step, with blocks and places for it; None when there is nothing to compute.

        A plan is followed by `complete` or `fail_step` before the next, but for what `assume` allows, and for a phase: with PREFILL or
        DECODE the step is of prompts or of decodes alone, and one of each may run at the same time, while `may_split`. Decodes that are
        `is_short_of_blocks` wait until nothing runs.
        """
        batch = self._batch
        if batch.is_empty:
            return None
        batch.is_split = phase is not None
        plan = self._scheduler.plan(
            now_s,
            may_preempt=not (self._lookahead.is_on or batch.flights),
            num_places=self._config.max_running_sequences - self._incoming.num_held,
            # A prompt takes no blocks before KV on its way that asked earlier, or large KV would wait for ever.
            arrived_until_s=self._incoming.waits_since_s,
            phase=phase,
        )
        for sequence in plan.preempted:
            self.num_preemptions += 1
            self._completion.forget(sequence)
            self._image_needs.ask(sequence)
        for sequence, num_known in plan.imageless:
            self._image_needs.ask(sequence, num_known)
        for sequence in plan.admitted:
            self._begin_prefill(sequence, now_s)
        plan.drafts = self._drafting.propose(
            plan.decodes, self._batch, num_rows=plan.num_tokens, num_waiting=self.num_waiting
        )
        # Decodes fill no block that is told of before.
        plan.began_s, plan.pending = now_s, self.pool.index.pending if phase is not Phase.DECODE else ()
        if self._gained:
            self._note_first_step(plan, now_s)
        num_leaving = sum(part.end - part.start for part in plan.chunks if part.sequence.is_handed_off)
        if self._pacing is not None and num_leaving > 0:
            plan.layer_group_size = self._pacing.group_size(num_leaving)
        if not plan.decodes and not plan.chunks:
            return None
        if phase is not None:
            sequences = (*plan.decodes, *(part.sequence for part in plan.chunks), *plan.admitted)
            plan.flight = batch.flights.open(sequences, batch.sources, now_s)
            batch.sources = []
        return plan

    @property
    def may_split(self) -> bool:
        """Steps of the two phases may run beside each other: nobody is here for whom that cannot be, and nothing is left to be copied."""
        batch = self._batch
        is_whole = self._num_unsplit or self._config.span_reuse is not None
        return not (is_whole or batch.branched or batch.copies or batch.restores)

    @property
    def is_short_of_blocks(self) -> bool:
        """The next step of the decodes may need blocks of others."""
        return self._batch.num_blocks_for_decodes() > self.pool.num_available

    def load(self) -> Load:
        """What the next step is chosen by. Its head is the prompt that is computed, or waits, the longest."""
        batch = self._batch
        prompts = (one for one in batch.prefills if one.num_uncomputed_tokens > 0)
        first = next(prompts, batch.waiting[0] if batch.waiting else None)
        head = Head(0, 0, 0, math.inf, math.inf)
        if first is not None:
            num_left, num_done = first.num_uncomputed_tokens, first.num_computed_tokens
            head = Head(0, num_left, num_done, first.first_token_by_s, math.inf)
        return Load(self.work(), self.block_counts(), head, self._scheduler.planned_s)

    def assume(self, running: StepPlan) -> bool:
        """Until `take_back`, plan as if this step, which runs, had been completed and all its sequences went on.

        Between the two only one `schedule` may come, and what makes its plan into inputs. False: nothing is assumed.
        """
        return self._lookahead.assume(running)

    def take_back(self) -> None:
        """See assume."""
        self._lookahead.take_back()

    def _note_first_step(self, plan: StepPlan, now_s: float) -> None:
        served = {Phase.PREFILL} if plan.chunks else set()
        served |= {Phase.DECODE} if plan.decodes else set()
        if served & self._gained:
            self.first_step_s = now_s - self._phases_since_s
            self._gained = frozenset()

    def kv_ready(self, plan: StepPlan, layer_lo: int, layer_hi: int) -> list[KvReady]:
        """What can be sent once these layers of the step are computed."""
        self._num_layers = max(self._num_layers, layer_hi)
        return kv_ready(plan, layer_lo, layer_hi)

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        """The step has run. A sequence whose token is NO_TOKEN fails."""
        if plan.flight is not None:
            self._batch.flights.land(plan.flight)
        step_s = now_s - plan.began_s
        self._scheduler.observe(plan, step_s)
        if self._pacing is not None and plan.num_tokens > 2 * len(plan.decodes):
            self._pacing.observe_step(plan.num_tokens, step_s)
        if not plan.chunks:
            num_drafts = sum(tree.num_drafts for tree in plan.drafts.values())
            self._drafting.observe(len(plan.decodes) + num_drafts, step_s)
        for ended in self._completion.apply(plan, result, now_s):
            if ended.code is None:
                self._drop(ended.sequence.key, now_s, reason=ended.reason)
            else:
                self._fail(ended.sequence.key, ended.code, ended.reason, now_s)
        for migrate in self._migrations.asked() if self._migrations else ():
            self._leave_if_possible(migrate, now_s)
        self._grant_reservations(now_s)

    def num_plain_steps(self, plan: StepPlan) -> int:
        """How many steps with the decodes of this plan, which is the first, do no more than give a token to each and take blocks for them.

        As long as no message comes, nothing expires and there are blocks: none of them ends, nobody begins, nothing is said
        but the tokens. 0 where stop tokens, drafts or branches cannot be foreseen.
        """
        batch = self._batch
        is_plain = not (
            plan.chunks
            or plan.drafts
            or plan.copies
            or plan.restores
            or plan.preempted
            or batch.waiting
            or batch.prefills
            or batch.branched
            or self._migrations
            or self._incoming.is_waited_for
        )
        if not is_plain or not all(one.is_plain for one in plan.decodes):
            return 0
        return min(one.max_tokens - len(one.token_ids) - 1 for one in plan.decodes)

    def go_on(self, plan: StepPlan) -> int:
        """The same after one of those steps, when messages have come and their blocks are not taken yet: takes them if all goes on as
        before. 0: it does not, nothing is taken, and what comes next is to be planned.
        """
        batch = self._batch
        num_steps = self.num_plain_steps(plan) if batch.decodes == plan.decodes else 0
        needy = [one for one in batch.decodes if len(one.token_ids) > one.capacity]
        if num_steps < 1 or len(needy) > self.pool.num_available:
            return 0
        self.make_room(needy)
        return num_steps

    def extend(self, sequence: Sequence, token_ids: list[int]) -> None:
        """What some of the steps that `num_plain_steps` counts have yielded for one of their sequences."""
        sequence.token_ids += token_ids
        sequence.num_computed_tokens = num_computed = len(sequence.token_ids) - 1
        if num_computed // self.pool.block_size > sequence.num_stored_blocks:
            self._batch.store_blocks(sequence, num_computed, is_pending=False)

    def make_room(self, sequences: list[Sequence]) -> None:
        """Blocks for the next of those steps, of which there are enough, for sequences that have filled theirs."""
        if len(sequences) > 1:
            sequences.sort(key=lambda one: one.rank)
        for sequence in sequences:
            self._batch.grow(sequence, len(sequence.token_ids))

    def fail_step(self, plan: StepPlan, reason: str, now_s: float) -> None:
        """The step broke: each of its sequences fails, the others go on.

        Those that began with it fail too, with or without a chunk: copies that were to be made for them, and blocks
        of others that it was to compute, hold nothing.
        """
        if plan.flight is not None:
            self._batch.flights.land(plan.flight)
        begun = [one for one in plan.admitted if one.state is not SequenceState.WAITING]
        for sequence in (*(part.sequence for part in plan.slices), *begun):
            self._fail(sequence.key, FailureCode.INTERNAL, reason, now_s)
        if plan.chunks or plan.admitted:
            self.pool.forget_pending()
        self._batch.end_step()
        self._grant_reservations(now_s)

    def check_invariants(self) -> None:
        """Every block has its holders, every sequence one place."""
        self.pool.check_invariants()
        self._incoming.check_invariants()
        self._batch.check_invariants()
        in_use = [block_id for sequence in self._batch.running() for block_id in sequence.block_table]
        leased = self._outgoing.block_ids() + self._incoming.leased_block_ids()
        in_use += self._batch.sources + self._batch.flights.block_ids()
        self.pool.check_owners(in_use=in_use, leased=leased + self._fetching.leased_block_ids())
        listed = {one for one in (*self._batch.running(), *self._batch.waiting) if one.parent is None}
        assert all(self._sequences[sequence.key] is sequence for sequence in listed)
        for sequence in self._sequences.values():
            is_elsewhere = sequence.state in _ELSEWHERE
            assert (sequence in listed) != is_elsewhere, sequence
        states = [sequence.state for sequence in self._sequences.values()]
        assert self.num_waiting == sum(
            s in (SequenceState.WAITING, SequenceState.FETCHING, SequenceState.AWAITING_KV) for s in states
        )
        assert self._num_to_decode == sum(map(_is_to_decode, self._sequences.values()))
        assert self._num_unsplit == sum(not one.may_split for one in self._sequences.values())
        deadlines_s = [sequence.deadline_s for sequence in self._sequences.values()]
        assert self._next_expiry_s <= min([*deadlines_s, self._incoming.next_expiry_s()])

    # Requests.

    def _submit(self, submit: Submit, now_s: float) -> None:
        refusal = self._refusal(submit)
        if refusal is not None:
            self._outputs.append(RequestFailed(submit.key, *refusal))
            return
        self._num_arrived += 1
        sequence = Sequence.from_submit(submit, now_s, root=self._root_of(submit), number=self._num_arrived)
        self._sequences[submit.key] = sequence
        self._num_to_decode += Phase.DECODE in submit.phases
        self._num_unsplit += not sequence.may_split
        self._drafting.begin(sequence, submit.cache_salt)
        self._expire_by(sequence.deadline_s)
        if submit.handoff is not None:
            self._by_transfer[submit.handoff.transfer_id] = sequence
        if sequence.state is SequenceState.WAITING:
            if not self._fetch_prefix(sequence, now_s):
                self._wait(sequence)
            return
        self._num_awaiting_kv += 1
        assert submit.handoff is not None
        arrived = self._incoming.claim(submit.handoff.transfer_id)
        if arrived is not None:
            self._begin_decode(sequence, arrived, now_s)

    def _fetch_prefix(self, sequence: Sequence, now_s: float) -> bool:
        """Ask other workers for the beginning of its prompt, if that may be worth it; it waits for them then."""
        num_known = self._batch.num_known_blocks(sequence) if sequence.prefix_peers else None
        if num_known is None:
            return False
        wanted = self._fetching.begin(
            sequence,
            num_known=num_known,
            prefill_tokens_per_s=self._scheduler.prefill_tokens_per_s,
            now_s=now_s,
        )
        if wanted is None:
            return False
        sequence.state = SequenceState.FETCHING
        self._num_fetching += 1
        self._outputs.append(wanted)
        return True

    def _find_cached(self, wanted: FindCached, now_s: float) -> None:
        name = wanted.transfer_id
        if self._is_transfer_known(name):
            # Another worker chose it: its blocks must not be taken for those of a hand-off.
            self._outputs.append(ReservationRefused(name, "this transfer id is in use here already", False))
        else:
            batch = self._batch
            # A block that is still to be copied may be free: nothing is put into any before that.
            num_kept = self.pool.num_blocks if batch.copies else batch.num_reserved_blocks()
            self._outputs.append(self._fetching.find(wanted, num_kept=num_kept, now_s=now_s))

    def _prefix_fetched(self, fetched: PrefixFetched, now_s: float) -> None:
        """Its prompt waits for prefill like any other, whatever has come."""
        ended = self._fetching.end(fetched.transfer_id)
        sequence = self._sequences.get(ended.key) if ended is not None else None
        if ended is not None and sequence is not None and sequence.state is SequenceState.FETCHING:
            sequence.num_fetched_tokens = fetched.num_tokens
            sequence.prefix_fetch_s = now_s - ended.since_s
            self._num_fetching -= 1
            sequence.move_to(SequenceState.WAITING)
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """It waits for its prefill, and for embeddings of what the prefix cache does not have."""
        self._batch.wait(sequence)
        self._image_needs.ask(sequence)

    def _image_news(self, news: ImagesGranted | ImageReady) -> None:
        sequence = self._sequences.get(news.key)
        if sequence is None or sequence.images is None:
            return
        if isinstance(news, ImageReady):
            self._image_needs.arrived(sequence, news)
        else:
            sequence.images.granted(news.asking)

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

    def _begin_prefill(self, sequence: Sequence, now_s: float) -> None:
        """It was admitted, for the first time or again."""
        sequence.holds_since_s = now_s
        if sequence.prefill_started_s is not None:
            return
        sequence.prefill_started_s = now_s
        self._outputs.append(PrefillStarted(sequence.key, now_s - sequence.arrived_s, sequence.order_reason))
        if sequence.is_handed_off and sequence.reduction is None:
            self._start_transfer(sequence, now_s)

    def _start_transfer(self, sequence: Sequence, now_s: float) -> None:
        self.pool.hold(sequence.block_table)
        self._outputs.append(self._outgoing.start(sequence, now_s))

    def _send_late(self, sequence: Sequence, now_s: float) -> None:
        """Hand off a prompt all of which has been computed."""
        self._start_transfer(sequence, now_s)
        assert sequence.handoff is not None
        transfer_id = sequence.handoff.transfer_id
        self._outputs.append(KvReady(transfer_id, 0, self._num_layers, 0, sequence.num_prompt_tokens))

    def _fail(self, key: RequestKey, code: FailureCode, reason: str, now_s: float) -> None:
        if self._drop(key, now_s, reason=reason):
            self._outputs.append(RequestFailed(key, code, reason))

    def _drop(self, key: RequestKey, now_s: float, *, reason: str) -> bool:
        """Forget a sequence and what it holds; False when it is not here (any more)."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        state = sequence.state
        self._completion.forget(sequence)
        self._drafting.forget(sequence)
        self._migrations.forget(key)
        self._num_to_decode -= _is_to_decode(sequence)
        self._num_unsplit -= not sequence.may_split
        if state is SequenceState.WAITING:
            self._batch.waiting.remove(sequence)
        elif state is SequenceState.FETCHING:
            self._num_fetching -= 1
            prefix_transfer = self._fetching.transfer_of(key)
            assert prefix_transfer is not None
            self._outputs.append(EndTransfer(prefix_transfer, reason))
        elif sequence.row != NO_ROW:
            self._batch.leave(sequence)
        sequence.move_to(SequenceState.FINISHED)
        self._image_needs.release(sequence)
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

    # Sequences that go on elsewhere.

    def _migrate(self, migrate: Migrate, now_s: float) -> None:
        if migrate.key in self._sequences:
            self._migrations.ask(migrate)
            self._leave_if_possible(migrate, now_s)

    def _leave_if_possible(self, migrate: Migrate, now_s: float) -> None:
        """Between two steps: its KV is whole, and its transfer holds its blocks when it leaves the batch."""
        sequence = self._sequences[migrate.key]
        if not can_migrate(sequence):
            return
        self._migrations.forget(migrate.key)
        num_known = migrate.num_known_tokens
        problem = self._migration_problem(sequence, migrate)
        if problem is not None:
            self._fail(migrate.key, FailureCode.INVALID, problem, now_s)
            return
        if sequence.handoff is not None:
            del self._by_transfer[sequence.handoff.transfer_id]
        sequence.handoff = migrate.handoff
        transfer_id = migrate.handoff.transfer_id
        self._by_transfer[transfer_id] = sequence
        block_size = self._config.block_size
        num_blocks = blocks_needed(sequence.num_computed_tokens, block_size)
        block_ids = tuple(sequence.block_table[:num_blocks])
        self.pool.hold(block_ids)
        self._outputs.append(self._outgoing.migrate(sequence, block_ids, num_known, now_s))
        self._outputs.append(KvReady(transfer_id, 0, self._num_layers, 0, sequence.num_computed_tokens))
        new = sequence.token_ids[num_known - sequence.num_dropped_tokens :]
        self._batch.leave(sequence)
        self._num_to_decode -= 1
        sequence.move_to(SequenceState.HANDOFF)
        self._outputs.append(FinishTransfer(transfer_id, tuple(new)))

    def _migration_problem(self, sequence: Sequence, migrate: Migrate) -> str | None:
        if self._is_transfer_known(migrate.handoff.transfer_id):
            return f"transfer {migrate.handoff.transfer_id} is in use here"
        num_dropped = sequence.num_dropped_tokens
        lowest, highest = sequence.num_prompt_tokens + num_dropped, len(sequence.token_ids) + num_dropped
        if not lowest <= migrate.num_known_tokens <= highest:
            return f"num_known_tokens: is {migrate.num_known_tokens}; allowed: {lowest} to {highest}"
        return None

    def _is_transfer_known(self, transfer_id: str) -> bool:
        return (
            transfer_id in self._by_transfer
            or self._outgoing.holds(transfer_id)
            or self._incoming.knows(transfer_id)
        )

    def _expire_by(self, time_s: float) -> None:
        self._next_expiry_s = min(self._next_expiry_s, time_s)

    # Transfers.

    def _reserve(self, request: ReserveBlocks, now_s: float) -> None:
        sequence = self._by_transfer.get(request.transfer_id)
        is_in_use = sequence is not None and sequence.state is not SequenceState.AWAITING_KV
        is_in_use |= self._outgoing.holds(request.transfer_id)
        prefix = self._fetching.reserve(request, num_kept=self._batch.num_reserved_blocks())
        if prefix is not None:
            self._outputs.append(prefix)
            return
        refused = self._incoming.reserve(request, now_s, is_in_use=is_in_use)
        if refused is not None:
            self._outputs.append(refused)
        else:
            self._expire_by(request.deadline_s)

    def _grant_reservations(self, now_s: float) -> None:
        """Answer the oldest reservations while blocks and places in the batch last."""
        if not self._incoming.is_waited_for:
            return
        num_places = self._config.max_running_sequences - self._batch.num_places - self._incoming.num_held
        num_kept = self._batch.num_reserved_blocks()
        self._outputs.extend(self._incoming.grant(num_places, num_kept=num_kept, now_s=now_s))

    def _commit(self, commit: CommitTransfer, now_s: float) -> None:
        if self._fetching.commit(commit):
            return
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
        self._num_awaiting_kv -= 1
        sequence.holds_since_s = arrived.since_s
        num_dropped = sequence.num_prompt_tokens - (arrived.num_tokens + 1 - len(arrived.token_ids))
        if sequence.images is not None and num_dropped > 0:
            # Which of them have left does not matter: they are all alike, and their KV is here.
            sequence.drop_tokens(sequence.images.first_places(num_dropped))
        sequence.num_computed_tokens = arrived.num_tokens
        if is_approximate(sequence, arrived):
            # Nothing of it is stored for others.
            sequence.num_exact_tokens = 0
        if isinstance(sequence.sampling.decoding, SuperposedDecoding):
            # It needs the likeliest first tokens, not the one that prefill drew: the last row is computed again.
            sequence.move_to(SequenceState.PREFILL)
            self._batch.enter(sequence, arrived.block_ids)
            self._batch.truncate(
                sequence, sequence.num_prompt_tokens, num_computed=sequence.num_prompt_tokens - 1
            )
            return
        sequence.token_ids.extend(arrived.token_ids)
        sequence.move_to(SequenceState.DECODE)
        self._batch.enter(sequence, arrived.block_ids)
        self._batch.store_blocks(sequence, sequence.num_computed_tokens, is_pending=False)

    def _release(self, release: ReleaseTransfer, now_s: float) -> None:
        """A transfer that is not known, or was released before, changes nothing."""
        if self._fetching.release(release.transfer_id) or self._incoming.release(release.transfer_id):
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
        if self._pacing is not None:
            self._pacing.observe_transfer(ended.report)
        self._outputs.append(ended.event(sequence.key))
        self._drop(sequence.key, now_s, reason="handed off")


def _is_to_decode(sequence: Sequence) -> bool:
    """Its next tokens are to be generated here."""
    return Phase.DECODE in sequence.phases and sequence.state is not SequenceState.HANDOFF
