"""Records of requests to phasewise.control.v1. Pure.

There is no way back: whoever asks shows the message. Times in it are seconds since the request arrived.
"""

from orchestrator.control.request_machine import RequestState
from orchestrator.control.request_record import AttemptRecord, RequestRecord, SampleRecord
from protos import control_pb2 as pb
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
        attempts=[_attempt_to_pb(attempt, since_s) for attempt in sample.attempts],
        num_tokens=sample.num_tokens,
        num_cached_tokens=sample.num_cached_tokens,
        first_token_at_s=after(sample.first_token_at_s),
        second_token_at_s=after(sample.second_token_at_s),
        last_token_at_s=after(sample.last_token_at_s),
        worker_queue_s=sample.worker_queue_s,
        prefill_s=sample.prefill_s,
    )


def _attempt_to_pb(attempt: AttemptRecord, since_s: float) -> pb.AttemptRecord:
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
    )
