"""Messages of phasewise.worker.v1 to and from `workers.api`; protobuf objects go no further. Pure."""

from collections.abc import Iterable

from protos import worker_pb2 as pb
from workers.api import (
    Abort,
    BlockCounts,
    Command,
    Event,
    FailureCode,
    FinishReason,
    Handoff,
    KvTransferred,
    ModelInfo,
    Phase,
    PhaseSet,
    PrefillStarted,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerId,
    WorkerState,
    WorkerStatus,
)

_PHASES = {
    Phase.ENCODE: pb.PHASE_ENCODE,
    Phase.PREFILL: pb.PHASE_PREFILL,
    Phase.DECODE: pb.PHASE_DECODE,
}
_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FAILURE_CODES = {
    FailureCode.INVALID: pb.FAILURE_CODE_INVALID,
    FailureCode.OVERLOADED: pb.FAILURE_CODE_OVERLOADED,
    FailureCode.DEADLINE: pb.FAILURE_CODE_DEADLINE,
    FailureCode.TRANSFER: pb.FAILURE_CODE_TRANSFER,
    FailureCode.INTERNAL: pb.FAILURE_CODE_INTERNAL,
}
_WORKER_STATES = {
    WorkerState.LOADING: pb.WORKER_STATE_LOADING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.FAILED: pb.WORKER_STATE_FAILED,
}
_PHASE_OF = {value: key for key, value in _PHASES.items()}
_FINISH_REASON_OF = {value: key for key, value in _FINISH_REASONS.items()}
_FAILURE_CODE_OF = {value: key for key, value in _FAILURE_CODES.items()}
_WORKER_STATE_OF = {value: key for key, value in _WORKER_STATES.items()}


def phases_to_pb(phases: PhaseSet) -> "list[pb.Phase.ValueType]":
    """In the order of a request's life."""
    return [_PHASES[phase] for phase in Phase if phase in phases]


def phases_from_pb(phases: "Iterable[pb.Phase.ValueType]") -> PhaseSet:
    """Values of a newer version are left out."""
    return frozenset(_PHASE_OF[phase] for phase in phases if phase in _PHASE_OF)


def command_to_pb(command: Command, incarnation: int) -> pb.Command:
    """incarnation: the worker's, as the sender knows it; another one refuses a Submit."""
    if isinstance(command, Abort):
        return pb.Command(abort=pb.Abort(request_id=command.key.request_id, attempt=command.key.attempt))
    sampling = command.sampling
    submit = pb.Submit(
        request_id=command.key.request_id,
        attempt=command.key.attempt,
        incarnation=incarnation,
        phases=phases_to_pb(command.phases),
        token_ids=command.token_ids,
        sampling=pb.Sampling(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=sorted(sampling.stop_token_ids),
        ),
        timeout_s=command.timeout_s,
    )
    if command.handoff is not None:
        submit.handoff.transfer_id = command.handoff.transfer_id
        submit.handoff.decode_address = command.handoff.decode_address
        submit.handoff.decode_incarnation = command.handoff.decode_incarnation
    return pb.Command(submit=submit)


def command_from_pb(command: pb.Command) -> Command | None:
    """None for a kind that this version does not know."""
    match command.WhichOneof("command"):
        case "submit":
            return _submit_from_pb(command.submit)
        case "abort":
            return Abort(RequestKey(RequestId(command.abort.request_id), command.abort.attempt))
        case _:
            return None


def _submit_from_pb(submit: pb.Submit) -> Submit:
    handoff = None
    if submit.HasField("handoff"):
        handoff = Handoff(
            submit.handoff.transfer_id, submit.handoff.decode_address, submit.handoff.decode_incarnation
        )
    return Submit(
        key=RequestKey(RequestId(submit.request_id), submit.attempt),
        phases=phases_from_pb(submit.phases),
        token_ids=tuple(submit.token_ids),
        sampling=SamplingParams(
            max_new_tokens=submit.sampling.max_tokens,
            temperature=submit.sampling.temperature,
            top_p=submit.sampling.top_p,
            seed=submit.sampling.seed,
            stop_token_ids=frozenset(submit.sampling.stop_token_ids),
        ),
        timeout_s=submit.timeout_s,
        handoff=handoff,
    )


def event_to_pb(event: Event) -> pb.Event:
    """One event of a request."""
    message = pb.Event(request_id=event.key.request_id, attempt=event.key.attempt)
    match event:
        case PrefillStarted():
            message.prefill_started.queue_s = event.queue_s
        case TokensGenerated():
            message.tokens_generated.token_ids.extend(event.token_ids)
            message.tokens_generated.first_position = event.first_position
            message.tokens_generated.finish_reason = _FINISH_REASONS[event.finish_reason]
            if event.prefill_s is not None:
                message.tokens_generated.prefill_s = event.prefill_s
        case KvTransferred():
            message.kv_transferred.num_bytes = event.num_bytes
            message.kv_transferred.num_chunks = event.num_chunks
            message.kv_transferred.transfer_s = event.transfer_s
            message.kv_transferred.exposed_s = event.exposed_s
        case RequestFailed():
            message.request_failed.code = _FAILURE_CODES[event.code]
            message.request_failed.reason = event.reason
    return message


def event_from_pb(message: pb.Event) -> Event | None:
    """None for a kind that this version does not know."""
    key = RequestKey(RequestId(message.request_id), message.attempt)
    match message.WhichOneof("event"):
        case "prefill_started":
            return PrefillStarted(key, message.prefill_started.queue_s)
        case "tokens_generated":
            tokens = message.tokens_generated
            return TokensGenerated(
                key,
                tuple(tokens.token_ids),
                tokens.first_position,
                _FINISH_REASON_OF.get(tokens.finish_reason),
                tokens.prefill_s if tokens.HasField("prefill_s") else None,
            )
        case "kv_transferred":
            sent = message.kv_transferred
            return KvTransferred(key, sent.num_bytes, sent.num_chunks, sent.transfer_s, sent.exposed_s)
        case "request_failed":
            code = _FAILURE_CODE_OF.get(message.request_failed.code, FailureCode.INTERNAL)
            return RequestFailed(key, code, message.request_failed.reason)
        case _:
            return None


def status_to_pb(status: WorkerStatus) -> pb.WorkerStatus:
    """What a worker reports."""
    return pb.WorkerStatus(
        worker_id=status.worker_id,
        incarnation=status.incarnation,
        phases=phases_to_pb(status.phases),
        state=_WORKER_STATES[status.state],
        message=status.message,
        num_waiting=status.num_waiting,
        num_running=status.num_running,
        blocks=pb.BlockCounts(
            free=status.blocks.free,
            cached=status.blocks.cached,
            in_use=status.blocks.in_use,
            leased=status.blocks.leased,
            total=status.blocks.total,
        ),
        num_leases=status.num_leases,
        num_steps=status.num_steps,
        pid=status.pid,
        memory_bytes=status.memory_bytes,
    )


def status_from_pb(message: pb.WorkerStatus) -> WorkerStatus:
    """What a worker reported. A state of a newer version counts as failed."""
    blocks = message.blocks
    return WorkerStatus(
        worker_id=WorkerId(message.worker_id),
        incarnation=message.incarnation,
        phases=phases_from_pb(message.phases),
        state=_WORKER_STATE_OF.get(message.state, WorkerState.FAILED),
        message=message.message,
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        blocks=BlockCounts(blocks.free, blocks.cached, blocks.in_use, blocks.leased, blocks.total),
        num_leases=message.num_leases,
        num_steps=message.num_steps,
        pid=message.pid,
        memory_bytes=message.memory_bytes,
    )


def model_to_pb(model: ModelInfo) -> pb.Model:
    """What a gateway needs to know of the loaded model."""
    return pb.Model(
        tokenizer_json=model.tokenizer_json,
        chat_template=model.chat_template,
        architecture=model.architecture,
        max_context_tokens=model.max_context_tokens,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        model_digest=model.model_digest,
        bos_token=model.bos_token,
        eos_token=model.eos_token,
        max_sequence_tokens=model.max_sequence_tokens,
    )


def model_from_pb(message: pb.Model) -> ModelInfo:
    """What a worker has loaded."""
    return ModelInfo(
        tokenizer_json=message.tokenizer_json,
        chat_template=message.chat_template,
        architecture=message.architecture,
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        model_digest=message.model_digest,
        bos_token=message.bos_token,
        eos_token=message.eos_token,
        max_sequence_tokens=message.max_sequence_tokens,
    )
