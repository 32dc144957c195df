"""Looks up what a prompt can reuse. Pure."""

from collections.abc import Callable

from workers.api import SpanReuseConfig
from workers.engine.sequence import Sequence
from workers.engine.span_reuse.rule import SpanReuse
from workers.engine.span_reuse.span_index import SpanIndex


def find_reuse(
    spans: SpanIndex, sequence: Sequence, config: SpanReuseConfig, is_computed: Callable[[int], bool]
) -> SpanReuse | None:
    """What is known, from other contexts, of the tokens that it has not computed; None if that is too little.

    The last token is always computed. is_computed: whether a block that `spans` knows has its KV already.
    """
    if sequence.num_uncomputed_tokens <= config.min_tokens:
        return None
    # Embeddings of pictures take another way than tokens.
    if sequence.images is not None:
        return None
    # Logprobs of the prompt need all of it computed; a transfer is told at its start what KV it will be of.
    if sequence.sampling.num_prompt_logprobs is not None or _is_sending(sequence):
        return None
    found = spans.find(
        sequence.block_hashes[0],
        sequence.token_ids,
        sequence.num_computed_tokens,
        len(sequence.token_ids) - 1,
        is_computed,
    )
    reuse = SpanReuse(tuple(found), config.recompute_fraction)
    return reuse if reuse.num_reused >= config.min_tokens else None


def _is_sending(sequence: Sequence) -> bool:
    return sequence.is_handed_off and sequence.prefill_started_s is not None
