"""One sequence: its tokens, its blocks, how far it is. Pure."""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from kvtransfer.digest import content_digest, token_digest
from workers.api import (
    FinishReason,
    Handoff,
    Phase,
    PhaseSet,
    PrefixPeer,
    RequestKey,
    SamplingParams,
    Submit,
    SuperposedDecoding,
)
from workers.engine.block_hash import block_hash
from workers.engine.image_inputs import ImageInputs

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
    #: Prefilled here; its KV is on the way to the decode worker.
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
    SequenceState.DECODE: frozenset({SequenceState.BRANCHED, SequenceState.WAITING, SequenceState.FINISHED}),
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
        )

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
        """See kvtransfer.digest: of the prompt's tokens and pictures."""
        digest = token_digest(self.token_ids[: self.num_prompt_tokens])
        if self.images is None:
            return digest
        return content_digest(digest, [tile.key for tile in self.images.tiles])

    @property
    def num_kept_tokens(self) -> int:
        """Tokens whose KV means the same to another sequence with these tokens."""
        # The rows of a superposed decoding mix several tokens.
        is_mixed = isinstance(self.sampling.decoding, SuperposedDecoding)
        return self.num_prompt_tokens if is_mixed else len(self.token_ids)

    @property
    def num_storable_tokens(self) -> int:
        """Tokens whose KV may be stored for others."""
        kept, exact = self.num_kept_tokens, self.num_exact_tokens
        return kept if exact is None else min(kept, exact)

    def hash_blocks(self, num_blocks: int, block_size: int) -> None:
        """Make `block_hashes` reach this many full blocks."""
        hashes = self.block_hashes
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

    def _block_hash(self, parent: bytes, start: int, end: int) -> bytes:
        contents = self.images.contents(start, end) if self.images is not None else ()
        return block_hash(parent, self.token_ids[start:end], contents)
