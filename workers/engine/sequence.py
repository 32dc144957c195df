"""One sequence: its tokens, its blocks, how far it is. Pure."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from kvtransfer.digest import content_digest, token_digest
from workers.api import (
    CautiousDecoding,
    FinishReason,
    Handoff,
    ImageReduction,
    Phase,
    PhaseSet,
    PrefixPeer,
    RequestKey,
    SamplingParams,
    Submit,
    SuperposedDecoding,
)
from workers.block_hash import block_hash, chain_hashes
from workers.engine.image_inputs import ImageInputs
from workers.prompt_order import Standing

#: Stands for the next token of a sequence whose logits are no numbers.
NO_TOKEN = -1
#: The row of a sequence that does not run.
NO_ROW = -1


class SequenceState(StrEnum):
    """Where a sequence is in its life on this worker."""

    #: It will wait as soon as the beginning of its prompt has come from another worker, or does not.
    FETCHING = "fetching"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    #: Split into branches, of which one will be kept; the branches decode, it does not.
    BRANCHED = "branched"
    #: Its KV is on the way to the worker that decodes it, or goes on decoding it.
    HANDOFF = "handoff"
    #: To be decoded here; its KV is on the way from the prefill worker.
    AWAITING_KV = "awaiting_kv"
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.FETCHING: frozenset({SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.WAITING: frozenset({SequenceState.PREFILL, SequenceState.FINISHED}),
    SequenceState.PREFILL: frozenset(
        {SequenceState.DECODE, SequenceState.HANDOFF, SequenceState.WAITING, SequenceState.FINISHED}
    ),
    SequenceState.DECODE: frozenset(
        {SequenceState.BRANCHED, SequenceState.WAITING, SequenceState.HANDOFF, SequenceState.FINISHED}
    ),
    SequenceState.BRANCHED: frozenset({SequenceState.DECODE, SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.HANDOFF: frozenset({SequenceState.FINISHED}),
    SequenceState.AWAITING_KV: frozenset(
        {SequenceState.DECODE, SequenceState.PREFILL, SequenceState.FINISHED}
    ),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(slots=True)
class DecodingCost:
    """Of decode steps in which a sequence took other than one row for one token: steps, rows and tokens."""

    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens `[0, num_computed_tokens)` have their KV in `block_table`; the rest is still to be computed."""

    key: RequestKey
    phases: PhaseSet
    sampling: SamplingParams
    handoff: Handoff | None
    deadline_s: float
    arrived_s: float
    #: Who goes first, and is preempted last, among those of an engine: the lowest.
    rank: tuple[int, float, int]
    #: Prompt, then what was generated.
    token_ids: list[int]
    num_prompt_tokens: int
    #: Tokens at the end of the prompt that an earlier attempt generated.
    num_delivered: int
    #: Tokens that the whole sequence may grow to, prompt included.
    max_tokens: int
    stop_token_ids: frozenset[int]
    state: SequenceState
    #: The root, then the hash of each full block, as far as they were needed.
    block_hashes: list[bytes]
    num_computed_tokens: int = 0
    #: Block ids in order.
    block_table: list[int] = field(default_factory=list)
    #: Tokens for which there are blocks: a decode step needs no look at the pool below that.
    capacity: int = 0
    #: Its place in the engine's tables while it runs.
    row: int = NO_ROW
    #: How often it got one.
    num_entries: int = 0
    #: Blocks from that of its next token on may be held by others, or known to the prefix index.
    is_tail_shared: bool = False
    #: Blocks before this one are in the prefix index, or were there when this one was computed.
    num_stored_blocks: int = 0
    prefill_started_s: float | None = None
    #: When it last got its first block here.
    holds_since_s: float = 0.0
    #: Tokens whose KV was found when it started last.
    num_cached_tokens: int = 0
    #: Tokens whose KV was taken from another context when it started last.
    num_reused_tokens: int = 0
    #: Tokens before the first whose KV is an approximation, or was computed from one; None: all is exact.
    num_exact_tokens: int | None = None
    #: Tokens before the first whose KV came through a lossy codec of the host tier, or was computed from such; None: all
    #: is as it was computed.
    num_lossless_tokens: int | None = None
    #: Tokens of the prompt that came from another worker before it began here, and how long it waited for them.
    num_fetched_tokens: int = 0
    prefix_fetch_s: float = 0.0
    #: Prompt tokens whose logprobs have come out.
    num_scored_tokens: int = 1
    #: Which of its random streams it draws from: a branch has one of its own.
    stream: int = 0
    parent: "Sequence | None" = None
    #: Workers that may have the KV of its beginning.
    prefix_peers: tuple[PrefixPeer, ...] = ()
    #: Tokens and weights whose mixed embedding stands for its last token, of a superposed decoding.
    mix: tuple[tuple[int, ...], tuple[float, ...]] | None = None
    cost: DecodingCost = field(default_factory=DecodingCost)
    #: The pictures of its prompt; None without any.
    images: ImageInputs | None = None
    #: Embeddings are shared with requests of the same salt.
    cache_salt: str = ""
    #: Of its pictures; None of a prompt that stays whole.
    reduction: ImageReduction | None = None
    #: Tokens that have left its prompt: they are in none of the numbers here, but the others keep their positions.
    num_dropped_tokens: int = 0
    #: Of these, those whose embeddings were merged.
    num_merged_tokens: int = 0
    #: Rows that each layer computed of a prompt that was filtered; none of another one.
    layer_rows: tuple[int, ...] = ()
    #: Its first token should have come by then, at its deadline at the latest.
    first_token_by_s: float = math.inf
    #: For the time per token after the first, in seconds.
    tpot_target_s: float = math.inf
    #: Of its tenant, which cache_salt names.
    tenant_weight: float = 1.0
    #: Of its prompt, while it waits: those whose KV is known, as of the last look; None before the first.
    num_known_tokens: int | None = None
    #: Of its prompt beside others, as of the last look, where the order of prompts asks for it.
    standing: Standing = Standing.ON_TIME
    #: Prompts of its priority that came later and have begun before it.
    num_passed_by: int = 0
    #: Why it began out of its turn; empty when it did not.
    order_reason: str = ""
    #: See prompt_digest, once somebody has asked.
    known_prompt_digest: bytes | None = None
    #: The prompt as it came, once a token has left it.
    whole_prompt: list[int] | None = None
    #: A step of it may run beside another one; see can_be_split.
    may_split: bool = True

    @classmethod
    def from_submit(cls, submit: Submit, now_s: float, *, root: bytes, number: int) -> "Sequence":
        """The sequence of a new request, waiting for its prefill or for its KV.

        root: what its first block is chained to. number: of its arrival.
        """
        is_prefilled_here = Phase.PREFILL in submit.phases
        return cls(
            key=submit.key,
            phases=submit.phases,
            sampling=submit.sampling,
            handoff=submit.handoff,
            deadline_s=now_s + submit.timeout_s,
            arrived_s=now_s,
            rank=(-submit.priority, now_s, number),
            token_ids=list(submit.token_ids),
            num_prompt_tokens=len(submit.token_ids),
            num_delivered=submit.num_delivered,
            max_tokens=len(submit.token_ids) + submit.sampling.max_new_tokens,
            stop_token_ids=submit.sampling.stop_token_ids,
            state=SequenceState.WAITING if is_prefilled_here else SequenceState.AWAITING_KV,
            block_hashes=[root],
            prefix_peers=submit.prefix_peers,
            images=ImageInputs(submit.images) if submit.images else None,
            cache_salt=submit.cache_salt,
            reduction=_reduction(submit),
            first_token_by_s=now_s + min(submit.ttft_left_s, submit.timeout_s),
            tpot_target_s=submit.tpot_target_s,
            tenant_weight=submit.tenant_weight,
            may_split=can_be_split(submit),
        )

    @property
    def has_first_token(self) -> bool:
        """Its first token was generated, here or by an earlier attempt."""
        return self.num_delivered > 0 or len(self.token_ids) > self.num_prompt_tokens

    @property
    def max_tokens_here(self) -> int:
        """Tokens whose KV this worker must be able to hold."""
        return self.num_prompt_tokens if self.is_handed_off else self.max_tokens

    @property
    def is_handed_off(self) -> bool:
        """Prefilled here, decoded elsewhere."""
        return self.handoff is not None and Phase.PREFILL in self.phases

    @property
    def is_preemptible(self) -> bool:
        """It can start again from its tokens; one that is in a hand-off cannot, as its transfer knows its blocks."""
        return self.handoff is None

    @property
    def is_plain(self) -> bool:
        """Its next steps yield one token each, whatever token that is, until it has all of them, and write to no block of others."""
        sampling = self.sampling
        return not (
            sampling.decoding is not None
            or sampling.grammar is not None
            or sampling.num_logprobs is not None
            or self.stop_token_ids
            or self.parent is not None
            or self.is_tail_shared
        )

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that are known but have no KV yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def num_ready_tokens(self, num_known: int) -> int:
        """Tokens before the first embedding that is not here, when the KV of `num_known` is."""
        num_tokens = len(self.token_ids)
        return self.images.ready_tokens(num_tokens, num_known) if self.images is not None else num_tokens

    def named_tokens(self, start: int, end: int) -> list[int]:
        """What tells its tokens in [start, end) from others: the token ids, with numbers of their own for embeddings."""
        token_ids = self.token_ids[start:end]
        return self.images.name_tokens(token_ids, start) if self.images is not None else token_ids

    def prompt_digest(self) -> bytes:
        """See kvtransfer.digest: of the whole prompt's tokens and pictures, and of how these are reduced."""
        if self.known_prompt_digest is None:
            self.known_prompt_digest = self.digest(self.num_prompt_tokens + self.num_dropped_tokens)
        return self.known_prompt_digest

    def digest(self, num_tokens: int) -> bytes:
        """That of a sequence whose whole prompt is the first `num_tokens` tokens of this one, not fewer than its own."""
        generated = self.token_ids[self.num_prompt_tokens :]
        whole = (self.whole_prompt or self.token_ids[: self.num_prompt_tokens]) + generated
        digest = token_digest(whole[:num_tokens])
        if self.images is None:
            return digest
        keys = [tile.key for tile in self.images.tiles]
        if self.reduction is not None:
            keys.append(self.reduction.text.encode())
        return content_digest(digest, keys)

    # Tokens that leave its prompt.

    @property
    def num_own_tokens(self) -> int:
        """Tokens of the prompt that nobody generated."""
        return self.num_prompt_tokens - self.num_delivered

    @property
    def is_to_filter(self) -> bool:
        """Its prompt is to be computed with a filter, unless it is too long for that."""
        return self.reduction is not None and self.reduction.is_filtering and self.num_computed_tokens == 0

    def merge(self) -> None:
        """All embeddings of its pictures are here: tokens whose embeddings were merged leave. Nothing is computed yet."""
        assert self.images is not None
        places = self.images.merged_places()
        self.num_merged_tokens = len(places)
        if places:
            self.drop_tokens(places)

    def drop_tokens(self, places: SequenceOf[int]) -> None:
        """The tokens at these places, ascending, leave the prompt: they stand for embeddings."""
        assert self.images is not None
        self.images.drop(places)
        if self.whole_prompt is None:
            self.whole_prompt = self.token_ids[: self.num_prompt_tokens]
        gone = set(places)
        self.token_ids = [one for place, one in enumerate(self.token_ids) if place not in gone]
        self._count_dropped(len(gone))

    def begin_anew(self) -> None:
        """Nothing of it is computed any more, so its prompt is whole again, but for what was merged."""
        if self.reduction is None or self.images is None:
            return
        self.layer_rows = ()
        if self.whole_prompt is not None:
            self.token_ids = self.whole_prompt + self.token_ids[self.num_prompt_tokens :]
            self.whole_prompt = None
            self.images.restore()
            self._count_dropped(-self.num_dropped_tokens)
        if self.images.is_all_ready:
            self.merge()

    def _count_dropped(self, num: int) -> None:
        self.num_dropped_tokens += num
        self.num_prompt_tokens -= num
        self.max_tokens -= num

    @property
    def num_kept_tokens(self) -> int:
        """Tokens whose KV means the same to another sequence with these tokens."""
        # The rows of a superposed decoding mix several tokens.
        is_mixed = isinstance(self.sampling.decoding, SuperposedDecoding)
        return self.num_prompt_tokens if is_mixed else len(self.token_ids)

    @property
    def num_storable_tokens(self) -> int:
        """Tokens whose KV may be stored for others."""
        if self.reduction is not None:
            # What is left of it depends on its text.
            return 0
        kept, exact = self.num_kept_tokens, self.num_exact_tokens
        return kept if exact is None else min(kept, exact)

    def hash_blocks(self, num_blocks: int, block_size: int) -> None:
        """Make `block_hashes` reach this many full blocks."""
        hashes = self.block_hashes
        if len(hashes) > num_blocks:
            return
        if len(hashes) == num_blocks:
            # As nearly always.
            hashes.append(
                self._block_hash(hashes[-1], (num_blocks - 1) * block_size, num_blocks * block_size)
            )
            return
        if self.images is None:
            new = self.token_ids[(len(hashes) - 1) * block_size : num_blocks * block_size]
            hashes += chain_hashes(hashes[-1], new, block_size)
            return
        for i in range(len(hashes) - 1, num_blocks):
            hashes.append(self._block_hash(hashes[i], i * block_size, (i + 1) * block_size))

    def move_to(self, state: SequenceState) -> None:
        """Change state along TRANSITIONS."""
        assert state in TRANSITIONS[self.state], f"{self.key}: {self.state} -> {state}"
        self.state = state

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; returns why the sequence ends with it, if it does."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def check_invariants(self, block_size: int) -> None:
        """Its numbers agree with each other."""
        assert self.capacity == len(self.block_table) * block_size, self
        assert 0 <= self.num_computed_tokens <= len(self.token_ids), self
        assert self.num_computed_tokens <= self.capacity, self
        assert len(self.block_hashes) - 1 <= len(self.token_ids) // block_size, self
        for i, (parent, name) in enumerate(pairwise(self.block_hashes)):
            assert name == self._block_hash(parent, i * block_size, (i + 1) * block_size), self
        whole = self.num_prompt_tokens + self.num_dropped_tokens
        assert self.known_prompt_digest in (None, self.digest(whole)), self

    def _block_hash(self, parent: bytes, start: int, end: int) -> bytes:
        contents = self.images.contents(start, end) if self.images is not None else ()
        return block_hash(parent, self.token_ids[start:end], contents)


def _reduction(submit: Submit) -> ImageReduction | None:
    """None when it would change nothing."""
    reduction = submit.reduction
    return reduction if reduction is not None and reduction.is_on and submit.images else None


def can_be_split(submit: Submit) -> bool:
    """Its prompt and its decodes may be computed while others' are.

    Not what leaves for another worker as it is computed, which is told of when it is launched; nor what reads pictures, whose blocks are
    given back on one stream; not what has a mask that is computed beside the one step that runs, nor branches.
    """
    sampling = submit.sampling
    is_handed_off = submit.handoff is not None and Phase.PREFILL in submit.phases
    is_branching = isinstance(sampling.decoding, CautiousDecoding)
    return not (is_handed_off or is_branching or sampling.grammar is not None or submit.images)
