"""Control frames to and from the messages of phasewise.kvtransfer.v1. Pure."""

from collections.abc import Callable
from typing import Any

from kvtransfer.codecs.codec import CodecId
from kvtransfer.frames import (
    Abort,
    Ack,
    Announce,
    Attach,
    Chunk,
    Commit,
    Committed,
    Ended,
    Fetch,
    Finish,
    Frame,
    Granted,
    Nack,
    Refused,
    Renew,
    Reserve,
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.layout import KvLayout
from kvtransfer.pool import PoolOffer
from protos import kvtransfer_pb2 as pb

#: A longer reason is cut.
MAX_REASON_CHARS = 1000


def _reason(text: str) -> str:
    return text[:MAX_REASON_CHARS]


def _layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        model_digest=layout.model_digest,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        position_encoding=layout.position_encoding,
        head_lo=layout.head_lo,
        head_hi=layout.head_hi,
        weight_dtype=layout.weight_dtype,
    )


def _layout_from_pb(layout: pb.KvLayout) -> KvLayout:
    return KvLayout(
        model_digest=layout.model_digest,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        position_encoding=layout.position_encoding,
        head_lo=layout.head_lo,
        head_hi=layout.head_hi,
        weight_dtype=layout.weight_dtype,
    )


def _reserve_to_pb(frame: Reserve) -> pb.Reserve:
    return pb.Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_to_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
        token_digest=frame.token_digest,
        offers=[pb.PoolOffer(transport=one.transport, descriptor=one.descriptor) for one in frame.offers],
        codec=frame.codec,
        part=frame.part,
        num_parts=frame.num_parts,
    )


def _reserve_from_pb(frame: pb.Reserve) -> Reserve:
    return Reserve(
        transfer_id=frame.transfer_id,
        layout=_layout_from_pb(frame.layout),
        num_tokens=frame.num_tokens,
        max_tokens=frame.max_tokens,
        incarnation=frame.incarnation,
        timeout_s=frame.timeout_s,
        token_digest=frame.token_digest,
        offers=tuple(PoolOffer(one.transport, one.descriptor) for one in frame.offers),
        codec=CodecId(frame.codec),
        part=frame.part,
        # Absent in what knows of one sender only.
        num_parts=frame.num_parts or 1,
    )


def _resume_from_pb(frame: pb.Resume) -> Resume:
    return Resume(frame.transfer_id, frame.part, frame.lease_id, frame.incarnation)


def _attach_from_pb(frame: pb.Resume) -> Attach:
    return Attach(frame.transfer_id, frame.part, frame.lease_id, frame.incarnation)


def _resume_to_pb(frame: Resume | Attach) -> pb.Resume:
    return pb.Resume(
        transfer_id=frame.transfer_id,
        part=frame.part,
        lease_id=frame.lease_id,
        incarnation=frame.incarnation,
    )


def _fetch_to_pb(frame: Fetch) -> pb.Fetch:
    return pb.Fetch(
        transfer_id=frame.transfer_id,
        layout=_layout_to_pb(frame.layout),
        incarnation=frame.incarnation,
        block_hashes=frame.block_hashes,
        min_tokens=frame.min_tokens,
        timeout_s=frame.timeout_s,
        address=frame.address,
    )


def _fetch_from_pb(frame: pb.Fetch) -> Fetch:
    return Fetch(
        frame.transfer_id,
        _layout_from_pb(frame.layout),
        frame.incarnation,
        tuple(frame.block_hashes),
        frame.min_tokens,
        frame.timeout_s,
        frame.address,
    )


def _granted_to_pb(frame: Granted) -> pb.Granted:
    return pb.Granted(
        lease_id=frame.lease_id,
        incarnation=frame.incarnation,
        credits=frame.credits,
        lease_s=frame.lease_s,
        transport=frame.transport,
        transport_reason=_reason(frame.transport_reason),
        head_lo=frame.heads[0],
        head_hi=frame.heads[1],
    )


def _granted_from_pb(frame: pb.Granted) -> Granted:
    return Granted(
        frame.lease_id,
        frame.incarnation,
        frame.credits,
        frame.lease_s,
        frame.transport,
        frame.transport_reason,
        (frame.head_lo, frame.head_hi),
    )


def to_pb(frame: Frame) -> pb.ControlFrame:
    """The message of any frame that is no chunk."""
    match frame:
        case Reserve():
            return pb.ControlFrame(reserve=_reserve_to_pb(frame))
        case Renew():
            return pb.ControlFrame(renew=pb.Renew())
        case Finish():
            return pb.ControlFrame(finish=pb.Finish(num_chunks=frame.num_chunks, digest=frame.digest))
        case Resume():
            return pb.ControlFrame(resume=_resume_to_pb(frame))
        case Attach():
            return pb.ControlFrame(attach=_resume_to_pb(frame))
        case Fetch():
            return pb.ControlFrame(fetch=_fetch_to_pb(frame))
        case Resumed():
            resumed = pb.Resumed(first_missing=frame.first_missing, received=frame.received)
            return pb.ControlFrame(resumed=resumed)
        case Commit():
            return pb.ControlFrame(commit=pb.Commit(token_ids=frame.token_ids))
        case Abort():
            return pb.ControlFrame(abort=pb.Abort(reason=_reason(frame.reason)))
        case Granted():
            return pb.ControlFrame(granted=_granted_to_pb(frame))
        case Refused():
            return pb.ControlFrame(
                refused=pb.Refused(reason=_reason(frame.reason), retryable=frame.retryable)
            )
        case Ack():
            return pb.ControlFrame(ack=pb.Ack(sequence_number=frame.sequence_number))
        case Nack():
            return pb.ControlFrame(
                nack=pb.Nack(sequence_number=frame.sequence_number, reason=_reason(frame.reason))
            )
        case Verified():
            return pb.ControlFrame(verified=pb.Verified())
        case Committed():
            return pb.ControlFrame(committed=pb.Committed())
        case Ended():
            return pb.ControlFrame(ended=pb.Ended(reason=_reason(frame.reason)))
        case Chunk() | Announce():
            raise AssertionError("a chunk is no control frame")


#: Field of ControlFrame -> how its message becomes a frame.
FROM_PB: dict[str, Callable[[Any], Frame]] = {
    "reserve": _reserve_from_pb,
    "renew": lambda _: Renew(),
    "resume": _resume_from_pb,
    "attach": _attach_from_pb,
    "fetch": _fetch_from_pb,
    "resumed": lambda m: Resumed(m.first_missing, tuple(m.received)),
    "finish": lambda m: Finish(m.num_chunks, m.digest),
    "commit": lambda m: Commit(tuple(m.token_ids)),
    "abort": lambda m: Abort(m.reason),
    "granted": _granted_from_pb,
    "refused": lambda m: Refused(m.reason, m.retryable),
    "ack": lambda m: Ack(m.sequence_number),
    "nack": lambda m: Nack(m.sequence_number, m.reason),
    "verified": lambda _: Verified(),
    "committed": lambda _: Committed(),
    "ended": lambda m: Ended(m.reason),
}
