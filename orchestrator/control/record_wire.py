"""Records of requests to phasewise.control.v1. Pure.

There is no way back: whoever asks shows the message. Times in it are seconds since the request arrived.
"""

from collections.abc import Sequence
from typing import Any

from orchestrator.control.encode_shards import EncodeRecord
from orchestrator.control.migration import Migration
from orchestrator.control.request_machine import RequestState
from orchestrator.control.request_record import AttemptRecord, RequestRecord, SampleRecord
from protos import control_pb2 as pb
from workers.image_wire import images_reduced_to_pb
from workers.kv_wire import kv_transferred_to_pb

_STATES = {
    RequestState.QUEUED: pb.REQUEST_STATE_QUEUED,
    RequestState.PREFILL: pb.REQUEST_STATE_PREFILL,
    RequestState.DECODE: pb.REQUEST_STATE_DECODE,
    RequestState.FINISHED: pb.REQUEST_STATE_FINISHED,
    RequestState.FAILED: pb.REQUEST_STATE_FAILED,
}


def record_to_pb(record: RequestRecord, now_s: float) -> pb.RequestRecord:
    """now_s: on the clock of the record."""
    since_s = record.arrived_at_s
    return pb.RequestRecord(
        request_id=record.request_id,
        age_s=now_s - since_s,
        num_prompt_tokens=record.num_prompt_tokens,
        samples=[_sample_to_pb(sample, since_s) for sample in record.samples],
    )


def _sample_to_pb(sample: SampleRecord, since_s: float) -> pb.SampleRecord:
    def after(at_s: float | None) -> float | None:
        return None if at_s is None else at_s - since_s

    return pb.SampleRecord(
        states=[
            pb.StateRecord(state=_STATES[one.state], at_s=one.at_s - since_s, reason=one.reason)
            for one in sample.states
        ],
        attempts=[_attempt_to_pb(attempt, sample.encodes, since_s) for attempt in sample.attempts],
        migrations=[_migration_to_pb(one, since_s) for one in sample.migrations],
        num_tokens=sample.num_tokens,
        num_cached_tokens=sample.num_cached_tokens,
        num_fetched_tokens=sample.num_fetched_tokens,
        prefix_fetch_s=sample.prefix_fetch_s,
        num_reused_tokens=sample.num_reused_tokens,
        first_token_at_s=after(sample.first_token_at_s),
        second_token_at_s=after(sample.second_token_at_s),
        last_token_at_s=after(sample.last_token_at_s),
        worker_queue_s=sample.worker_queue_s,
        prefill_s=sample.prefill_s,
        order_reason=sample.order_reason,
        images_reduced=images_reduced_to_pb(sample.images_reduced) if sample.images_reduced else None,
    )


def _attempt_to_pb(
    attempt: AttemptRecord, encodes: Sequence[EncodeRecord], since_s: float
) -> pb.AttemptRecord:
    route = attempt.route
    return pb.AttemptRecord(
        attempt=attempt.attempt,
        at_s=attempt.at_s - since_s,
        prefill_worker_id=route.prefill.worker_id,
        prefill_incarnation=route.prefill.incarnation,
        decode_worker_id=route.decode.worker_id,
        decode_incarnation=route.decode.incarnation,
        reason=route.reason,
        transfer=kv_transferred_to_pb(attempt.transfer) if attempt.transfer is not None else None,
        problem=attempt.problem,
        encodes=[
            pb.EncodeRecord(**encode_fields(one, since_s))
            for one in encodes
            if one.prefill_attempt == attempt.attempt
        ],
    )


def _migration_to_pb(migration: Migration, since_s: float) -> pb.MigrationRecord:
    transfer = migration.transfer
    return pb.MigrationRecord(
        attempt=migration.attempt,
        at_s=migration.at_s - since_s,
        source_worker_id=migration.source,
        target_worker_id=migration.target,
        reason=migration.reason,
        num_tokens=migration.num_tokens,
        pause_s=migration.pause_s,
        transfer=kv_transferred_to_pb(transfer) if transfer is not None else None,
    )


def encode_fields(record: EncodeRecord, since_s: float) -> dict[str, Any]:
    """The fields of EncodeRecord here, and of EncodeTimings in inference.proto. since_s: when the request arrived."""
    fields = {
        "worker_id": record.worker_id,
        "first_tile": record.first_tile,
        "num_tiles": record.num_tiles,
        "at_s": record.sent_at_s - since_s,
        "duration_s": None if record.ended_at_s is None else record.ended_at_s - record.sent_at_s,
        "problem": record.problem,
    }
    report = record.report
    if report is None:
        return fields
    return fields | {
        "num_cached_tiles": report.num_cached,
        "queue_s": report.queue_s,
        "decode_s": report.decode_s,
        "encode_s": report.encode_s,
        "transfer_s": report.transfer_s,
        "num_bytes": report.num_bytes,
        "transport": report.transport,
    }
