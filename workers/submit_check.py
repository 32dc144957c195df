"""Is a Submit something that this worker can make sense of? Pure.

The engine refuses what it has no room for; here is refused what would mean nothing, or break something.
"""

import math

from workers.api import (
    MAX_SALT_CHARS,
    Encode,
    Handoff,
    ImageReduction,
    Migrate,
    Phase,
    PhaseSet,
    Submit,
    SuperposedDecoding,
)
from workers.reduction_check import reduction_problem
from workers.sampling_check import sampling_problem

MAX_ID_CHARS = 256
MAX_TILES = 4096
MAX_KEY_BYTES = 64


def submit_problem(submit: Submit, vocab_size: int) -> str | None:
    """What is wrong, beginning with the field's name; None when nothing is."""
    if not 0 < len(submit.key.request_id) <= MAX_ID_CHARS:
        return f"request_id: has {len(submit.key.request_id)} characters; 1 to {MAX_ID_CHARS} are allowed"
    if not submit.phases:
        return "phases: is empty; name prefill, decode or both"
    if not submit.token_ids:
        return "token_ids: is empty; a prompt has at least one token"
    lowest, highest = min(submit.token_ids), max(submit.token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        return f"token_ids: {wrong} is not in the vocabulary; allowed are 0 to {vocab_size - 1}"
    if not (math.isfinite(submit.timeout_s) and submit.timeout_s > 0):
        return f"timeout_s: is {submit.timeout_s:g}; a finite number of seconds above 0 is needed"
    if not 0 <= submit.num_delivered < len(submit.token_ids):
        allowed = f"0 to {len(submit.token_ids) - 1}, since one token at least is the prompt's"
        return f"num_delivered: is {submit.num_delivered}; allowed: {allowed}"
    if len(submit.cache_salt) > MAX_SALT_CHARS:
        return f"cache_salt: has {len(submit.cache_salt)} characters; at most {MAX_SALT_CHARS} are allowed"
    if (target_problem := _target_problem(submit)) is not None:
        return target_problem
    image_problem = _images_problem(submit) or _reduction_problem(submit.reduction)
    if image_problem is not None:
        return image_problem
    problem = sampling_problem(submit.sampling, vocab_size)
    if problem is not None:
        return f"sampling.{problem.field}: is {problem.value}; allowed: {problem.allowed}"
    is_reduced = submit.reduction is not None and submit.reduction.is_on and bool(submit.images)
    if is_reduced and submit.sampling.num_prompt_logprobs is not None:
        return "reduction: is set, and prompt_logprobs need every token of the prompt; ask for one of them"
    return _handoff_problem(submit.handoff, submit.phases)


def encode_problem(encode: Encode) -> str | None:
    """The same of an Encode."""
    if not 0 < len(encode.key.request_id) <= MAX_ID_CHARS:
        return f"request_id: has {len(encode.key.request_id)} characters; 1 to {MAX_ID_CHARS} are allowed"
    if not 0 <= encode.tile_lo < encode.tile_hi <= MAX_TILES:
        return f"tiles: {encode.tile_lo} to {encode.tile_hi}; some of {MAX_TILES} are needed"
    if min(encode.width, encode.height) < 1:
        return f"width, height: {encode.width} x {encode.height} pixels; at least 1 x 1 are needed"
    if len(encode.keys) != encode.tile_hi - encode.tile_lo:
        return f"keys: {len(encode.keys)} for {encode.tile_hi - encode.tile_lo} tiles"
    if not (math.isfinite(encode.timeout_s) and encode.timeout_s > 0):
        return f"timeout_s: is {encode.timeout_s:g}; a finite number of seconds above 0 is needed"
    if len(encode.cache_salt) > MAX_SALT_CHARS:
        return f"cache_salt: has {len(encode.cache_salt)} characters; at most {MAX_SALT_CHARS} are allowed"
    if not _is_address(encode.prefill_address):
        return f"prefill_address: {encode.prefill_address!r} is not host:port"
    return _reduction_problem(encode.reduction)


def migrate_problem(migrate: Migrate) -> str | None:
    """The same of a Migrate."""
    if migrate.num_known_tokens < 1:
        return f"num_known_tokens: is {migrate.num_known_tokens}; a prompt has at least one token"
    return _handoff_problem(migrate.handoff, frozenset({Phase.PREFILL}))


def _target_problem(submit: Submit) -> str | None:
    if math.isnan(submit.ttft_left_s) or submit.ttft_left_s == -math.inf:
        return f"ttft_left_s: is {submit.ttft_left_s:g}; a number of seconds is needed"
    if not submit.tpot_target_s > 0:
        return f"tpot_target_s: is {submit.tpot_target_s:g}; a number of seconds above 0 is needed"
    if not (math.isfinite(submit.tenant_weight) and submit.tenant_weight > 0):
        return f"tenant_weight: is {submit.tenant_weight:g}; a finite number above 0 is needed"
    return None


def _reduction_problem(reduction: ImageReduction | None) -> str | None:
    problem = reduction_problem(reduction) if reduction is not None else None
    return f"reduction.{problem.field}: is {problem.value}; allowed: {problem.allowed}" if problem else None


def _images_problem(submit: Submit) -> str | None:
    """Tiles stand one after the other, inside the prompt."""
    if len(submit.images) > MAX_TILES:
        return f"images: {len(submit.images)} tiles; at most {MAX_TILES} are allowed"
    end = 0
    num_prompt_tokens = len(submit.token_ids) - submit.num_delivered
    for i, tile in enumerate(submit.images):
        if tile.start < end or tile.num_embeddings < 1:
            return f"images[{i}]: {tile.num_embeddings} embeddings at {tile.start}; the tile before ends at {end}"
        if not 0 < len(tile.key) <= MAX_KEY_BYTES:
            return f"images[{i}].key: has {len(tile.key)} bytes; 1 to {MAX_KEY_BYTES} are allowed"
        if tile.grid is not None and (min(tile.grid) < 1 or math.prod(tile.grid) != tile.num_embeddings):
            return f"images[{i}].grid: {tile.grid} is not one of {tile.num_embeddings} embeddings"
        end = tile.start + tile.num_embeddings
    if (
        submit.images
        and end == num_prompt_tokens
        and isinstance(submit.sampling.decoding, SuperposedDecoding)
    ):
        # Decode computes the last row again, and has no embeddings.
        return "images: the prompt ends with one; with superposed decoding some text has to follow"
    if end > num_prompt_tokens:
        return f"images: they end at {end}, and the prompt at {num_prompt_tokens}"
    return None


def _handoff_problem(handoff: Handoff | None, phases: PhaseSet) -> str | None:
    is_split = len(phases & {Phase.PREFILL, Phase.DECODE}) == 1
    if handoff is None:
        return "handoff: is missing; one of prefill and decode alone needs it" if is_split else None
    if not is_split:
        return "handoff: is set, but prefill and decode are both asked of this worker"
    if not 0 < len(handoff.transfer_id) <= MAX_ID_CHARS:
        return (
            f"handoff.transfer_id: has {len(handoff.transfer_id)} characters; 1 to {MAX_ID_CHARS} are allowed"
        )
    if Phase.PREFILL in phases and not _is_address(handoff.decode_address):
        return f"handoff.decode_address: {handoff.decode_address!r} is not host:port"
    return None


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
