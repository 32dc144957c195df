"""The life of one sample of a request at the gateway: events in, actions out. Pure.

The machine knows which tokens the client has, so a lost worker costs time and not the request: it asks
for a new route, and the next attempt prefills prompt and delivered tokens. Token positions decide what is
delivered: each exactly once and in order, whatever the two workers' streams do.

A request for n samples has n machines, which know nothing of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.control.encode_shards import GIVEN_UP, EncodeShards, ShardFailed
from orchestrator.control.encode_split import Shard
from orchestrator.control.migration import Migration
from orchestrator.control.prompt_images import PromptImages
from orchestrator.control.request_actions import (
    Action,
    Deliver,
    DeliverDrafts,
    DeliverPrompt,
    Fail,
    FailureKind,
    Send,
    WantEncoders,
    WantRoute,
)
from orchestrator.control.router import Route
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.control.view import WorkerView
from workers.api import (
    Abort,
    DecodingReport,
    DraftsGenerated,
    Event,
    FailureCode,
    FinishReason,
    Handoff,
    ImagesEncoded,
    ImagesReduced,
    ImagesWanted,
    KvTransferred,
    Migrate,
    Phase,
    PrefillStarted,
    PromptScored,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    SuperposedDecoding,
    TokenLogprobs,
    TokensGenerated,
    WorkerId,
)

#: Times that a request is given to workers before its failure is the client's.
MAX_ATTEMPTS = 3


class RequestState(StrEnum):
    """Where a request is."""

    #: Not given to a worker (any more): wants a route.
    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    FAILED = "failed"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    # A stop string may be found in what was delivered before a worker was lost.
    RequestState.QUEUED: frozenset({RequestState.PREFILL, RequestState.FINISHED, RequestState.FAILED}),
    RequestState.PREFILL: frozenset(
        {RequestState.DECODE, RequestState.QUEUED, RequestState.FINISHED, RequestState.FAILED}
    ),
    RequestState.DECODE: frozenset({RequestState.QUEUED, RequestState.FINISHED, RequestState.FAILED}),
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
}


_KIND_OF_CODE = {
    FailureCode.INVALID: FailureKind.INVALID,
    FailureCode.OVERLOADED: FailureKind.OVERLOADED,
    FailureCode.DEADLINE: FailureKind.DEADLINE,
    FailureCode.TRANSFER: FailureKind.UNAVAILABLE,
    FailureCode.INTERNAL: FailureKind.UNAVAILABLE,
}


@dataclass(slots=True)
class RequestTimes:
    """What the timings of the answer are made of; all in seconds, `_at_s` on the gateway's clock."""

    arrived_at_s: float
    #: Of the attempt that gave the first token, as are `worker_queue_s` and `prefill_s`.
    submitted_at_s: float | None = None
    first_token_at_s: float | None = None
    second_token_at_s: float | None = None
    last_token_at_s: float | None = None
    #: At the worker, before its first prefill step.
    worker_queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Of the last attempt; None when it had no hand-off, or when the report came after the last token.
    kv_transfer: KvTransferred | None = None
    #: Of the attempt that gave the first token, before it did: the first time that embeddings of pictures were wanted,
    #: and the last time that some had come. None until then.
    images_wanted_at_s: float | None = None
    images_encoded_at_s: float | None = None


@dataclass(slots=True)
class RequestMachine:
    """One sample of a request. Methods are the events; each returns what is to be done now."""

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    times: RequestTimes
    priority: int = 0
    cache_salt: str = ""
    images: PromptImages | None = None
    #: Its targets, and what its tenant is worth: workers are told.
    slo: Slo = NO_SLO
    tenant_weight: float = 1.0
    state: RequestState = RequestState.QUEUED
    #: Number of the present attempt, or of the last one; 0 before the first.
    attempt: int = 0
    num_attempts: int = 0
    route: Route | None = None
    #: Generated tokens that the client has, in order.
    delivered: list[int] = field(default_factory=list)
    #: Workers that an attempt failed at: better not used again while others can do the same.
    avoided: set[WorkerId] = field(default_factory=set)
    #: Of a superposed decoding: what the client has.
    drafts: tuple[tuple[int, ...], ...] = ()
    #: Tokens of the prompt whose KV was cached, in the attempt that gave the first token; of these, those that another
    #: worker sent for it, and how long it waited for that; further tokens whose KV was taken from another context.
    num_cached_tokens: int = 0
    num_fetched_tokens: int = 0
    prefix_fetch_s: float = 0.0
    num_reused_tokens: int = 0
    #: Why its prompt did not begin in the order of arrival, in the same attempt; empty when it did.
    order_reason: str = ""
    #: What was left of its pictures, in the same attempt; None when they were not reduced.
    images_reduced: ImagesReduced | None = None
    #: Of the last attempt, once its worker has reported.
    decoding_report: DecodingReport | None = None
    #: Of all attempts.
    migrations: list[Migration] = field(default_factory=list)
    #: What is encoded for the present attempt.
    encodes: EncodeShards = field(init=False)
    #: The first position of the prompt whose logprobs the client does not have; the first token has none.
    _next_scored: int = 1
    #: Tokens of this attempt that came before an earlier one, by index, with their logprobs if those came.
    _early: dict[int, tuple[int, TokenLogprobs | None]] = field(default_factory=dict)
    #: Where this attempt's output ends and why, once a worker has said so.
    _end: tuple[int, FinishReason] | None = None
    #: Workers that still hold something of this attempt, or will send something of it.
    _holders: set[WorkerId] = field(default_factory=set)
    #: Who decoded it before, while its KV goes from there to the route's decode worker.
    _moving_from: WorkerView | None = None
    _is_prefill_started: bool = False
    #: The route's decode worker has computed something, so it has all KV that was sent to it.
    _is_kv_there: bool = False

    def __post_init__(self) -> None:
        self.encodes = EncodeShards(self.request_id, self.images)

    @property
    def key(self) -> RequestKey:
        """Names the present attempt."""
        return RequestKey(self.request_id, self.attempt)

    @property
    def is_over(self) -> bool:
        """Nothing more will come of it."""
        return self.state in (RequestState.FINISHED, RequestState.FAILED)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that the next attempt must prefill."""
        return len(self.prompt_ids) + len(self.delivered)

    @property
    def max_tokens(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    @property
    def is_moving(self) -> bool:
        """It goes on at another worker, and who decoded it before has not reported that its KV is there."""
        return self._moving_from is not None

    def routed(self, route: Route, attempt: int, now_s: float) -> list[Action]:
        """A route was chosen: submit to its workers.

        attempt: a number that no earlier attempt at a request of this id had, this one or one before it
        that used the same id. What is still on its way from those can then not be taken for ours.
        """
        if now_s >= self.deadline_s:
            return self.deadline_passed()
        self._move_to(RequestState.PREFILL)
        assert attempt != self.attempt
        self.attempt = attempt
        self.num_attempts += 1
        self.route = route
        self._early.clear()
        self._end = None
        self._moving_from, self._is_prefill_started, self._is_kv_there = None, False, False
        self.times.kv_transfer = None
        self.decoding_report = None
        if not self.delivered:
            self.times.submitted_at_s = now_s
            self.times.images_wanted_at_s = self.times.images_encoded_at_s = None
        if route.is_colocated:
            return [self._submit(route.prefill, frozenset({Phase.PREFILL, Phase.DECODE}), None, now_s)]
        transfer_id = f"{self.request_id}/{self.attempt}"
        to_decode = Handoff(transfer_id, route.decode.address, route.decode.incarnation)
        return [
            self._submit(route.decode, frozenset({Phase.DECODE}), Handoff(transfer_id), now_s),
            self._submit(route.prefill, frozenset({Phase.PREFILL}), to_decode, now_s),
        ]

    def _submit(
        self, worker: WorkerView, phases: frozenset[Phase], handoff: Handoff | None, now_s: float
    ) -> Action:
        assert self.route is not None
        self._holders.add(worker.worker_id)
        submit = Submit(
            self.key,
            phases,
            self.prompt_ids + tuple(self.delivered),
            self._sampling_left(),
            self.deadline_s - now_s,
            handoff,
            num_delivered=len(self.delivered),
            priority=self.priority,
            cache_salt=self.cache_salt,
            prefix_peers=self.route.prefix_peers if Phase.PREFILL in phases else (),
            images=self.images.api_tiles if self.images is not None else (),
            reduction=self.images.reduction if self.images is not None else None,
            ttft_left_s=self.times.arrived_at_s + self.slo.ttft_s - now_s,
            tpot_target_s=self.slo.tpot_s,
            tenant_weight=self.tenant_weight,
        )
        return Send(worker, submit)

    @property
    def can_migrate(self) -> bool:
        """It decodes, and no KV of it is on its way. A superposed decoding is more than its tokens, and ends soon."""
        return (
            self.state is RequestState.DECODE
            and self.route is not None
            and self._holders == {self.route.decode.worker_id}
            and not isinstance(self.sampling.decoding, SuperposedDecoding)
        )

    def migrated(self, decode: WorkerView, reason: str, now_s: float) -> list[Action]:
        """It goes on at this worker, with its KV. `can_migrate` must hold."""
        if now_s >= self.deadline_s:
            return self.deadline_passed()
        assert self.can_migrate
        assert self.route is not None
        source = self.route.decode
        assert decode.worker_id != source.worker_id
        num_before = sum(one.attempt == self.attempt for one in self.migrations)
        transfer_id = f"{self.request_id}/{self.attempt}.{num_before + 1}"
        num_delivered = len(self.delivered)
        self.migrations.append(
            Migration(self.attempt, source.worker_id, decode.worker_id, reason, now_s, num_delivered)
        )
        self._moving_from, self._is_kv_there = source, False
        self.route = replace(self.route, decode=decode, decode_room=self.max_tokens)
        handoff = Handoff(transfer_id, decode.address, decode.incarnation)
        return [
            self._submit(decode, frozenset({Phase.DECODE}), Handoff(transfer_id), now_s),
            Send(source, Migrate(self.key, handoff, len(self.prompt_ids) + num_delivered)),
        ]

    @property
    def is_prefill_waiting(self) -> bool:
        """It is with its workers, and nothing has been heard of its prompt being computed."""
        return self.state is RequestState.PREFILL and not self._is_prefill_started and not self._early

    @property
    def has_last_attempt(self) -> bool:
        """Where this one fails, so does the request."""
        return self.num_attempts >= MAX_ATTEMPTS

    def sent_back(self, reason: str) -> list[Action]:
        """It goes to other workers, before its prefill has begun. That is nobody's failure, and no attempt."""
        assert self.is_prefill_waiting
        self.num_attempts -= 1
        self._move_to(RequestState.QUEUED)
        return [*self._abort_holders(), WantRoute(reason)]

    def no_route(self, reason: str) -> list[Action]:
        """No worker can run it, or encode its pictures, and none is coming."""
        return self._fail(FailureKind.UNAVAILABLE, reason)

    def encoders_chosen(self, shards: Sequence[tuple[int, Shard]], now_s: float) -> list[Action]:
        """Workers for all tiles that are wanted, each shard with an attempt number that nobody else has."""
        if now_s >= self.deadline_s:
            return self.deadline_passed()
        assert self.route is not None
        return [
            *self.encodes.given(
                shards,
                self.route.prefill,
                self.key,
                salt=self.cache_salt,
                timeout_s=self.deadline_s - now_s,
                now_s=now_s,
            )
        ]

    def worker_event(self, worker_id: WorkerId, event: Event, now_s: float) -> list[Action]:
        """A worker of the route, or one that encodes, reported.

        Events of earlier attempts, and of workers that are done, are ignored.
        """
        if event.key.attempt in self.encodes.running:
            return self._encode_event(worker_id, event, now_s)
        key = event.key
        is_ours = key.attempt == self.attempt and key.request_id == self.request_id
        if self.is_over or not is_ours or worker_id not in self._holders:
            return []
        assert self.route is not None
        match event:
            case ImagesWanted():
                if self.times.images_wanted_at_s is None and not self.delivered:
                    self.times.images_wanted_at_s = now_s
                self.encodes.want(event.tiles)
                return [WantEncoders()] if self.encodes.wanted else []
            case ImagesEncoded():
                return []
            case ImagesReduced():
                if not self.delivered:
                    self.images_reduced = event
                return []
            case PrefillStarted():
                self._is_prefill_started = True
                if not self.delivered:
                    self.times.worker_queue_s = event.queue_s
                    self.order_reason = event.order_reason
                return []
            case KvTransferred() if self._moving_from is not None:
                if worker_id != self._moving_from.worker_id:
                    return []
                self.migrations[-1].transfer, self._moving_from = event, None
                self._holders.discard(worker_id)
                return self._missing_if_alone(worker_id)
            case KvTransferred():
                if self.route.is_colocated or worker_id != self.route.prefill.worker_id:
                    return []
                self.times.kv_transfer = event
                self._holders.discard(worker_id)
                return self._missing_if_alone(worker_id)
            case TokensGenerated():
                return self._tokens(worker_id, event, now_s)
            case PromptScored():
                return self._prompt_scored(event)
            case DraftsGenerated():
                return self._drafts(worker_id, event, now_s)
            case DecodingReport():
                self.decoding_report = event
                return []
            case RequestFailed():
                self._holders.discard(worker_id)
                self.avoided.add(self._at_fault(worker_id, event.code))
                code = event.code
                if self._moving_from is not None and code is FailureCode.INVALID:
                    # Another worker took it, so it can be run.
                    code = FailureCode.INTERNAL
                return self._attempt_failed(code, f"{worker_id}: {event.reason}")

    def worker_lost(self, worker: WorkerView, reason: str, now_s: float) -> list[Action]:
        """The stream to that incarnation of a worker ended: it has dropped what it held."""
        if self.is_over:
            return []
        if worker.worker_id in self._holders and self._is_routed_to(worker):
            self._holders.discard(worker.worker_id)
            return self._attempt_failed(FailureCode.INTERNAL, f"{worker.worker_id}: {reason}")
        return self._after_encode(self.encodes.lost(worker, reason, now_s))

    def text_stopped(self, num_tokens: int) -> list[Action]:
        """A stop string ended the text within its first `num_tokens` tokens: it is finished, and they are all."""
        del self.delivered[num_tokens:]
        if self.is_over:
            return []
        self._move_to(RequestState.FINISHED)
        return self._abort_holders()

    def cancelled(self, reason: str) -> list[Action]:
        """The client left, or asked to abort."""
        return [] if self.is_over else self._fail(FailureKind.CANCELLED, reason)

    def stopped(self, reason: str) -> list[Action]:
        """The gateway ends."""
        return [] if self.is_over else self._fail(FailureKind.UNAVAILABLE, reason)

    def deadline_passed(self, detail: str = "") -> list[Action]:
        """Time is up, whatever the state. detail: what it waited for, if that is known."""
        if self.is_over:
            return []
        reason = f"the deadline passed in state {self.state}, with {len(self.delivered)} tokens delivered"
        return self._fail(FailureKind.DEADLINE, f"{reason}: {detail}" if detail else reason)

    def check_invariants(self) -> None:
        """Whoever works on it is known, and nobody else."""
        is_running = self.state in (RequestState.PREFILL, RequestState.DECODE)
        assert bool(self._holders) == is_running, (self.state, self._holders)
        self.encodes.check_invariants()
        assert is_running or not (self.encodes.running or self.encodes.wanted), self.state
        if self.route is not None:
            assert self._holders <= self._workers().keys(), self._holders
        assert self._moving_from is None or self._moving_from.worker_id in self._holders or self.is_over
        assert self.num_attempts <= MAX_ATTEMPTS
        assert len(self.delivered) <= self.sampling.max_new_tokens
        assert self.times.first_token_at_s is None or self.delivered or self.drafts
        assert 1 <= self._next_scored <= max(1, len(self.prompt_ids))

    def _encode_event(self, worker_id: WorkerId, event: Event, now_s: float) -> list[Action]:
        """Of a shard that is with a worker."""
        match event:
            case ImagesEncoded():
                if self.encodes.done(worker_id, event, now_s) is not None and not self.delivered:
                    self.times.images_encoded_at_s = now_s
                return self._after_encode(None)
            case RequestFailed():
                failure = self.encodes.failed(worker_id, event.key.attempt, event.code, event.reason, now_s)
                return self._after_encode(failure)
            case _:
                return []

    def _after_encode(self, failure: ShardFailed | None) -> list[Action]:
        """A shard may have been lost: it goes to another worker, or the attempt or the request fails."""
        if failure is not None and failure.is_prefill_at_fault:
            assert self.route is not None
            self.avoided.add(self.route.prefill.worker_id)
            return self._attempt_failed(failure.code, failure.reason)
        if failure is not None:
            return self._fail(_KIND_OF_CODE[failure.code], failure.reason)
        return [WantEncoders()] if self.encodes.wanted else []

    def _sampling_left(self) -> SamplingParams:
        """What the next attempt is to do beyond what the client has."""
        sampling, num_delivered = self.sampling, len(self.delivered)
        is_scored = self._next_scored >= len(self.prompt_ids)
        if not num_delivered and not (is_scored and sampling.num_prompt_logprobs is not None):
            return sampling
        return replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - num_delivered,
            min_new_tokens=max(0, sampling.min_new_tokens - num_delivered),
            num_prompt_logprobs=None if is_scored else sampling.num_prompt_logprobs,
        )

    def _prompt_scored(self, event: PromptScored) -> list[Action]:
        """A next attempt scores the prompt from its beginning: what the client has is left out."""
        num_known = self._next_scored - event.first_position
        new = (
            event.logprobs[num_known : len(self.prompt_ids) - event.first_position] if num_known >= 0 else ()
        )
        if not new:
            return []
        self._next_scored += len(new)
        return [DeliverPrompt(new)]

    def _drafts(self, worker_id: WorkerId, event: DraftsGenerated, now_s: float) -> list[Action]:
        self._holders.discard(worker_id)
        self._note_kv(worker_id)
        self.drafts = event.drafts
        self.times.first_token_at_s = self.times.last_token_at_s = now_s
        self._move_to(RequestState.FINISHED)
        return [DeliverDrafts(event.drafts, event.logprobs), *self._abort_holders()]

    def _tokens(self, worker_id: WorkerId, event: TokensGenerated, now_s: float) -> list[Action]:
        if event.prefill_s is not None and not self.delivered:
            self.times.prefill_s = event.prefill_s
            self.num_cached_tokens = event.num_cached_tokens
            self.num_fetched_tokens = event.num_fetched_tokens
            self.prefix_fetch_s = event.prefix_fetch_s
            self.num_reused_tokens = event.num_reused_tokens
        if self.migrations:
            self._note_pause(worker_id, now_s)
        self._note_kv(worker_id)
        index, num_new = event.first_position - len(self.prompt_ids), len(event.token_ids)
        is_plain = not (event.logprobs or event.finish_reason or self._end or self._early)
        if (
            is_plain
            and num_new
            and index == len(self.delivered)
            and index + num_new < self.sampling.max_new_tokens
        ):
            # So it is with nearly all tokens.
            self.delivered += event.token_ids
            return [self._new_tokens(event.token_ids, index, now_s)]
        for i, token_id in enumerate(event.token_ids, start=index):
            if len(self.delivered) <= i < self.sampling.max_new_tokens:
                logprobs = event.logprobs[i - index] if event.logprobs else None
                self._early.setdefault(i, (token_id, logprobs))
        if event.finish_reason is not None:
            end = min(index + num_new, self.sampling.max_new_tokens)
            self._end = (end, event.finish_reason)
            self._holders.discard(worker_id)
            if self._moving_from is not None and self._moving_from.worker_id == worker_id:
                self._moving_from = None
        actions = self._deliver(now_s)
        return actions if self.is_over else actions + self._missing_if_alone(worker_id)

    def _note_kv(self, worker_id: WorkerId) -> None:
        """Something that this worker computed has come."""
        assert self.route is not None
        self._is_kv_there |= worker_id == self.route.decode.worker_id

    def _note_pause(self, worker_id: WorkerId, now_s: float) -> None:
        """Tokens of this worker have come."""
        last, since_s = self.migrations[-1], self.times.last_token_at_s
        is_first = last.pause_s is None and last.attempt == self.attempt and worker_id == last.target
        if is_first and since_s is not None:
            last.pause_s = now_s - since_s

    def _deliver(self, now_s: float) -> list[Action]:
        """Hand over what is next in order, and end the request if that was all."""
        first_index = len(self.delivered)
        max_tokens, finish_reason = self._end or (self.sampling.max_new_tokens, FinishReason.LENGTH)
        found: list[TokenLogprobs] = []
        while len(self.delivered) < max_tokens:
            token = self._early.pop(len(self.delivered), None)
            if token is None:
                break
            token_id, logprobs = token
            self.delivered.append(token_id)
            if logprobs is not None:
                found.append(logprobs)
        new = tuple(self.delivered[first_index:])
        if len(self.delivered) >= max_tokens:
            if new:
                self._note_times(now_s)
            self._move_to(RequestState.FINISHED)
            return [Deliver(new, first_index, finish_reason, tuple(found)), *self._abort_holders()]
        return [self._new_tokens(new, first_index, now_s, tuple(found))] if new else []

    def _new_tokens(
        self, new: tuple[int, ...], first_index: int, now_s: float, logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> Deliver:
        """These have been delivered, and are not the last ones."""
        self._note_times(now_s)
        if self.state is RequestState.PREFILL:
            self._move_to(RequestState.DECODE)
            self.encodes.prompt_computed()
        return Deliver(new, first_index, None, logprobs)

    def _note_times(self, now_s: float) -> None:
        """Tokens have been delivered."""
        times = self.times
        if times.first_token_at_s is None:
            times.first_token_at_s = now_s
        if times.second_token_at_s is None and len(self.delivered) > 1:
            times.second_token_at_s = now_s
        times.last_token_at_s = now_s

    def _missing_if_alone(self, worker_id: WorkerId) -> list[Action]:
        """When no worker is left, and that was the last one, what is missing will not come."""
        if self._holders:
            return []
        return self._attempt_failed(FailureCode.INTERNAL, f"{worker_id}: tokens are missing")

    def _workers(self) -> dict[WorkerId, WorkerView]:
        """Those that may hold something of the present attempt."""
        assert self.route is not None
        used = (self.route.prefill, self._moving_from, self.route.decode)
        return {worker.worker_id: worker for worker in used if worker is not None}

    def _is_routed_to(self, worker: WorkerView) -> bool:
        used = self._workers().get(worker.worker_id)
        return used is not None and used.incarnation == worker.incarnation

    def _at_fault(self, worker_id: WorkerId, code: FailureCode) -> WorkerId:
        """Who the next attempt should do without: of a broken transfer the one that did not report it."""
        assert self.route is not None
        sender, receiver = (self._moving_from or self.route.prefill).worker_id, self.route.decode.worker_id
        if code is not FailureCode.TRANSFER:
            return worker_id
        return receiver if worker_id == sender else sender

    def _attempt_failed(self, code: FailureCode, reason: str) -> list[Action]:
        if self._moving_from is not None and code.is_retryable:
            # It was well where it was: what went wrong on the way takes none of its attempts.
            self.num_attempts -= 1
        if not code.is_retryable or self.has_last_attempt:
            return self._fail(_KIND_OF_CODE[code], reason)
        self._move_to(RequestState.QUEUED)
        return [*self._abort_holders(), WantRoute(reason)]

    def _fail(self, kind: FailureKind, reason: str) -> list[Action]:
        self._move_to(RequestState.FAILED)
        return [*self._abort_holders(), Fail(kind, reason)]

    def _abort_holders(self) -> list[Action]:
        """Free what the attempt's workers still hold."""
        holders, self._holders = self._holders, set()
        # With a finished one the report alone is missing.
        problem = "" if self.state is RequestState.FINISHED else GIVEN_UP
        encodes: list[Action] = [*self.encodes.drop(problem)]
        if self.route is None:
            return encodes
        workers = self._workers()
        if self.state is RequestState.FINISHED and self._is_kv_there:
            # Who sent the KV is done but for its report, which an Abort would take from us.
            holders &= {self.route.decode.worker_id}
        # A decode worker that only waits for its KV, too: a first token that ends it all sends none.
        aborts = [Send(worker, Abort(self.key)) for name, worker in workers.items() if name in holders]
        self._moving_from = None
        return [*encodes, *aborts]

    def _move_to(self, state: RequestState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.request_id}: {self.state} -> {state}"
        self.state = state
