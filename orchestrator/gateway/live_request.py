"""A request that is being answered: the machines of its samples, and what its client has yet to get."""

import asyncio
import weakref
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.prefix_index import PromptChain
from orchestrator.control.request_actions import Action, Deliver, DeliverDrafts, DeliverPrompt, Fail
from orchestrator.control.request_machine import RequestMachine, RequestState, RequestTimes
from orchestrator.control.request_record import RequestRecord, SampleRecord
from orchestrator.control.rerouting import WaitingPrompt
from orchestrator.control.router import LoadLedger, Route
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.gateway.links import Timer
from orchestrator.gateway.validation import CheckedRequest
from workers.api import FinishReason, RequestId, TokenLogprobs, WorkerId

#: Tokens with logprobs in one message; with 20 likeliest tokens each that is 0.5 to 2.5 MB, and clients of gRPC
#: take 4 MiB unless told otherwise.
MAX_SCORED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """What is new of one sample, and why it was the last, if it was. `logprobs`: one for each token, or none."""

    sample_index: int
    token_ids: tuple[int, ...]
    first_index: int
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    drafts: DeliverDrafts | None = None


class LiveSample:
    """One sample: its machine, what of it waits for the client, and what it is charged for."""

    def __init__(
        self, machine: RequestMachine, index: int, request: "LiveRequest", record: SampleRecord
    ) -> None:
        self.machine = machine
        self.record = record
        self.index = index
        #: Weakly: or each request, with all its tokens, would stay until the garbage collector looks.
        self._request = weakref.ref(request)
        #: A client that does not read leaves them here: at most the request's max_new_tokens.
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        #: At most one for each token of the prompt.
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._drafts: DeliverDrafts | None = None
        self._num_taken = 0
        self._finish_reason: FinishReason | None = None
        #: Among what was served.
        self.is_counted = False
        self._route: Route | None = None
        self._prefill_tokens = self._prefill_room = self._decode_room = 0
        #: Shards that are charged: by attempt, the worker and the patches.
        self._encodes: dict[int, tuple[WorkerId, int]] = {}

    @property
    def request(self) -> "LiveRequest":
        """Whose sample it is. The dispatcher has it until all its samples are over, and then its client."""
        request = self._request()
        assert request is not None, f"nobody has the request of sample {self.index} any more"
        return request

    def note_state(self, actions: Sequence[Action], now_s: float) -> None:
        """Into the record, if these actions came with another state. Called for every token: does nothing then."""
        if self.machine.state is not self.record.state:
            self.record.moved(self.machine, actions, now_s)

    def deliver(self, news: Deliver | DeliverPrompt | DeliverDrafts) -> None:
        """Something for the client came."""
        match news:
            case Deliver():
                self._token_ids += news.token_ids
                self._logprobs += news.logprobs
                self._finish_reason = news.finish_reason
            case DeliverPrompt():
                self._prompt_logprobs += news.logprobs
            case DeliverDrafts():
                self._drafts = news
                self._finish_reason = FinishReason.LENGTH
        self.request.has_news_of(self)

    @property
    def has_more(self) -> bool:
        """`take` has left something."""
        return bool(self._prompt_logprobs or self._token_ids)

    def take(self) -> Progress:
        """What is new, as far as it fits into one message."""
        prompt_logprobs = tuple(self._prompt_logprobs[:MAX_SCORED_TOKENS])
        del self._prompt_logprobs[:MAX_SCORED_TOKENS]
        num_tokens = MAX_SCORED_TOKENS if self._logprobs else len(self._token_ids)
        if self._prompt_logprobs:
            # All of the prompt comes before any generated token.
            num_tokens = 0
        token_ids, logprobs = tuple(self._token_ids[:num_tokens]), tuple(self._logprobs[:num_tokens])
        del self._token_ids[:num_tokens]
        del self._logprobs[:num_tokens]
        progress = Progress(
            self.index,
            token_ids,
            self._num_taken,
            None if self.has_more else self._finish_reason,
            logprobs,
            prompt_logprobs,
            self._drafts,
        )
        self._num_taken += len(token_ids)
        return progress

    def drop_rest(self) -> None:
        """Its text has ended: the client wants nothing more of it."""
        self._token_ids.clear()
        self._logprobs.clear()
        self.request.has_no_news_of(self)
        # Tokens after a stop string are no part of the answer.
        self.record.refresh(self.machine)

    def as_waiting(self, route: Route) -> WaitingPrompt:
        """While a worker has it, by this route, and has not begun it."""
        machine = self.machine
        return WaitingPrompt(
            _rank(self),
            machine.times.arrived_at_s + machine.slo.ttft_s,
            machine.attempt,
            route.prefill.worker_id,
            machine.num_prefill_tokens,
            # What is cached there and nobody uses is part of the room that is told.
            route.prefill_room,
            self.record.attempts[-1].at_s,
        )

    def charge(self, ledger: LoadLedger) -> None:
        """Count what has just been submitted."""
        assert self._route is None
        assert self.machine.route is not None
        self._route = self.machine.route
        self._prefill_tokens = self.machine.num_prefill_tokens - self._route.num_cached_tokens
        self._prefill_room, self._decode_room = self._route.prefill_room, self._route.decode_room
        ledger.add(
            self._route.prefill.worker_id,
            prefill_tokens=self._prefill_tokens,
            coming_tokens=self._prefill_room,
        )
        ledger.add(self._route.decode.worker_id, decode_sequences=1, coming_tokens=self._decode_room)

    def move_charge(self, ledger: LoadLedger) -> None:
        """It goes on at the decode worker that its machine's route has now."""
        assert self._route is not None
        assert self.machine.route is not None
        ledger.add(self._route.decode.worker_id, decode_sequences=-1, coming_tokens=-self._decode_room)
        self._route = self.machine.route
        self._decode_room = self._route.decode_room
        ledger.add(self._route.decode.worker_id, decode_sequences=1, coming_tokens=self._decode_room)

    def charge_encodes(self, ledger: LoadLedger) -> list[int]:
        """Count what has just been given to encode workers; returns the attempts of these shards."""
        encodes = self.machine.encodes
        new = [attempt for attempt in encodes.running if attempt not in self._encodes]
        for attempt in new:
            shard = encodes.running[attempt]
            num_patches = sum(placed.num_patches for placed in encodes.tiles_of(shard))
            self._encodes[attempt] = shard.worker.worker_id, num_patches
            ledger.add(shard.worker.worker_id, encode_patches=num_patches)
        return new

    def settle_encodes(self, ledger: LoadLedger) -> list[int]:
        """Uncharge shards that are no longer with a worker; returns their attempts."""
        ended = [attempt for attempt in self._encodes if attempt not in self.machine.encodes.running]
        for attempt in ended:
            worker_id, num_patches = self._encodes.pop(attempt)
            ledger.add(worker_id, encode_patches=-num_patches)
        return ended

    def settle(self, ledger: LoadLedger) -> None:
        """Uncharge what the machine's state says is no longer in flight."""
        if self._route is None or self.machine.state is RequestState.PREFILL:
            return
        if self._prefill_tokens or self._prefill_room:
            ledger.add(
                self._route.prefill.worker_id,
                prefill_tokens=-self._prefill_tokens,
                coming_tokens=-self._prefill_room,
            )
            self._prefill_tokens = self._prefill_room = 0
        if self._decode_room and not self.machine.is_moving:
            ledger.add(self._route.decode.worker_id, coming_tokens=-self._decode_room)
            self._decode_room = 0
        if self.machine.state is not RequestState.DECODE:
            ledger.add(self._route.decode.worker_id, decode_sequences=-1)
            self._route = None


class LiveRequest:
    """Filled by the dispatcher, emptied by the task that answers the client. Both live in one loop.

    chain: names of the blocks of the prompt.
    """

    def __init__(self, machines: Sequence[RequestMachine], chain: PromptChain) -> None:
        self.chain = chain
        self.record = RequestRecord.of(machines)
        self.samples = tuple(
            LiveSample(machine, index, self, self.record.samples[index])
            for index, machine in enumerate(machines)
        )
        self.deadline: Timer | None = None
        #: Samples after the first start when the first has its first token: they find its prompt cached.
        self.num_started = 1
        self._failure: Fail | None = None
        #: Samples with something for the client, each once.
        self._ready: deque[LiveSample] = deque()
        self._has_news = asyncio.Event()

    @classmethod
    def of(
        cls,
        checked: CheckedRequest,
        *,
        arrived_at_s: float,
        deadline_s: float,
        slo: Slo = NO_SLO,
        tenant_weight: float = 1.0,
    ) -> "LiveRequest":
        """With a machine for each sample. tenant_weight: see Submit."""
        images = checked.images
        num_text_tokens = images.tiles[0].tile.start if images is not None else len(checked.prompt_ids)
        chain = PromptChain(
            checked.prefix_root, checked.prompt_ids[:num_text_tokens], len(checked.prompt_ids)
        )
        return cls(
            [
                RequestMachine(
                    checked.request_id,
                    checked.prompt_ids,
                    sampling,
                    deadline_s,
                    RequestTimes(arrived_at_s),
                    priority=checked.priority,
                    cache_salt=checked.cache_salt,
                    images=checked.images,
                    slo=slo,
                    tenant_weight=tenant_weight,
                )
                for sampling in checked.samplings()
            ],
            chain,
        )

    @property
    def request_id(self) -> RequestId:
        """Whose samples these are."""
        return self.samples[0].machine.request_id

    @property
    def is_over(self) -> bool:
        """Nothing more will come of any sample."""
        return all(sample.machine.is_over for sample in self.samples)

    @property
    def is_failed(self) -> bool:
        """One of the samples has failed, and with it the request."""
        return self._failure is not None

    def has_news_of(self, sample: LiveSample) -> None:
        """There is something for the client."""
        if sample not in self._ready:
            self._ready.append(sample)
        self._has_news.set()

    def has_no_news_of(self, sample: LiveSample) -> None:
        """There is nothing for the client any more."""
        if sample in self._ready:
            self._ready.remove(sample)

    def fail(self, failure: Fail) -> None:
        """It ended without all its tokens. The first failure counts."""
        if self._failure is None:
            self._failure = failure
        self._has_news.set()

    def take_now(self) -> Progress | Fail | None:
        """What is new of one sample; None when nothing is. A failure comes after the tokens before it."""
        if not self._ready:
            return self._failure
        sample = self._ready.popleft()
        progress = sample.take()
        if sample.has_more:
            self._ready.appendleft(sample)
        return progress

    async def wait_for_news(self) -> None:
        """Until `take_now` has something."""
        while not self._ready and self._failure is None:
            self._has_news.clear()
            await self._has_news.wait()


def enqueue(sample: LiveSample, waiting: deque[LiveSample], *, is_first: bool = False) -> None:
    """Put it behind the last of its priority, or, since it has waited already, before the first of them."""
    bisect = bisect_left if is_first else bisect_right
    waiting.insert(bisect(waiting, _rank(sample), key=_rank), sample)


def _rank(sample: LiveSample) -> int:
    """Higher priorities come first."""
    return -sample.machine.priority
