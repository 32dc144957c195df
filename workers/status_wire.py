"""What a worker says of itself and of its model, to and from `workers.api`. Pure."""

from protos import worker_pb2 as pb
from workers.api import ModelInfo, PhaseWork, WorkerId, WorkerState, WorkerStatus
from workers.cost_wire import encode_costs_from_pb, encode_costs_to_pb, step_costs_from_pb, step_costs_to_pb
from workers.gpu_wire import gpu_from_pb, gpu_to_pb
from workers.image_wire import embedding_counts_from_pb, embedding_counts_to_pb
from workers.kv_wire import (
    block_counts_from_pb,
    block_counts_to_pb,
    peer_from_pb,
    peer_to_pb,
    reuse_counts_from_pb,
    reuse_counts_to_pb,
    transfer_counts_from_pb,
    transfer_counts_to_pb,
)
from workers.wire import phases_from_pb, phases_to_pb

_WORKER_STATES = {
    WorkerState.LOADING: pb.WORKER_STATE_LOADING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.FAILED: pb.WORKER_STATE_FAILED,
}
_WORKER_STATE_OF = {value: key for key, value in _WORKER_STATES.items()}


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
        blocks=block_counts_to_pb(status.blocks),
        num_leases=status.num_leases,
        num_steps=status.num_steps,
        pid=status.pid,
        memory_bytes=status.memory_bytes,
        leaked_blocks=status.leaked_blocks,
        num_invariant_failures=status.num_invariant_failures,
        transfers=transfer_counts_to_pb(status.transfers),
        peers=map(peer_to_pb, status.peers),
        reuse=reuse_counts_to_pb(status.reuse),
        embeddings=embedding_counts_to_pb(status.embeddings),
        work=pb.PhaseWork(
            num_encodes=status.work.num_encodes,
            num_prefills=status.work.num_prefills,
            num_decodes=status.work.num_decodes,
            prefill_tokens=status.work.prefill_tokens,
            num_decoding=status.work.num_decoding,
            decode_context=status.work.decode_context,
            encode_tiles=status.work.encode_tiles,
        ),
        phase_epoch=status.phase_epoch,
        first_step_s=status.first_step_s,
        step_costs=step_costs_to_pb(status.step_costs),
        encode_costs=encode_costs_to_pb(status.encode_costs),
        gpu=gpu_to_pb(status.gpu) if status.gpu is not None else None,
        loaded=phases_to_pb(status.loaded),
        takes_pictures=status.takes_pictures,
        layout_s=dict(status.layout_s),
        room_tokens=status.room_tokens,
    )


def status_from_pb(message: pb.WorkerStatus) -> WorkerStatus:
    """What a worker reported. A state of a newer version counts as failed."""
    peers = map(peer_from_pb, message.peers)
    return WorkerStatus(
        worker_id=WorkerId(message.worker_id),
        incarnation=message.incarnation,
        phases=phases_from_pb(message.phases),
        state=_WORKER_STATE_OF.get(message.state, WorkerState.FAILED),
        message=message.message,
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        blocks=block_counts_from_pb(message.blocks),
        num_leases=message.num_leases,
        num_steps=message.num_steps,
        pid=message.pid,
        memory_bytes=message.memory_bytes,
        leaked_blocks=message.leaked_blocks,
        num_invariant_failures=message.num_invariant_failures,
        transfers=transfer_counts_from_pb(message.transfers),
        peers=tuple(peer for peer in peers if peer is not None),
        reuse=reuse_counts_from_pb(message.reuse),
        embeddings=embedding_counts_from_pb(message.embeddings),
        work=PhaseWork(
            message.work.num_encodes,
            message.work.num_prefills,
            message.work.num_decodes,
            message.work.prefill_tokens,
            message.work.num_decoding,
            message.work.decode_context,
            message.work.encode_tiles,
        ),
        phase_epoch=message.phase_epoch,
        first_step_s=message.first_step_s if message.HasField("first_step_s") else None,
        step_costs=step_costs_from_pb(message.step_costs),
        encode_costs=encode_costs_from_pb(message.encode_costs),
        gpu=gpu_from_pb(message.gpu) if message.HasField("gpu") else None,
        loaded=phases_from_pb(message.loaded),
        takes_pictures=message.takes_pictures,
        layout_s=tuple(sorted(message.layout_s.items())),
        room_tokens=message.room_tokens if message.HasField("room_tokens") else None,
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
        vision_json=model.vision_json,
        max_image_embeddings=model.max_image_embeddings,
        block_size=model.block_size,
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
        vision_json=message.vision_json,
        max_image_embeddings=message.max_image_embeddings,
        block_size=message.block_size,
    )
