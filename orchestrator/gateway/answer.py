"""What a client is sent: tokens, text, and at the end how it went. Pure."""

from orchestrator.control.request_machine import RequestMachine
from orchestrator.gateway.live_request import Progress
from orchestrator.gateway.model_texts import Detokenizer
from protos import inference_pb2 as pb
from workers.api import FinishReason

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def response(
    machine: RequestMachine, progress: Progress, detokenizer: Detokenizer, now_s: float
) -> pb.GenerateResponse:
    """The next message; with usage and timings when it is the last."""
    # A stop token ends the text and is not part of it.
    is_stopped = progress.finish_reason is FinishReason.STOP
    text = detokenizer.push(progress.token_ids[:-1] if is_stopped else progress.token_ids)
    message = pb.GenerateResponse(
        request_id=machine.request_id,
        token_ids=progress.token_ids,
        first_token_index=progress.first_index,
        text_delta=text,
    )
    if progress.finish_reason is not None:
        message.text_delta += detokenizer.flush()
        message.finish_reason = _FINISH_REASONS[progress.finish_reason]
        message.usage.prompt_tokens = len(machine.prompt_ids)
        message.usage.completion_tokens = len(machine.delivered)
        message.timings.CopyFrom(timings(machine, now_s))
    return message


def timings(machine: RequestMachine, now_s: float) -> pb.Timings:
    """How a finished request went. now_s: when its last token leaves, on the machine's clock."""
    times, route = machine.times, machine.route
    assert route is not None
    message = pb.Timings(
        prefill_s=times.prefill_s,
        total_s=now_s - times.arrived_at_s,
        prefill_worker_id=route.prefill.worker_id,
        decode_worker_id=route.decode.worker_id,
        attempts=machine.num_attempts,
    )
    if times.submitted_at_s is not None:
        message.queue_s = times.submitted_at_s - times.arrived_at_s + times.worker_queue_s
    if times.first_token_at_s is not None and times.last_token_at_s is not None:
        message.ttft_s = times.first_token_at_s - times.arrived_at_s
        message.decode_s = times.last_token_at_s - times.first_token_at_s
        if len(machine.delivered) > 1:
            message.tpot_s = message.decode_s / (len(machine.delivered) - 1)
    if times.kv_transfer is not None:
        message.kv_transfer.num_bytes = times.kv_transfer.num_bytes
        message.kv_transfer.num_chunks = times.kv_transfer.num_chunks
        message.kv_transfer.transfer_s = times.kv_transfer.transfer_s
        message.kv_transfer.exposed_s = times.kv_transfer.exposed_s
    return message
