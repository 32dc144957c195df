"""One sequence: its tokens, its blocks, how far it is. Pure."""

from dataclasses import dataclass, field
from enum import StrEnum

from workers.api import FinishReason, Handoff, Phase, PhaseSet, RequestKey, SamplingParams, Submit

#: Stands for the next token of a sequence whose logits are no numbers.
NO_TOKEN = -1


class SequenceState(StrEnum):
    """Where a sequence is in its life on this worker."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    #: Prefilled here; its KV is on the way to the decode worker.
    HANDOFF = "handoff"
    #: To be decoded here; its KV is on the way from the prefill worker.
    AWAITING_KV = "awaiting_kv"
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILL, SequenceState.FINISHED}),
    SequenceState.PREFILL: frozenset({SequenceState.DECODE, SequenceState.HANDOFF, SequenceState.FINISHED}),
    SequenceState.DECODE: frozenset({SequenceState.FINISHED}),
    SequenceState.HANDOFF: frozenset({SequenceState.FINISHED}),
    SequenceState.AWAITING_KV: frozenset({SequenceState.DECODE, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens `[0, num_computed_tokens)` have their KV in `block_table`; the rest is still to be computed."""

    key: RequestKey
    phases: PhaseSet
    sampling: SamplingParams
    handoff: Handoff | None
    deadline_s: float
    arrived_s: float
    #: Prompt, then what was generated.
    token_ids: list[int]
    num_prompt_tokens: int
    state: SequenceState
    num_computed_tokens: int = 0
    #: Block ids in order; they hold all that this worker may ever compute of the sequence.
    block_table: list[int] = field(default_factory=list)
    prefill_started_s: float = 0.0

    @classmethod
    def from_submit(cls, submit: Submit, now_s: float) -> "Sequence":
        """The sequence of a new request, waiting for its prefill or for its KV."""
        is_prefilled_here = Phase.PREFILL in submit.phases
        return cls(
            key=submit.key,
            phases=submit.phases,
            sampling=submit.sampling,
            handoff=submit.handoff,
            deadline_s=now_s + submit.timeout_s,
            arrived_s=now_s,
            token_ids=list(submit.token_ids),
            num_prompt_tokens=len(submit.token_ids),
            state=SequenceState.WAITING if is_prefilled_here else SequenceState.AWAITING_KV,
        )

    @property
    def max_tokens(self) -> int:
        """Tokens that the whole sequence may grow to, prompt included."""
        return self.num_prompt_tokens + self.sampling.max_new_tokens

    @property
    def max_tokens_here(self) -> int:
        """Tokens whose KV this worker must be able to hold."""
        return self.num_prompt_tokens if self.is_handed_off else self.max_tokens

    @property
    def is_handed_off(self) -> bool:
        """Prefilled here, decoded elsewhere."""
        return Phase.PREFILL in self.phases and self.handoff is not None

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that are known but have no KV yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def move_to(self, state: SequenceState) -> None:
        """Change state along TRANSITIONS."""
        assert state in TRANSITIONS[self.state], f"{self.key}: {self.state} -> {state}"
        self.state = state

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; returns why the sequence ends with it, if it does."""
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_tokens:
            return FinishReason.LENGTH
        return None
