"""Messages about pictures to and from `workers.api`. Pure."""

from protos import worker_pb2 as pb
from workers.api import (
    EmbeddingCounts,
    Encode,
    ImageReduction,
    ImagesEncoded,
    ImagesReduced,
    ImageTile,
    RequestId,
    RequestKey,
    WorkerId,
)


def tile_to_pb(tile: ImageTile) -> pb.ImageTile:
    """Where one tile's embeddings stand."""
    return pb.ImageTile(
        start=tile.start, num_embeddings=tile.num_embeddings, key=tile.key, grid=tile.grid or ()
    )


def tile_from_pb(message: pb.ImageTile) -> ImageTile:
    """Where one tile's embeddings stand. Raises ValueError when its grid is none."""
    grid = None
    if message.grid:
        frames, rows, cols = message.grid
        grid = frames, rows, cols
    return ImageTile(message.start, message.num_embeddings, message.key, grid)


def reduction_to_pb(reduction: ImageReduction | None) -> pb.ImageReduction | None:
    """None where there is none."""
    if reduction is None:
        return None
    return pb.ImageReduction(
        merge_threshold=reduction.merge_threshold,
        global_threshold=reduction.global_threshold,
        individual_threshold=reduction.individual_threshold,
        key_fraction=reduction.key_fraction,
        layers=reduction.layers,
    )


def reduction_from_pb(message: pb.ImageReduction) -> ImageReduction:
    """How pictures are reduced."""
    return ImageReduction(
        message.merge_threshold,
        message.global_threshold,
        message.individual_threshold,
        message.key_fraction,
        tuple(message.layers),
    )


def encode_to_pb(encode: Encode, incarnation: int) -> pb.Encode:
    """incarnation: that of the worker that is told."""
    return pb.Encode(
        request_id=encode.key.request_id,
        attempt=encode.key.attempt,
        incarnation=incarnation,
        image=encode.image,
        media_type=encode.media_type,
        width=encode.width,
        height=encode.height,
        tile_lo=encode.tile_lo,
        tile_hi=encode.tile_hi,
        keys=encode.keys,
        prefill_attempt=encode.prefill.attempt,
        first_tile=encode.first_tile,
        prefill_worker_id=encode.prefill_worker,
        prefill_address=encode.prefill_address,
        prefill_incarnation=encode.prefill_incarnation,
        timeout_s=encode.timeout_s,
        cache_salt=encode.cache_salt,
        reduction=reduction_to_pb(encode.reduction),
    )


def encode_from_pb(message: pb.Encode) -> Encode:
    """What a gateway asks for."""
    request_id = RequestId(message.request_id)
    return Encode(
        key=RequestKey(request_id, message.attempt),
        image=message.image,
        media_type=message.media_type,
        width=message.width,
        height=message.height,
        tile_lo=message.tile_lo,
        tile_hi=message.tile_hi,
        keys=tuple(message.keys),
        prefill=RequestKey(request_id, message.prefill_attempt),
        first_tile=message.first_tile,
        prefill_worker=WorkerId(message.prefill_worker_id),
        prefill_address=message.prefill_address,
        prefill_incarnation=message.prefill_incarnation,
        timeout_s=message.timeout_s,
        cache_salt=message.cache_salt,
        reduction=reduction_from_pb(message.reduction) if message.HasField("reduction") else None,
    )


def images_encoded_to_pb(event: ImagesEncoded) -> pb.ImagesEncoded:
    """What an encode worker did."""
    return pb.ImagesEncoded(
        num_tiles=event.num_tiles,
        num_cached=event.num_cached,
        num_embeddings=event.num_embeddings,
        num_bytes=event.num_bytes,
        queue_s=event.queue_s,
        decode_s=event.decode_s,
        encode_s=event.encode_s,
        transfer_s=event.transfer_s,
        transport=event.transport,
    )


def images_encoded_from_pb(key: RequestKey, message: pb.ImagesEncoded) -> ImagesEncoded:
    """What an encode worker did."""
    return ImagesEncoded(
        key,
        num_tiles=message.num_tiles,
        num_cached=message.num_cached,
        num_embeddings=message.num_embeddings,
        num_bytes=message.num_bytes,
        queue_s=message.queue_s,
        decode_s=message.decode_s,
        encode_s=message.encode_s,
        transfer_s=message.transfer_s,
        transport=message.transport,
    )


def images_reduced_to_pb(event: ImagesReduced) -> pb.ImagesReduced:
    """What is left of pictures."""
    return pb.ImagesReduced(
        num_planned=event.num_planned,
        num_encoded=event.num_encoded,
        num_kept=event.num_kept,
        prefill_share=event.prefill_share,
        is_too_long=event.is_too_long,
    )


def images_reduced_from_pb(key: RequestKey, message: pb.ImagesReduced) -> ImagesReduced:
    """What is left of pictures."""
    return ImagesReduced(
        key,
        message.num_planned,
        message.num_encoded,
        message.num_kept,
        message.prefill_share,
        message.is_too_long,
    )


def embedding_counts_to_pb(counts: EmbeddingCounts) -> pb.EmbeddingCounts:
    """Pictures on one worker."""
    return pb.EmbeddingCounts(
        num_blocks=counts.num_blocks,
        num_free=counts.num_free,
        num_cached=counts.num_cached,
        num_waiting=counts.num_waiting,
        num_hits=counts.num_hits,
        num_misses=counts.num_misses,
        num_evictions=counts.num_evictions,
        num_encodes_running=counts.num_encodes_running,
        num_tiles_encoded=counts.num_tiles_encoded,
        num_tiles_cached=counts.num_tiles_cached,
        num_batches=counts.num_batches,
        num_patches=counts.num_patches,
    )


def embedding_counts_from_pb(message: pb.EmbeddingCounts) -> EmbeddingCounts:
    """Pictures on one worker."""
    return EmbeddingCounts(
        num_blocks=message.num_blocks,
        num_free=message.num_free,
        num_cached=message.num_cached,
        num_waiting=message.num_waiting,
        num_hits=message.num_hits,
        num_misses=message.num_misses,
        num_evictions=message.num_evictions,
        num_encodes_running=message.num_encodes_running,
        num_tiles_encoded=message.num_tiles_encoded,
        num_tiles_cached=message.num_tiles_cached,
        num_batches=message.num_batches,
        num_patches=message.num_patches,
    )
