"""What the time of one request went to, drawn on one axis for a terminal of 80 columns. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cli import encode_text, transfer_text
from orchestrator.cli.transfer_text import seconds
from protos import inference_pb2 as pb

BAR_COLUMNS = 46
_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "an end token",
    pb.FINISH_REASON_LENGTH: "the length limit",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the request's time, in seconds since it arrived at the gateway."""

    name: str
    start_s: float
    duration_s: float
    mark: str = "#"
    #: The last part of the span, drawn with `exposed_mark`.
    exposed_s: float = 0.0
    exposed_mark: str = "#"


def lines_of_all(ends: Sequence[pb.GenerateResponse]) -> list[str]:
    """The timelines of the samples that ended with these messages."""
    if len(ends) == 1:
        return lines(ends[0])
    found = []
    for end in ends:
        found += [f"[sample {end.sample_index}]", *lines(end), ""]
    return found[:-1]


def lines(last: pb.GenerateResponse) -> list[str]:
    """The timeline of the sample whose last message this is."""
    found = spans(last.timings)
    total_s = max(last.timings.total_s, *(span.start_s + span.duration_s for span in found))
    axis = f"{'0':<{BAR_COLUMNS // 2}}{seconds(total_s):>{BAR_COLUMNS - BAR_COLUMNS // 2}}"
    return [
        f"{'':<13}{axis}",
        *(f"{span.name:<12}|{bar(span, total_s)}|{seconds(span.duration_s):>9}" for span in found),
        "",
        *_numbers(last),
    ]


def spans(timings: pb.Timings) -> list[Span]:
    """Queue, encode if pictures were, prefill, KV transfer if there was one, and decode.

    Pictures are encoded while the prompt waits, and beside the prefill of what stands before them.

    A transfer of a later attempt than the first token's is left out: where it lies is not known.
    The transfer runs beside prefill and ends `exposed_s` after it; decode counts from the first token,
    which the prefill worker sends, so the exposed part lies within decode.
    """
    prefill_end_s = timings.queue_s + timings.prefill_s
    found = [Span("queue", 0.0, timings.queue_s)]
    if timings.HasField("encode_s"):
        found.append(Span("encode", timings.encode_start_s, timings.encode_s))
    found.append(Span("prefill", timings.queue_s, timings.prefill_s))
    if timings.HasField("kv_transfer") and timings.attempts <= 1:
        transfer = timings.kv_transfer
        start_s = max(0.0, prefill_end_s + transfer.exposed_s - transfer.transfer_s)
        span = Span("KV transfer", start_s, transfer.transfer_s, "-", transfer.exposed_s, "#")
        found.append(span)
    found.append(Span("decode", timings.ttft_s, timings.decode_s))
    return found


def bar(span: Span, total_s: float) -> str:
    """The span on an axis of `total_s`; one that took any time is at least one column wide."""
    if total_s <= 0 or span.duration_s <= 0:
        return " " * BAR_COLUMNS
    per_s = BAR_COLUMNS / total_s
    start = min(round(span.start_s * per_s), BAR_COLUMNS - 1)
    end = min(max(round((span.start_s + span.duration_s) * per_s), start + 1), BAR_COLUMNS)
    exposed = min(round(span.exposed_s * per_s), end - start)
    drawn = span.mark * (end - start - exposed) + span.exposed_mark * exposed
    return " " * start + drawn + " " * (BAR_COLUMNS - end)


def _numbers(last: pb.GenerateResponse) -> list[str]:
    timings = last.timings
    tpot = seconds(timings.tpot_s) if timings.HasField("tpot_s") else "none below 2 tokens"
    reason = _FINISH_REASONS.get(last.finish_reason, "the gateway")
    if last.stop_text:
        reason = f"the stop text {last.stop_text!r}"
    found = [
        f"latency      TTFT {seconds(timings.ttft_s)}, TPOT {tpot}, total {seconds(timings.total_s)}",
        *_tokens(last, reason),
        *_encodes(timings),
        *_transfer(timings),
        _workers(timings),
    ]
    if timings.attempts > 1:
        found.append(f"attempts     {timings.attempts}: a worker was lost and the request went on elsewhere")
    return found


def _tokens(last: pb.GenerateResponse, reason: str) -> list[str]:
    """Tokens are known at the end of the whole request; they are those of all samples."""
    if not last.HasField("usage"):
        return [f"end          by {reason}"]
    usage = last.usage
    reuse = transfer_text.reuse(usage.cached_tokens, usage.fetched_tokens, usage.reused_tokens, "cached")
    pictures = f", {usage.image_tokens} of pictures" if usage.image_tokens else ""
    tokens = f"{usage.prompt_tokens} in the prompt{pictures}{reuse}, {usage.completion_tokens} generated"
    found = [f"tokens       {tokens}; ended by {reason}"]
    if usage.HasField("image_reduction"):
        reduced = usage.image_reduction
        text = encode_text.reduced(
            usage.image_tokens,
            reduced.encoded_tokens,
            reduced.kept_tokens,
            reduced.prefill_share,
            is_too_long=reduced.is_too_long,
        )
        found.append(f"reduction    {text}")
    if usage.decoding.num_tokens:
        decoding = usage.decoding
        rows = decoding.num_rows / decoding.num_tokens
        found.append(
            f"decoding     {decoding.num_tokens} tokens in {decoding.num_steps} steps, {rows:.2f} rows a token"
        )
    return found


def _encodes(timings: pb.Timings) -> list[str]:
    found = encode_text.lines(timings.encodes)
    return [f"{'' if i else 'pictures':<13}{text}" for i, text in enumerate(found)]


def _transfer(timings: pb.Timings) -> list[str]:
    if not timings.HasField("kv_transfer"):
        return []
    found = transfer_text.lines(timings.kv_transfer)
    if timings.HasField("second_token_s"):
        found.append(f"second token {seconds(timings.second_token_s)} after the first")
    return [f"{'' if i else 'KV transfer':<13}{text}" for i, text in enumerate(found)]


def _workers(timings: pb.Timings) -> str:
    prefill, decode = timings.prefill_worker_id or "unknown", timings.decode_worker_id or "unknown"
    if prefill == decode:
        return f"worker       {prefill}"
    return f"workers      prefill on {prefill}, decode on {decode}"
