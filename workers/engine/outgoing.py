"""KV that leaves this worker: which blocks its transfers may still read, and what they are told. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from workers.api import LedgerKind
from workers.engine.ledger import Holder
from workers.engine.messages import KvReady, StartTransfer
from workers.engine.sequence import Sequence
from workers.engine.span_reuse.digest import approximate_digest
from workers.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class _Sending:
    block_ids: tuple[int, ...]
    since_s: float
    peer: str
    peer_incarnation: int


class OutgoingKv:
    """The sending transfers of one worker, each from its start to the release of its blocks."""

    def __init__(self) -> None:
        self._sending: dict[str, _Sending] = {}

    @property
    def num_held(self) -> int:
        """Transfers that have not yet released their blocks."""
        return len(self._sending)

    def holds(self, transfer_id: str) -> bool:
        """True until it has released its blocks."""
        return transfer_id in self._sending

    def start(self, sequence: Sequence, now_s: float) -> StartTransfer:
        """Prefill of a sequence that is decoded elsewhere begins; its blocks are known to the transfer now."""
        return self._start(
            sequence, tuple(sequence.block_table), sequence.num_prompt_tokens, sequence.prompt_digest(), now_s
        )

    def migrate(
        self, sequence: Sequence, block_ids: tuple[int, ...], num_known_tokens: int, now_s: float
    ) -> StartTransfer:
        """A sequence goes on elsewhere, where its first `num_known_tokens` tokens are known; its KV is in these blocks."""
        digest = sequence.digest(num_known_tokens)
        return self._start(sequence, block_ids, sequence.num_computed_tokens, digest, now_s)

    def _start(
        self, sequence: Sequence, block_ids: tuple[int, ...], num_tokens: int, digest: bytes, now_s: float
    ) -> StartTransfer:
        handoff = sequence.handoff
        assert handoff is not None
        if sequence.num_exact_tokens is not None or sequence.num_lossless_tokens is not None:
            digest = approximate_digest(digest)
        self._sending[handoff.transfer_id] = _Sending(
            block_ids, now_s, handoff.decode_address, handoff.decode_incarnation
        )
        return StartTransfer(
            key=sequence.key,
            transfer_id=handoff.transfer_id,
            decode_address=handoff.decode_address,
            decode_incarnation=handoff.decode_incarnation,
            block_ids=block_ids,
            num_tokens=num_tokens,
            max_tokens=sequence.max_tokens,
            timeout_s=sequence.deadline_s - now_s,
            token_digest=digest,
        )

    def release(self, transfer_id: str) -> tuple[int, ...] | None:
        """The transfer reads no more from these; None when it is not known, or has released them before."""
        sending = self._sending.pop(transfer_id, None)
        return sending.block_ids if sending is not None else None

    def block_ids(self) -> list[int]:
        """All blocks that have not been released."""
        return [block_id for one in self._sending.values() for block_id in one.block_ids]

    def holders(self) -> Iterator[Holder]:
        """Each transfer with its blocks."""
        for transfer_id, one in self._sending.items():
            yield Holder(
                transfer_id, LedgerKind.SENDING, one.block_ids, one.since_s, one.peer_incarnation, one.peer
            )


def kv_ready(plan: StepPlan, layer_lo: int, layer_hi: int) -> list[KvReady]:
    """What can be sent once these layers of the step are computed.

    Tokens that were cached go with the first chunk. A prompt whose pictures are reduced goes when all of it is computed.
    """
    ready = []
    for part in plan.chunks:
        sequence = part.sequence
        if sequence.is_handed_off and sequence.reduction is None:
            assert sequence.handoff is not None
            token_lo = 0 if part.start == sequence.num_cached_tokens else part.start
            ready.append(KvReady(sequence.handoff.transfer_id, layer_lo, layer_hi, token_lo, part.end))
    return ready
