"""KV that leaves this worker: which blocks its transfers may still read, and what they are told. Pure."""

from kvtransfer.layout import blocks_needed
from workers.engine.messages import KvReady, StartTransfer
from workers.engine.scheduler import StepPlan
from workers.engine.sequence import Sequence


class OutgoingKv:
    """The sending transfers of one worker, each from its start to the release of its blocks."""

    def __init__(self) -> None:
        self._block_ids: dict[str, tuple[int, ...]] = {}

    @property
    def num_held(self) -> int:
        """Transfers that have not yet released their blocks."""
        return len(self._block_ids)

    def holds(self, transfer_id: str) -> bool:
        """True until it has released its blocks."""
        return transfer_id in self._block_ids

    def start(self, sequence: Sequence, now_s: float) -> StartTransfer:
        """Prefill of a sequence that is decoded elsewhere begins; its blocks are known to the transfer now."""
        handoff = sequence.handoff
        assert handoff is not None
        block_ids = tuple(sequence.block_table)
        self._block_ids[handoff.transfer_id] = block_ids
        return StartTransfer(
            key=sequence.key,
            transfer_id=handoff.transfer_id,
            decode_address=handoff.decode_address,
            decode_incarnation=handoff.decode_incarnation,
            block_ids=block_ids,
            num_tokens=sequence.num_prompt_tokens,
            max_tokens=sequence.max_tokens,
            timeout_s=sequence.deadline_s - now_s,
        )

    def release(self, transfer_id: str) -> tuple[int, ...] | None:
        """The transfer reads no more from these; None when it is not known, or has released them before."""
        return self._block_ids.pop(transfer_id, None)

    def block_ids(self) -> list[int]:
        """All blocks that have not been released."""
        return [block_id for block_ids in self._block_ids.values() for block_id in block_ids]


def kv_ready(plan: StepPlan, layer_lo: int, layer_hi: int, block_size: int) -> list[KvReady]:
    """What can be sent once these layers of the step are computed.

    A block that is not full is sent with the last chunk of the prompt only; blocks that were cached go with
    the first one.
    """
    ready = []
    for part in plan.chunks:
        sequence = part.sequence
        if sequence.is_handed_off:
            assert sequence.handoff is not None
            is_first = part.start == sequence.num_cached_tokens
            block_lo = 0 if is_first else part.start // block_size
            block_hi = blocks_needed(part.end, block_size)
            ready.append(KvReady(sequence.handoff.transfer_id, layer_lo, layer_hi, block_lo, block_hi))
    return ready
