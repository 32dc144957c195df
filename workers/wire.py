"""Phases, commands and events of phasewise.worker.v1 to and from `workers.api`; protobuf objects go no further. Pure."""

import math
from collections.abc import Iterable

from protos import worker_pb2 as pb
from workers.api import (
    Abort,
    Command,
    DecodingReport,
    DraftsGenerated,
    Encode,
    Event,
    FailureCode,
    FinishReason,
    Handoff,
    ImagesEncoded,
    ImagesReduced,
    ImagesWanted,
    KvBlocksRemoved,
    KvBlocksStored,
    KvEvent,
    KvEventsLost,
    KvTransferred,
    Migrate,
    Phase,
    PhaseSet,
    PrefillStarted,
    PrefixPeer,
    PromptScored,
    RequestFailed,
    RequestId,
    RequestKey,
    Submit,
    SubscribeKvEvents,
    TokenLogprobs,
    TokensGenerated,
)
from workers.image_wire import (
    encode_from_pb,
    encode_to_pb,
    images_encoded_from_pb,
    images_encoded_to_pb,
    images_reduced_from_pb,
    images_reduced_to_pb,
    reduction_from_pb,
    reduction_to_pb,
    tile_from_pb,
    tile_to_pb,
)
from workers.kv_wire import kv_transferred_from_pb, kv_transferred_to_pb
from workers.sampling_wire import sampling_from_pb, sampling_to_pb

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
_PHASE_OF = {value: key for key, value in _PHASES.items()}
_FINISH_REASON_OF = {value: key for key, value in _FINISH_REASONS.items()}
_FAILURE_CODE_OF = {value: key for key, value in _FAILURE_CODES.items()}


def phases_to_pb(phases: PhaseSet) -> "list[pb.Phase.ValueType]":
    """In the order of a request's life."""
    return [_PHASES[phase] for phase in Phase if phase in phases]


def phases_from_pb(phases: "Iterable[pb.Phase.ValueType]") -> PhaseSet:
    """Values of a newer version are left out."""
    return frozenset(_PHASE_OF[phase] for phase in phases if phase in _PHASE_OF)


def command_to_pb(command: Command, incarnation: int) -> pb.Command:
    """incarnation: the worker's, as the sender knows it; another one refuses a Submit and an Encode."""
    match command:
        case Abort(key):
            return pb.Command(abort=pb.Abort(request_id=key.request_id, attempt=key.attempt))
        case SubscribeKvEvents():
            return pb.Command(subscribe_kv_events=pb.SubscribeKvEvents())
        case Encode():
            return pb.Command(encode=encode_to_pb(command, incarnation))
        case Migrate():
            return pb.Command(
                migrate=pb.Migrate(
                    request_id=command.key.request_id,
                    attempt=command.key.attempt,
                    handoff=_handoff_to_pb(command.handoff),
                    num_known_tokens=command.num_known_tokens,
                )
            )
    submit = pb.Submit(
        request_id=command.key.request_id,
        attempt=command.key.attempt,
        incarnation=incarnation,
        phases=phases_to_pb(command.phases),
        token_ids=command.token_ids,
        sampling=sampling_to_pb(command.sampling),
        timeout_s=command.timeout_s,
        num_delivered=command.num_delivered,
        priority=command.priority,
        cache_salt=command.cache_salt,
        prefix_peers=[
            pb.PrefixPeer(address=peer.address, incarnation=peer.incarnation) for peer in command.prefix_peers
        ],
        images=map(tile_to_pb, command.images),
        reduction=reduction_to_pb(command.reduction),
    )
    if command.ttft_left_s < math.inf:
        submit.ttft_left_s = command.ttft_left_s
    if command.tpot_target_s < math.inf:
        submit.tpot_target_s = command.tpot_target_s
    if command.tenant_weight != 1.0:
        submit.tenant_weight = command.tenant_weight
    if command.handoff is not None:
        submit.handoff.CopyFrom(_handoff_to_pb(command.handoff))
    return pb.Command(submit=submit)


def command_from_pb(command: pb.Command) -> Command | None:
    """None for a kind that this version does not know. Raises ValueError for one that cannot be read."""
    match command.WhichOneof("command"):
        case "submit":
            return _submit_from_pb(command.submit)
        case "abort":
            return Abort(RequestKey(RequestId(command.abort.request_id), command.abort.attempt))
        case "subscribe_kv_events":
            return SubscribeKvEvents()
        case "encode":
            return encode_from_pb(command.encode)
        case "migrate":
            return Migrate(
                RequestKey(RequestId(command.migrate.request_id), command.migrate.attempt),
                _handoff_from_pb(command.migrate.handoff),
                command.migrate.num_known_tokens,
            )
        case _:
            return None


def _handoff_to_pb(handoff: Handoff) -> pb.Handoff:
    return pb.Handoff(
        transfer_id=handoff.transfer_id,
        decode_address=handoff.decode_address,
        decode_incarnation=handoff.decode_incarnation,
    )


def _handoff_from_pb(message: pb.Handoff) -> Handoff:
    return Handoff(message.transfer_id, message.decode_address, message.decode_incarnation)


def _submit_from_pb(submit: pb.Submit) -> Submit:
    return Submit(
        key=RequestKey(RequestId(submit.request_id), submit.attempt),
        phases=phases_from_pb(submit.phases),
        token_ids=tuple(submit.token_ids),
        sampling=sampling_from_pb(submit.sampling),
        timeout_s=submit.timeout_s,
        handoff=_handoff_from_pb(submit.handoff) if submit.HasField("handoff") else None,
        num_delivered=submit.num_delivered,
        priority=submit.priority,
        cache_salt=submit.cache_salt,
        prefix_peers=tuple(PrefixPeer(peer.address, peer.incarnation) for peer in submit.prefix_peers),
        images=tuple(map(tile_from_pb, submit.images)),
        reduction=reduction_from_pb(submit.reduction) if submit.HasField("reduction") else None,
        ttft_left_s=submit.ttft_left_s if submit.HasField("ttft_left_s") else math.inf,
        tpot_target_s=submit.tpot_target_s if submit.HasField("tpot_target_s") else math.inf,
        tenant_weight=submit.tenant_weight if submit.HasField("tenant_weight") else 1.0,
    )


def event_to_pb(event: Event) -> pb.Event:
    """One event of a request."""
    message = pb.Event(request_id=event.key.request_id, attempt=event.key.attempt)
    match event:
        case PrefillStarted():
            message.prefill_started.queue_s = event.queue_s
            message.prefill_started.order_reason = event.order_reason
        case TokensGenerated():
            message.tokens_generated.token_ids.extend(event.token_ids)
            message.tokens_generated.first_position = event.first_position
            message.tokens_generated.finish_reason = _FINISH_REASONS[event.finish_reason]
            if event.prefill_s is not None:
                message.tokens_generated.prefill_s = event.prefill_s
            if event.num_cached_tokens:
                message.tokens_generated.num_cached_tokens = event.num_cached_tokens
            if event.num_reused_tokens:
                message.tokens_generated.num_reused_tokens = event.num_reused_tokens
            if event.num_fetched_tokens:
                message.tokens_generated.num_fetched_tokens = event.num_fetched_tokens
            if event.prefix_fetch_s:
                message.tokens_generated.prefix_fetch_s = event.prefix_fetch_s
            if event.logprobs:
                message.tokens_generated.logprobs.extend(map(_logprobs_to_pb, event.logprobs))
        case KvTransferred():
            message.kv_transferred.CopyFrom(kv_transferred_to_pb(event))
        case RequestFailed():
            message.request_failed.code = _FAILURE_CODES[event.code]
            message.request_failed.reason = event.reason
        case PromptScored():
            message.prompt_scored.first_position = event.first_position
            message.prompt_scored.logprobs.extend(map(_logprobs_to_pb, event.logprobs))
        case DraftsGenerated():
            # A message with nothing in it is otherwise not sent at all.
            message.drafts_generated.SetInParent()
            for token_ids, logprob in zip(event.drafts, event.logprobs, strict=True):
                message.drafts_generated.drafts.add(token_ids=token_ids, logprob=logprob)
        case DecodingReport():
            message.decoding_report.SetInParent()
            message.decoding_report.num_steps = event.num_steps
            message.decoding_report.num_rows = event.num_rows
            message.decoding_report.num_tokens = event.num_tokens
        case ImagesWanted():
            message.images_wanted.tiles.extend(event.tiles)
        case ImagesEncoded():
            message.images_encoded.CopyFrom(images_encoded_to_pb(event))
        case ImagesReduced():
            message.images_reduced.CopyFrom(images_reduced_to_pb(event))
    return message


def event_from_pb(message: pb.Event) -> Event | None:
    """None for a kind that this version does not know."""
    key = RequestKey(RequestId(message.request_id), message.attempt)
    match message.WhichOneof("event"):
        case "prefill_started":
            return PrefillStarted(key, message.prefill_started.queue_s, message.prefill_started.order_reason)
        case "tokens_generated":
            tokens = message.tokens_generated
            return TokensGenerated(
                key,
                tuple(tokens.token_ids),
                tokens.first_position,
                _FINISH_REASON_OF.get(tokens.finish_reason),
                tokens.prefill_s if tokens.HasField("prefill_s") else None,
                tuple(map(_logprobs_from_pb, tokens.logprobs)),
                tokens.num_cached_tokens,
                tokens.num_reused_tokens,
                tokens.num_fetched_tokens,
                tokens.prefix_fetch_s,
            )
        case "kv_transferred":
            return kv_transferred_from_pb(key, message.kv_transferred)
        case "request_failed":
            code = _FAILURE_CODE_OF.get(message.request_failed.code, FailureCode.INTERNAL)
            return RequestFailed(key, code, message.request_failed.reason)
        case "prompt_scored":
            scored = message.prompt_scored
            return PromptScored(key, scored.first_position, tuple(map(_logprobs_from_pb, scored.logprobs)))
        case "drafts_generated":
            drafts = message.drafts_generated.drafts
            return DraftsGenerated(
                key,
                tuple(tuple(draft.token_ids) for draft in drafts),
                tuple(draft.logprob for draft in drafts),
            )
        case "decoding_report":
            report = message.decoding_report
            return DecodingReport(key, report.num_steps, report.num_rows, report.num_tokens)
        case "images_wanted":
            return ImagesWanted(key, tuple(message.images_wanted.tiles))
        case "images_encoded":
            return images_encoded_from_pb(key, message.images_encoded)
        case "images_reduced":
            return images_reduced_from_pb(key, message.images_reduced)
        case _:
            return None


def kv_event_to_pb(event: KvEvent) -> pb.KvEvent:
    """One event of the prefix cache."""
    match event:
        case KvBlocksStored(parent, hashes):
            return pb.KvEvent(stored=pb.KvBlocksStored(parent=parent, hashes=hashes))
        case KvBlocksRemoved(hashes):
            return pb.KvEvent(removed=pb.KvBlocksRemoved(hashes=hashes))
        case KvEventsLost():
            return pb.KvEvent(lost=pb.KvEventsLost())


def kv_event_from_pb(message: pb.KvEvent) -> KvEvent | None:
    """None for a kind that this version does not know."""
    match message.WhichOneof("event"):
        case "stored":
            return KvBlocksStored(message.stored.parent, tuple(message.stored.hashes))
        case "removed":
            return KvBlocksRemoved(tuple(message.removed.hashes))
        case "lost":
            return KvEventsLost()
        case _:
            return None


def _logprobs_to_pb(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def _logprobs_from_pb(message: pb.TokenLogprobs) -> TokenLogprobs:
    # Lengths that differ would be the sender's bug; what has no counterpart is left out.
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=False))
    return TokenLogprobs(message.token_id, message.logprob, message.rank, top)
